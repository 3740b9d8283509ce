// Sets of Unicode characters.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace duet::grammar {

// Ranges of code points, ascending, disjoint; never a surrogate.
class CharSet {
 public:
  CharSet() = default;
  CharSet(char32_t first, char32_t last) { add(first, last); }
  static CharSet of(std::vector<std::pair<char32_t, char32_t>> ranges);  // in any order, overlapping
  void add(char32_t first, char32_t last);
  void add(const CharSet& other);
  CharSet complement() const;
  CharSet without(const CharSet& other) const;
  bool contains(char32_t c) const;
  bool empty() const { return ranges_.empty(); }
  const std::vector<std::pair<char32_t, char32_t>>& ranges() const { return ranges_; }

 private:
  void merge();
  std::vector<std::pair<char32_t, char32_t>> ranges_;
};

// One to four ranges of bytes, each byte of its own range: the UTF-8 forms of a block of characters.
struct ByteRanges {
  std::array<std::pair<uint8_t, uint8_t>, 4> bytes{};
  size_t n = 0;
};
// The UTF-8 forms of a set, disjoint.
std::vector<ByteRanges> utf8_ranges(const CharSet& set);

}  // namespace duet::grammar
