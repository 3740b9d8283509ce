// Looks between chunks of tokens whether memory has become short, and says what experts must then do
// with. Slots only ever become fewer: memory that was short once is not asked for again.
#pragma once

#include <chrono>
#include <mutex>
#include <optional>
#include <vector>

#include "base/pressure.h"
#include "runtime/engine.h"
#include "runtime/memory_plan.h"

namespace duet {

class MemoryWatch {
 public:
  using Clock = std::chrono::steady_clock;

  // plan: of a model that streams. The limits that hold now are those that it was made for: one that is lowered from here on,
  // while weights are being loaded, is answered.
  MemoryWatch(ModelSizes sizes, MemoryPlan plan, const WatchOptions& options, NoticeFn notice);

  // Weights are loaded: what that made the process wait and fault is no sign of short memory. Before the first after().
  void begin(Clock::time_point now = Clock::now());

  // n_tokens have been evaluated. The slots that each layer may keep, when they have become fewer:
  //   a limit of the cgroup was lowered (v1 hard or soft, v2 max or high) below what the plan takes:
  //     those of the plan for the new limit; none, with a notice, where even that is too much. The
  //     soft limit counts because version 1 refuses a hard limit below what is in use;
  //   the budget was automatic, and less than half of what it was to leave to the machine is available:
  //     as many as restore that, before anything has to wait or be killed;
  //   our pages are being taken from us (ThrashDetector): one less in each layer.
  // Any thread, one after the other.
  std::optional<std::vector<uint32_t>> after(size_t n_tokens, Clock::time_point now = Clock::now());

 private:
  uint64_t count_faults() const { return options_.faults ? options_.faults() : major_faults(); }
  void look(Clock::time_point now);
  void react_to_limit(const char* name, uint64_t limit, uint64_t used, uint64_t cache);
  void react_to_others(uint64_t available);
  void react_to_thrashing(uint64_t n_faults, size_t n_tokens);
  void tell(const std::string& what, uint64_t bytes_before);

  std::mutex mutex_;
  const ModelSizes sizes_;
  MemoryPlan plan_;
  const WatchOptions options_;
  const NoticeFn notice_;
  ThrashDetector thrashing_;
  MemoryPressure pressure_;
  Clock::time_point looked_;
  std::optional<uint64_t> hard_, soft_;  // limits when last looked at
  uint64_t faults_ = 0, high_events_ = 0;
  bool told_floor_ = false;
};

}  // namespace duet
