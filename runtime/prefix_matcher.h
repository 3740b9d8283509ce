// Finds which of a set of names (user-defined or control tokens) a text begins with.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace duet {

// Longest match in O(length of the match * log n). Names over kMaxName bytes are never matched, so
// that no vocabulary makes matching quadratic in a large text.
class PrefixMatcher {
 public:
  static constexpr size_t kMaxName = 1024;
  struct Match {
    int32_t id = -1;  // -1: none
    size_t n_bytes = 0;
  };

  PrefixMatcher() = default;
  explicit PrefixMatcher(std::vector<std::pair<std::string, int32_t>> names) {
    for (auto& name : names)
      if (!name.first.empty() && name.first.size() <= kMaxName) names_.push_back(std::move(name));
    std::sort(names_.begin(), names_.end());
    for (size_t i = 0; i < names_.size(); ++i) {
      auto& range = by_first_byte_[static_cast<unsigned char>(names_[i].first[0])];
      if (range.second == 0) range.first = static_cast<uint32_t>(i);
      range.second = static_cast<uint32_t>(i + 1);
    }
  }

  bool empty() const { return names_.empty(); }

  // `text` is not empty.
  Match longest(std::string_view text) const {
    auto [first, last] = by_first_byte_[static_cast<unsigned char>(text[0])];
    Match best;
    for (size_t depth = 1; first < last; ++depth) {
      // names_[first, last) share text[0, depth); the one that ends here sorts first.
      if (names_[first].first.size() == depth) best = {names_[first].second, depth};
      if (depth == text.size()) break;
      const auto narrowed = narrow(first, last, depth, static_cast<unsigned char>(text[depth]));
      first = narrowed.first;
      last = narrowed.second;
    }
    return best;
  }

 private:
  std::pair<uint32_t, uint32_t> narrow(uint32_t first, uint32_t last, size_t depth,
                                       int wanted) const {
    const auto byte_of = [&](const auto& name) {
      return name.first.size() > depth
                 ? static_cast<int>(static_cast<unsigned char>(name.first[depth]))
                 : -1;
    };
    const auto begin = names_.begin() + first, end = names_.begin() + last;
    const auto low =
        std::partition_point(begin, end, [&](const auto& name) { return byte_of(name) < wanted; });
    const auto high =
        std::partition_point(low, end, [&](const auto& name) { return byte_of(name) <= wanted; });
    return {static_cast<uint32_t>(low - names_.begin()),
            static_cast<uint32_t>(high - names_.begin())};
  }

  std::vector<std::pair<std::string, int32_t>> names_;  // sorted bytewise
  std::array<std::pair<uint32_t, uint32_t>, 256> by_first_byte_{};
};

}  // namespace duet
