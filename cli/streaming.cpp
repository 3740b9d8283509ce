#include "cli/streaming.h"

namespace duet::cli {

StreamUse stream_use(const StreamStats& before, const StreamStats& now, double n_tokens, double seconds, int n_threads) {
  const auto hits = static_cast<double>(now.hits - before.hits), misses = static_cast<double>(now.misses - before.misses);
  const auto bytes = static_cast<double>(now.reads.bytes - before.reads.bytes);
  const double waited = static_cast<double>(now.wait_ns - before.wait_ns) * 1e-9;
  const auto guesses = static_cast<double>(now.guesses - before.guesses), good = static_cast<double>(now.good_guesses - before.good_guesses);
  return {.hit_rate = hits + misses > 0 ? hits / (hits + misses) : 1.0,
          .disk_bytes = bytes / n_tokens,
          .disk_bytes_per_s = bytes / seconds,
          .wait_share = waited / n_threads / seconds,
          .backend = now.backend,
          .read_bytes = now.reads.bytes - before.reads.bytes,
          .padding_bytes = now.padding_bytes - before.padding_bytes,
          .speculative_bytes = now.speculative_bytes - before.speculative_bytes,
          .wasted_bytes = now.wasted_bytes - before.wasted_bytes,
          .good_guesses = guesses > 0 ? std::optional(good / guesses) : std::nullopt};
}

}  // namespace duet::cli
