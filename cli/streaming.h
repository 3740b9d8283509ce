// What streaming experts cost while tokens were evaluated.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "runtime/engine.h"

namespace duet::cli {

struct StreamUse {
  double hit_rate = 1;      // experts that were in memory, of those needed
  double disk_bytes = 0;    // per token
  double disk_bytes_per_s = 0;
  double wait_share = 0;    // of the time of all threads, for rows that had not landed
  std::string backend;
  // In all; read_bytes = misses * bytes of an expert + padding_bytes + wasted_bytes.
  uint64_t read_bytes = 0, padding_bytes = 0, speculative_bytes = 0, wasted_bytes = 0;
  std::optional<double> good_guesses;  // share of the experts that the look-ahead asked for
};

// Between two readings of Engine::stream_stats().
StreamUse stream_use(const StreamStats& before, const StreamStats& now, double n_tokens, double seconds, int n_threads);

}  // namespace duet::cli
