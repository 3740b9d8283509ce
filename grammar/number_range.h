// Grammars of JSON numbers within bounds.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace duet::grammar {

// A decimal number as digits: value = -1 ^ negative * integer.fraction.
struct Decimal {
  bool negative = false;
  uint64_t integer = 0;       // below 10^18
  std::string fraction = {};  // digits, no zeros at the end
};
// Of a number as JSON writes it ("-1.5e-3"); nothing when it has too many digits.
std::optional<Decimal> parse_decimal(const std::string& text);

struct Bound {
  Decimal value;
  bool exclusive = false;
};

// An expression in GBNF for the integers, or all decimal numbers without exponent, between two bounds; nothing
// when there are none. Unbounded sides end at 16 digits, fractions too.
std::optional<std::string> integer_range(const std::optional<Bound>& low, const std::optional<Bound>& high);
std::optional<std::string> decimal_range(const std::optional<Bound>& low, const std::optional<Bound>& high);

}  // namespace duet::grammar
