#include "grammar/char_set.h"

#include <algorithm>

namespace duet::grammar {
namespace {

constexpr char32_t kLast = 0x10FFFF;

size_t utf8_size(char32_t c) { return c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4; }

std::array<uint8_t, 4> encode(char32_t c, size_t n) {
  constexpr uint8_t kLead[] = {0, 0, 0xC0, 0xE0, 0xF0};
  std::array<uint8_t, 4> out{};
  for (size_t i = n; i-- > 1; c >>= 6) out[i] = static_cast<uint8_t>(0x80 | (c & 0x3F));
  out[0] = static_cast<uint8_t>(kLead[n] | c);
  return out;
}

// Splits [first, last] until each part is a product of byte ranges: all but one byte either equal in both ends
// or going through all continuations.
void split(char32_t first, char32_t last, std::vector<ByteRanges>& out) {
  for (const char32_t border : {char32_t{0x7F}, char32_t{0x7FF}, char32_t{0xFFFF}})
    if (first <= border && last > border) {
      split(first, border, out);
      split(static_cast<char32_t>(border + 1), last, out);
      return;
    }
  const size_t n = utf8_size(first);
  for (size_t i = 1; i < n; ++i) {
    const char32_t low = (char32_t{1} << (6 * i)) - 1;  // bits of the last i bytes
    if ((first & ~low) == (last & ~low)) continue;
    if ((first & low) != 0) {
      split(first, first | low, out);
      split((first | low) + 1, last, out);
      return;
    }
    if ((last & low) != low) {
      split(first, (last & ~low) - 1, out);
      split(last & ~low, last, out);
      return;
    }
  }
  const auto a = encode(first, n), b = encode(last, n);
  ByteRanges ranges;
  ranges.n = n;
  for (size_t i = 0; i < n; ++i) ranges.bytes[i] = {a[i], b[i]};
  out.push_back(ranges);
}

}  // namespace

void CharSet::add(char32_t first, char32_t last) {
  constexpr char32_t kSurrogates = 0xD800, kAfter = 0xE000;
  last = std::min(last, kLast);
  if (first < kAfter && last >= kSurrogates) {
    if (first < kSurrogates) add(first, kSurrogates - 1);
    if (last >= kAfter) add(kAfter, last);
    return;
  }
  if (first > last) return;
  const bool in_order = ranges_.empty() || first > ranges_.back().second;
  ranges_.emplace_back(first, last);
  if (!in_order) merge();
}

void CharSet::add(const CharSet& other) {
  ranges_.insert(ranges_.end(), other.ranges_.begin(), other.ranges_.end());
  merge();
}

void CharSet::merge() {
  std::sort(ranges_.begin(), ranges_.end());
  std::vector<std::pair<char32_t, char32_t>> merged;
  for (const auto& range : ranges_) {
    if (!merged.empty() && range.first <= merged.back().second + 1) merged.back().second = std::max(merged.back().second, range.second);
    else merged.push_back(range);
  }
  ranges_ = std::move(merged);
}

CharSet CharSet::of(std::vector<std::pair<char32_t, char32_t>> ranges) {
  std::sort(ranges.begin(), ranges.end());
  CharSet out;
  for (auto [first, last] : ranges) {
    // Only what lies behind all before: add() then appends.
    if (!out.ranges_.empty()) first = std::max<char32_t>(first, out.ranges_.back().second + 1);
    if (first <= last) out.add(first, last);
  }
  out.merge();
  return out;
}

CharSet CharSet::complement() const {
  CharSet out;
  char32_t next = 0;
  for (const auto& [first, last] : ranges_) {
    if (first > next) out.add(next, first - 1);
    next = last + 1;
  }
  if (next <= kLast) out.add(next, kLast);
  return out;
}

CharSet CharSet::without(const CharSet& other) const {
  CharSet rest = complement();
  rest.add(other);
  return rest.complement();
}

bool CharSet::contains(char32_t c) const {
  return std::any_of(ranges_.begin(), ranges_.end(), [&](const auto& r) { return r.first <= c && c <= r.second; });
}

std::vector<ByteRanges> utf8_ranges(const CharSet& set) {
  std::vector<ByteRanges> out;
  for (const auto& [first, last] : set.ranges()) split(first, last, out);
  return out;
}

}  // namespace duet::grammar
