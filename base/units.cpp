#include "base/units.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "base/error.h"

namespace duet {
namespace {

// 0 when the suffix is unknown. K, KiB are powers of 1024, KB of 1000.
double unit_factor(std::string_view suffix) {
  if (suffix.empty() || suffix == "b" || suffix == "B") return 1;
  constexpr std::string_view kPrefixes = "KMGT";
  const auto upper = static_cast<char>(suffix[0] & ~0x20);
  const size_t power = kPrefixes.find(upper);
  if (power == std::string_view::npos) return 0;
  const std::string_view rest = suffix.substr(1);
  const double exponent = static_cast<double>(power + 1);
  if (rest.empty() || rest == "iB" || rest == "ib" || rest == "i")
    return std::pow(1024.0, exponent);
  if (rest == "B" || rest == "b") return std::pow(1000.0, exponent);
  return 0;
}

}  // namespace

uint64_t parse_size(std::string_view text) {
  double number = 0;
  const auto [end, code] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  std::string_view suffix = text.substr(static_cast<size_t>(end - text.data()));
  while (!suffix.empty() && suffix.front() == ' ') suffix.remove_prefix(1);
  const double value = number * unit_factor(suffix);
  if (code != std::errc{} || !(number >= 0) || unit_factor(suffix) == 0 || value > 9e18)
    fail(ErrorKind::usage, "'", text,
         "' is not a size: write it like 12GiB, 12G, 500MB or 1048576");
  return static_cast<uint64_t>(value);
}

std::string format_size(uint64_t n_bytes) {
  constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(n_bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text.data();
}

std::string format_duration(double seconds) {
  // An estimate may be anything: NaN counts as 0, and 1e9 s keeps the text short.
  const long long total = seconds > 0 ? std::llround(std::min(seconds, 1e9)) : 0;
  std::array<char, 32> text{};
  const long long h = total / 3600, m = total / 60 % 60, s = total % 60;
  if (h > 0)
    std::snprintf(text.data(), text.size(), "%lld:%02lld:%02lld", h, m, s);
  else
    std::snprintf(text.data(), text.size(), "%lld:%02lld", m, s);
  return text.data();
}

}  // namespace duet
