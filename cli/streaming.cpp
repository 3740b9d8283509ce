#include "cli/streaming.h"

namespace duet::cli {

StreamUse stream_use(const StreamStats& before, const StreamStats& now, double n_tokens, double seconds, int n_threads) {
  const auto hits = static_cast<double>(now.hits - before.hits), misses = static_cast<double>(now.misses - before.misses);
  const auto bytes = static_cast<double>(now.reads.bytes - before.reads.bytes);
  const double waited = static_cast<double>(now.wait_ns - before.wait_ns) * 1e-9;
  return {.hit_rate = hits + misses > 0 ? hits / (hits + misses) : 1.0,
          .disk_bytes = bytes / n_tokens,
          .disk_bytes_per_s = bytes / seconds,
          .wait_share = waited / n_threads / seconds,
          .backend = now.backend};
}

}  // namespace duet::cli
