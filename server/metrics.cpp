#include "server/metrics.h"

#include <algorithm>

#include "base/error.h"

namespace duet::server {

void Histogram::add(double seconds) {
  const auto bucket = std::lower_bound(kBounds.begin(), kBounds.end(), seconds) - kBounds.begin();
  counts_[static_cast<size_t>(bucket)].fetch_add(1, std::memory_order_relaxed);
  sum_us_.fetch_add(static_cast<uint64_t>(std::max(seconds, 0.0) * 1e6), std::memory_order_relaxed);
}

std::string Histogram::text(const char* name, const char* help) const {
  std::string out = concat("# HELP ", name, " ", help, "\n# TYPE ", name, " histogram\n");
  uint64_t sum = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    sum += counts_[i].load(std::memory_order_relaxed);
    out += i < kBounds.size() ? concat(name, "_bucket{le=\"", kBounds[i], "\"} ", sum, "\n") : concat(name, "_bucket{le=\"+Inf\"} ", sum, "\n");
  }
  return out + concat(name, "_sum ", static_cast<double>(sum_us_.load(std::memory_order_relaxed)) / 1e6, "\n", name, "_count ", sum, "\n");
}

}  // namespace duet::server
