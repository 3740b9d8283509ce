// Whether memory has become short while the process runs: what the kernel tells about it, to be read
// again and again.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>

#include "base/host.h"

namespace duet {

// Major faults of this process since it began. Cheap.
uint64_t major_faults();

struct MemoryPressure {
  HostMemory memory;             // limits as they are now
  uint64_t own_bytes = 0;        // anonymous memory of this process
  double full_avg10 = 0;         // per cent of the last 10 s in which all waited for memory: of the own cgroup (v2),
                                 // else of the machine; 0 where the kernel does not tell
  uint64_t high_events = 0;      // times that the own cgroup exceeded its memory.high (v2)
};

// Some ten small files under `root`.
MemoryPressure read_memory_pressure(const std::filesystem::path& root = "/");

// Decides when a process whose memory does not suffice should do with less: coarsely, because a
// reaction to every token's figures costs more than it gains.
class ThrashDetector {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr uint64_t kFaultsPerToken = 100;
  static constexpr size_t kFaultTokens = 8;       // as many, one after the other
  static constexpr double kFullShare = 5;         // per cent
  static constexpr size_t kTokensBetween = 64;    // two reactions
  static constexpr std::chrono::seconds kAverage{10};  // behind full_avg10: no second reaction to the same wait

  explicit ThrashDetector(Clock::time_point now) : last_(now) {}
  // n_tokens have been evaluated since the last call, with so many major faults. True: react now.
  bool after(size_t n_tokens, uint64_t n_faults, double full_avg10, Clock::time_point now);

 private:
  size_t n_faulting_ = 0;                 // tokens in a row
  size_t n_since_ = kTokensBetween;       // tokens since the last reaction
  Clock::time_point last_;
};

}  // namespace duet
