// What streaming experts cost while tokens were evaluated.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cli/console.h"
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

// A line on a terminal about the last seconds while experts stream, or while major faults say that weights
// meant to be in memory are read from disk: nothing else, and nothing when stderr is no terminal.
class StreamLine {
 public:
  explicit StreamLine(const Engine& engine);
  // A layer of a chunk of the prompt is done.
  void prompt(int layer);
  // n_tokens have been made since the first.
  void decoded(size_t n_tokens);
  void clear() { line_.clear(); }

 private:
  struct Reading {
    StatusLine::Clock::time_point time;
    size_t n_tokens = 0;
    StreamStats stats;
    uint64_t faults = 0;
  };
  void draw(int layer, size_t n_tokens);
  std::string decode_text(const Reading& now, double seconds) const;
  Reading read(size_t n_tokens) const;

  const Engine& engine_;
  StatusLine line_{std::chrono::milliseconds(250)};
  Reading older_, newer_;  // between which and now figures are taken: 2 to 4 seconds
};

}  // namespace duet::cli
