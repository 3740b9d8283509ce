// What `duet bench` measures and how it shows it (cli/bench.cpp, cli/bench_report.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json_fwd.h"
#include "runtime/engine.h"
#include "runtime/roofline.h"

namespace duet::cli {

// Limits of the machine with so many threads.
struct Limits {
  int n_threads = 1;
  std::string isa;
  Roofline roofline;
};

struct BenchResult {
  std::string test;  // "pp512", "tg32", "tg32@d8192"
  int n_threads = 1;
  std::vector<double> tok_s;  // of each repetition
  double mean = 0, deviation = 0;
  double bytes_per_token = 0, macs_per_token = 0;
  double share_of_limit = 0;
  std::optional<double> read_bytes_per_s;  // decode: the limit, measured beside each repetition
  std::optional<double> joules_per_token;  // absent where the counters cannot be read
};

struct BenchReport {
  std::string model;
  std::optional<ModelInfo> info;  // absent: limits only
  std::string kv_type;
  uint32_t n_batch = 0;
  uint64_t seed = 0;
  std::string isa;
  std::vector<int> threads;
  std::string energy_absent;          // why there are no joules
  std::vector<Limits> limits;         // by number of threads; with --roofline by instruction set too
  std::vector<BenchResult> results;
  // How often each expert was chosen in the runs that count, [n_layer, n_expert].
  std::vector<uint64_t> prefill_uses, decode_uses;
};

enum class BenchFormat { table, markdown, csv, json };
void print_report(const BenchReport& report, BenchFormat format);

}  // namespace duet::cli
