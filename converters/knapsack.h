// Which option each of several items gets so that all together fit a size and cost least.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace duet {

struct SizedOption {
  uint64_t n_bytes;
  double cost;  // finite
};

// Index of the option of each item: at most budget_bytes in all, the sum of costs as small as sizes rounded up to a
// hundred-thousandth of what is to be shared out allow, then whatever still fits and costs less. The same result
// wherever it runs. Empty when the smallest options are too large already.
std::vector<size_t> choose_options(std::span<const std::vector<SizedOption>> items, uint64_t budget_bytes);

}  // namespace duet
