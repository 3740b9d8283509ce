// What `duet bench` measures and how it shows it (cli/bench.cpp, cli/bench_report.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json_fwd.h"
#include "cli/streaming.h"
#include "runtime/engine.h"
#include "runtime/expert_policy.h"
#include "runtime/expert_replay.h"
#include "runtime/expert_trace.h"
#include "runtime/roofline.h"

namespace duet::cli {

// Limits of the machine with so many threads.
struct Limits {
  int n_threads = 1;
  std::string isa;
  Roofline roofline;
};

// How a test fared that streamed experts, per token (prefill: of the prompt), and the times that its own
// misses allow: T_io = bytes from disk / disk rate, T_mem = bytes of weights in use / memory rate,
// T_perfect = max(T_io, T_mem), T_demand = T_io + the rest of T_mem (no reading before the router has chosen).
struct StreamShare : StreamUse {
  double t = 0, t_io = 0;  // seconds, measured and from the disk
  double t_perfect = 0, t_demand = 0, eff_sched = 0, eff_disk = 0;  // seconds; T_perfect / measured; disk duty
  std::optional<double> eff_policy;  // decode: bytes that Belady's choice would have missed / bytes missed
  double major_faults = 0;
  std::optional<double> kernel_bytes;  // per token, that the kernel read from disks for this process
  uint64_t peak_bytes = 0;  // of the process so far
};

struct BenchResult {
  std::string test;  // "pp512", "tg32", "tg32@d8192"
  bool is_decode = false;
  int n_threads = 1;
  std::vector<double> tok_s;  // of each repetition
  double mean = 0, deviation = 0;
  double bytes_per_token = 0, macs_per_token = 0, int8_macs_per_token = 0;
  double share_of_limit = 0;
  std::optional<double> read_bytes_per_s;  // decode: the limit, measured beside each repetition
  std::optional<StreamShare> streamed;     // absent: all weights in memory
  std::optional<double> joules_per_token;  // absent where the counters cannot be read
};

struct BenchReport {
  std::string model;
  std::optional<ModelInfo> info;  // absent: limits only
  std::string kv_type;
  uint32_t n_batch = 0;
  std::string plan;                   // of memory, where experts are streamed
  std::string card;                   // and what it computes; "": none
  uint64_t seed = 0;
  std::string isa;
  std::vector<int> threads;
  std::string energy_absent;          // why there are no joules
  std::vector<Limits> limits;         // by number of threads; with --roofline by instruction set too
  std::optional<double> disk_bytes_per_s;  // measured with the engine's reader; only when experts are streamed
  std::vector<BenchResult> results;
  // How often each expert was chosen in the runs that count, [n_layer, n_expert].
  std::vector<uint64_t> prefill_uses, decode_uses;
};

// Measures one test that streams experts: begin before, end after.
class StreamMeter {
 public:
  explicit StreamMeter(const Engine& engine);
  bool active() const { return before_.has_value(); }
  // All but what depends on the memory's speed.
  StreamShare end(double n_tokens, double seconds, double disk_bytes_per_s) const;

 private:
  const Engine& engine_;
  std::optional<StreamStats> before_;
  uint64_t faults_before_ = 0;
  std::optional<uint64_t> kernel_bytes_before_;
};

// The times that memory allows; weight_bytes: in use per token, from wherever.
void hold_against_memory(StreamShare& share, double weight_bytes, double memory_bytes_per_s);

// What the router of a Runner's session chose: for --trace-experts all of it; where experts are
// streamed, that of decode tests, to compare with the best that could have been kept.
class BenchRouting {
 public:
  // trace: file to write, or "". Error: io, usage (no experts to trace).
  BenchRouting(const Engine& engine, const std::string& trace);
  // For a session that does all of the engine's work. `this` must stay where it is.
  RoutingFn listener();
  // A test begins; `on`: keep its routing.
  void record(bool on);
  // Of the test recorded. Belady's choice begins with what the engine then held, and knows the test
  // to its end.
  double eff_policy() const;
  void commit();  // the trace

 private:
  void add(int layer, std::span<const int32_t> experts);
  void follow(const std::vector<uint32_t>& slots);

  const Engine& engine_;
  std::optional<ExpertTraceWriter> writer_;
  std::optional<ExpertPolicy> policy_;  // in step with the engine's; absent: not streamed
  ExpertPolicy::Step step_;
  bool recording_ = false;
  ExpertTrace test_;            // header: with the slots that the engine has now
  HeldExperts held_;            // when the test began
  Slots first_slots_;
  uint64_t missed_bytes_ = 0;   // of the test, as in the file
};

enum class BenchFormat { table, markdown, csv, json };
void print_report(const BenchReport& report, BenchFormat format);

}  // namespace duet::cli
