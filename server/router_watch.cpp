#include "server/router_watch.h"

#include <algorithm>

namespace duet::server {

RouterWatch::RouterWatch(const HParams& hparams)
    : n_layer_(hparams.n_expert > 0 ? hparams.n_layer : 0),
      n_expert_(hparams.n_expert),
      n_used_(hparams.n_expert_used),
      recent_(n_layer_, std::vector<int32_t>(kWindow * n_used_, -1)),
      next_(n_layer_),
      read_(n_layer_ * n_expert_) {}

void RouterWatch::chosen(size_t layer, std::span<const int32_t> experts) {
  if (!watched()) return;
  const size_t n = experts.size() / n_used_;
  const std::lock_guard lock(mutex_);
  for (size_t i = n - std::min(n, kWindow); i < n; ++i) {
    const auto token = experts.subspan(i * n_used_, n_used_);
    std::copy(token.begin(), token.end(), recent_[layer].begin() + static_cast<ptrdiff_t>(next_[layer]++ % kWindow * n_used_));
  }
}

void RouterWatch::evaluated(size_t n_tokens, const std::vector<bool>& resident) {
  const std::lock_guard lock(mutex_);
  n_tokens_ += n_tokens;
  // Against what was there before this batch.
  for (size_t i = 0; i < read_.size(); ++i) read_[i] = !resident_.empty() && !resident_[i];
  resident_ = resident;
}

RouterWatch::Picture RouterWatch::look() {
  const bool was_watched = watched();
  watched_until_ = (std::chrono::steady_clock::now() + kLooked).time_since_epoch().count();
  const std::lock_guard lock(mutex_);
  if (!was_watched)  // what was recorded is long over
    for (auto& ring : recent_) std::fill(ring.begin(), ring.end(), -1);
  const size_t n = n_layer_ * n_expert_;
  Picture out{.n_tokens = n_tokens_, .uses = std::vector<uint8_t>(n), .last = std::vector<bool>(n), .read = std::vector<bool>(n), .resident = resident_};
  for (size_t layer = 0; layer < n_layer_; ++layer) {
    const size_t latest = (next_[layer] + kWindow - 1) % kWindow;
    for (size_t i = 0; i < kWindow * n_used_; ++i) {
      if (recent_[layer][i] < 0) continue;
      const size_t cell = layer * n_expert_ + static_cast<size_t>(recent_[layer][i]);
      ++out.uses[cell];
      if (i / n_used_ != latest) continue;
      out.last[cell] = true;
      out.read[cell] = read_[cell];
    }
  }
  return out;
}

}  // namespace duet::server
