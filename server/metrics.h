// Counters and histograms of the server, in Prometheus text form. Any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

namespace duet::server {

// Seconds, in buckets that cover a token and a long prompt.
class Histogram {
 public:
  static constexpr std::array<double, 16> kBounds{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300};
  void add(double seconds);
  std::string text(const char* name, const char* help) const;

 private:
  std::array<std::atomic<uint64_t>, kBounds.size() + 1> counts_{};
  std::atomic<uint64_t> sum_us_{0};
};

struct Metrics {
  std::atomic<uint64_t> requests{0}, refused{0}, cancelled{0}, failed{0};  // generations: taken, for a full queue, ...
  std::atomic<uint64_t> prompt_tokens{0}, cached_tokens{0}, generated_tokens{0};  // prompt: evaluated ones
  std::atomic<uint64_t> prompt_us{0}, decode_us{0}, steps{0}, step_rows{0};
  Histogram first_token, next_token;
};

}  // namespace duet::server
