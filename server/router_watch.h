// Which experts the last tokens chose and which are in memory, for those who look (GET /router). What is
// chosen is not recorded while nobody does.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/engine.h"

namespace duet::server {

class RouterWatch {
 public:
  static constexpr size_t kWindow = 32;              // tokens that count as the last
  static constexpr std::chrono::seconds kLooked{5};  // how long somebody who has looked is taken to go on

  explicit RouterWatch(const HParams& hparams);

  // All [n_layer, n_expert].
  struct Picture {
    uint64_t n_tokens = 0;                 // evaluated since the server began
    std::vector<uint8_t> uses;             // by the last kWindow tokens
    std::vector<bool> last, read;          // chosen by the last one; and had to be read for it
    std::vector<bool> resident;            // in memory; empty: all are
  };
  Picture look();  // any thread

  // For the thread that evaluates.
  bool watched() const { return std::chrono::steady_clock::now().time_since_epoch().count() < watched_until_.load(std::memory_order_relaxed); }
  void chosen(size_t layer, std::span<const int32_t> experts);      // as RoutingFn
  void evaluated(size_t n_tokens, const std::vector<bool>& resident);  // after a batch

 private:
  size_t n_layer_, n_expert_, n_used_;
  std::atomic<std::chrono::steady_clock::rep> watched_until_{0};
  std::mutex mutex_;
  std::vector<std::vector<int32_t>> recent_;  // [n_layer] ring of [kWindow, n_used]
  std::vector<size_t> next_;                  // [n_layer] tokens written to it
  std::vector<bool> resident_, read_;
  uint64_t n_tokens_ = 0;
};

}  // namespace duet::server
