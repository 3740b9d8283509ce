#include "grammar/number_range.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace duet::grammar {
namespace {

constexpr size_t kDigits = 16;                // of what has no bound
constexpr uint64_t kMost = 9999999999999999;  // so many digits
constexpr size_t kMaxFraction = 30;

using Text = std::optional<std::string>;  // an expression; nothing: no number fits

// "(a | b | c)" of those that there are.
Text any_of(const std::vector<Text>& parts) {
  std::string out;
  for (const Text& part : parts)
    if (part) out += (out.empty() ? "" : " | ") + (part->empty() ? "\"\"" : *part);
  return out.empty() ? Text() : "(" + out + ")";
}

Text after(const std::string& first, const Text& rest) { return rest ? Text(first + " " + *rest) : Text(); }

std::string digit(char low, char high) { return low == high ? concat("\"", low, "\"") : concat("[", low, "-", high, "]"); }
std::string digits(size_t least, size_t most) { return concat("[0-9]{", least, ",", most, "}"); }
std::string literal(const std::string& text) { return "\"" + text + "\""; }

// Digit strings of one length between two of it.
std::string same_length(std::string_view low, std::string_view high) {
  if (low.empty()) return "\"\"";
  const size_t rest = low.size() - 1;
  const bool all = low.find_first_not_of('0') == low.npos && high.find_first_not_of('9') == high.npos;
  if (all) return digits(low.size(), low.size());
  if (low[0] == high[0]) return digit(low[0], low[0]) + " " + same_length(low.substr(1), high.substr(1));
  std::vector<Text> parts{digit(low[0], low[0]) + " " + same_length(low.substr(1), std::string(rest, '9'))};
  if (high[0] - low[0] > 1) parts.push_back(digit(static_cast<char>(low[0] + 1), static_cast<char>(high[0] - 1)) + " " + digits(rest, rest));
  parts.push_back(digit(high[0], high[0]) + " " + same_length(std::string(rest, '0'), high.substr(1)));
  return *any_of(parts);
}

Text natural_range(uint64_t low, uint64_t high) {
  if (low > high) return std::nullopt;
  const std::string first = std::to_string(low), last = std::to_string(high);
  if (first.size() == last.size()) return "(" + same_length(first, last) + ")";
  std::vector<Text> parts{same_length(first, std::string(first.size(), '9'))};
  if (last.size() > first.size() + 1) parts.push_back("[1-9] " + digits(first.size(), last.size() - 2));
  parts.push_back(same_length("1" + std::string(last.size() - 1, '0'), last));
  return any_of(parts);
}

using Digits = std::optional<std::string_view>;
Digits rest_of(const Digits& digits_left) { return digits_left && !digits_left->empty() ? Digits(digits_left->substr(1)) : digits_left; }
char first_of(const Digits& digits_left, char fallback) { return !digits_left ? fallback : digits_left->empty() ? '0' : (*digits_left)[0]; }

struct FractionBounds {
  bool low_exclusive, high_exclusive;
};

// How a fraction can go on whose digits so far are those of the bounds that are left (nothing: this side is
// decided); each bound's remaining digits without zeros at the end.
Text fraction(const Digits& low, const Digits& high, const FractionBounds& bounds, bool at_point) {
  if (!low && !high) return digits(at_point ? 1 : 0, kDigits);
  if (low && low->empty() && !high)
    return bounds.low_exclusive ? "\"0\"{0,15} [1-9] " + digits(0, kDigits) : digits(at_point ? 1 : 0, kDigits);
  if (high && high->empty()) {
    const bool fits = !bounds.high_exclusive && (!low || (low->empty() && !bounds.low_exclusive));
    return fits ? Text(concat("\"0\"{", at_point ? 1 : 0, ",", kDigits, "}")) : std::nullopt;
  }
  std::vector<Text> parts;
  const bool may_stop = !at_point && (!low || (low->empty() && !bounds.low_exclusive));
  if (may_stop) parts.emplace_back("\"\"");
  const char a = first_of(low, '0'), b = first_of(high, '9');
  if (low && high && a == b) {
    parts.push_back(after(digit(a, a), fraction(rest_of(low), rest_of(high), bounds, false)));
    return any_of(parts);
  }
  if (low) parts.push_back(after(digit(a, a), fraction(rest_of(low), std::nullopt, bounds, false)));
  if (high) parts.push_back(after(digit(b, b), fraction(std::nullopt, rest_of(high), bounds, false)));
  const int from = low ? a + 1 : '0', to = high ? b - 1 : '9';
  if (from <= to) parts.push_back(digit(static_cast<char>(from), static_cast<char>(to)) + " " + digits(0, kDigits - 1));
  return any_of(parts);
}

bool is_zero(const Decimal& d) { return d.integer == 0 && d.fraction.empty(); }

// -1, 0, 1 of magnitudes.
int compare(const Decimal& a, const Decimal& b) {
  if (a.integer != b.integer) return a.integer < b.integer ? -1 : 1;
  return a.fraction.compare(b.fraction) < 0 ? -1 : a.fraction == b.fraction ? 0 : 1;
}

struct Magnitudes {
  Bound low;
  std::optional<Bound> high;
};

// Splits a range at zero: what is to follow a minus sign, and what stands alone.
struct Signed {
  std::optional<Magnitudes> negative, positive;
};

Signed by_sign(const std::optional<Bound>& low, const std::optional<Bound>& high) {
  Signed out;
  const auto positive_of = [](Bound bound) {
    bound.value.negative = false;
    return bound;
  };
  if (!low || low->value.negative) {
    Magnitudes m{{}, std::nullopt};
    if (low) m.high = positive_of(*low);
    if (high && high->value.negative) m.low = positive_of(*high);
    else m.low.exclusive = true;  // no "-0"
    out.negative = m;
  }
  if (!high || !high->value.negative) {
    Magnitudes m{{}, std::nullopt};
    if (high) m.high = positive_of(*high);
    if (low && !low->value.negative) m.low = *low;
    out.positive = m;
  }
  return out;
}

Text whole_numbers(const Magnitudes& m) {
  uint64_t low = m.low.value.integer, high = m.high ? m.high->value.integer : std::max(kMost, m.low.value.integer);
  if (!m.low.value.fraction.empty() || m.low.exclusive) ++low;
  if (m.high && m.high->exclusive && m.high->value.fraction.empty()) {
    if (high == 0) return std::nullopt;
    --high;
  }
  return natural_range(low, high);
}

Text decimals(const Magnitudes& m) {
  const Bound& low = m.low;
  if (m.high) {
    const int order = compare(low.value, m.high->value);
    if (order > 0 || (order == 0 && (low.exclusive || m.high->exclusive))) return std::nullopt;
  }
  const FractionBounds bounds{low.exclusive, m.high && m.high->exclusive};
  const auto with_fraction = [&](uint64_t integer, const Digits& least, const Digits& most) {
    // Without a point the fraction is zero.
    const bool zero_fits = (!least || (least->empty() && !bounds.low_exclusive)) && (!most || !most->empty() || !bounds.high_exclusive);
    const Text more = after("\".\"", fraction(least, most, bounds, true));
    return after(literal(std::to_string(integer)), any_of({zero_fits ? Text("") : std::nullopt, more}));
  };
  const uint64_t first = low.value.integer;
  if (m.high && m.high->value.integer == first) return with_fraction(first, low.value.fraction, m.high->value.fraction);
  std::vector<Text> parts{with_fraction(first, low.value.fraction, std::nullopt)};
  const uint64_t last = m.high ? m.high->value.integer - 1 : std::max(kMost, first + 1);
  if (const Text between = natural_range(first + 1, last)) parts.push_back(*between + " (\".\" " + digits(1, kDigits) + ")?");
  if (m.high) parts.push_back(with_fraction(m.high->value.integer, std::nullopt, m.high->value.fraction));
  return any_of(parts);
}

Text signed_range(const std::optional<Bound>& low, const std::optional<Bound>& high, Text (*range)(const Magnitudes&)) {
  const Signed parts = by_sign(low, high);
  return any_of({parts.negative ? after("\"-\"", range(*parts.negative)) : std::nullopt, parts.positive ? range(*parts.positive) : std::nullopt});
}

}  // namespace

std::optional<Decimal> parse_decimal(const std::string& text) {
  const size_t e = text.find_first_of("eE");
  std::string mantissa = text.substr(0, e);
  Decimal out;
  if (mantissa.starts_with('-')) {
    out.negative = true;
    mantissa.erase(0, 1);
  }
  const size_t point = std::min(mantissa.find('.'), mantissa.size());
  std::string all = mantissa.substr(0, point) + (point < mantissa.size() ? mantissa.substr(point + 1) : "");
  const int exponent = e == std::string::npos ? 0 : std::clamp(std::atoi(text.c_str() + e + 1), -1000, 1000);
  if (all.size() > 60 || all.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  int place = static_cast<int>(point) + exponent;  // digits before the point
  if (place < 0) {
    all.insert(0, static_cast<size_t>(-place), '0');
    place = 0;
  }
  if (static_cast<size_t>(place) > all.size()) all.append(static_cast<size_t>(place) - all.size(), '0');
  std::string integer = all.substr(0, static_cast<size_t>(place));
  integer.erase(0, std::min(integer.find_first_not_of('0'), integer.size()));
  out.fraction = all.substr(static_cast<size_t>(place));
  out.fraction.erase(out.fraction.find_last_not_of('0') + 1);
  if (integer.size() > 18 || out.fraction.size() > kMaxFraction) return std::nullopt;
  for (const char c : integer) out.integer = out.integer * 10 + static_cast<uint64_t>(c - '0');
  if (is_zero(out)) out.negative = false;
  return out;
}

std::optional<std::string> integer_range(const std::optional<Bound>& low, const std::optional<Bound>& high) { return signed_range(low, high, whole_numbers); }
std::optional<std::string> decimal_range(const std::optional<Bound>& low, const std::optional<Bound>& high) { return signed_range(low, high, decimals); }

}  // namespace duet::grammar
