#include "converters/knapsack.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace duet {
namespace {

constexpr uint64_t kUnits = 100000;

using Options = std::vector<SizedOption>;

size_t smallest(const Options& options) {
  size_t best = 0;
  for (size_t i = 1; i < options.size(); ++i) {
    const SizedOption &a = options[i], &b = options[best];
    if (a.n_bytes < b.n_bytes || (a.n_bytes == b.n_bytes && a.cost < b.cost)) best = i;
  }
  return best;
}

// By dynamic programming: best[u] is the least cost of the items so far within u units above their smallest options.
class Table {
 public:
  Table(std::span<const Options> items, uint64_t spare_bytes)
      : items_(items), unit_(spare_bytes / kUnits + 1), n_(spare_bytes / unit_ + 1), best_(n_, 0.0) {}

  std::vector<size_t> solve() {
    for (const Options& options : items_) add(options);
    std::vector<size_t> chosen(items_.size());
    size_t left = n_ - 1;
    for (size_t i = items_.size(); i-- > 0;) {
      chosen[i] = choice_[i][left];
      left -= units(items_[i], chosen[i]);
    }
    return chosen;
  }

 private:
  size_t units(const Options& options, size_t option) const {
    const uint64_t above = options[option].n_bytes - options[smallest(options)].n_bytes;
    return static_cast<size_t>((above + unit_ - 1) / unit_);
  }

  void add(const Options& options) {
    DUET_ASSERT(!options.empty() && options.size() < 256);
    std::vector<double> next(n_, std::numeric_limits<double>::infinity());
    std::vector<uint8_t>& choice = choice_.emplace_back(n_, uint8_t{0});
    for (size_t o = 0; o < options.size(); ++o) {
      const size_t need = units(options, o);
      for (size_t u = need; u < n_; ++u) {
        const double cost = best_[u - need] + options[o].cost;
        if (!(cost < next[u])) continue;
        next[u] = cost;
        choice[u] = static_cast<uint8_t>(o);
      }
    }
    best_ = std::move(next);
  }

  std::span<const Options> items_;
  uint64_t unit_;
  size_t n_;
  std::vector<double> best_;
  std::vector<std::vector<uint8_t>> choice_;
};

uint64_t total_bytes(std::span<const Options> items, const std::vector<size_t>& chosen) {
  uint64_t sum = 0;
  for (size_t i = 0; i < items.size(); ++i) sum += items[i][chosen[i]].n_bytes;
  return sum;
}

// What rounding has left over goes to the change that gains most per byte, as long as there is one.
void fill(std::span<const Options> items, uint64_t spare, std::vector<size_t>& chosen) {
  for (;;) {
    double best_rate = 0;
    size_t best_item = 0, best_option = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      const SizedOption now = items[i][chosen[i]];
      for (size_t o = 0; o < items[i].size(); ++o) {
        const SizedOption& other = items[i][o];
        if (other.n_bytes > now.n_bytes + spare || !(other.cost < now.cost)) continue;
        const double more = other.n_bytes > now.n_bytes ? static_cast<double>(other.n_bytes - now.n_bytes) : 0.5;
        if (const double rate = (now.cost - other.cost) / more; rate > best_rate) {
          best_rate = rate;
          best_item = i;
          best_option = o;
        }
      }
    }
    if (best_rate == 0) return;
    spare += items[best_item][chosen[best_item]].n_bytes;
    spare -= items[best_item][best_option].n_bytes;
    chosen[best_item] = best_option;
  }
}

}  // namespace

std::vector<size_t> choose_options(std::span<const Options> items, uint64_t budget_bytes) {
  uint64_t least = 0;
  for (const Options& options : items) least += options[smallest(options)].n_bytes;
  if (least > budget_bytes) return {};
  std::vector<size_t> chosen = Table(items, budget_bytes - least).solve();
  fill(items, budget_bytes - total_bytes(items, chosen), chosen);
  return chosen;
}

}  // namespace duet
