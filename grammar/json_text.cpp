#include "grammar/json_text.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "base/error.h"

namespace duet::grammar {
namespace {

const char* const kByteOf255 = R"(("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9] | [0-9]))";
const char* const kDate =
    R"(([0-9]{4} "-" ("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01]) )"
    R"(| [0-9]{4} "-" ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") )"
    R"(| [0-9]{4} "-02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]) )"
    R"(| ([0-9]{2} ("0" [48] | [2468] [048] | [13579] [26]) | ("0" [48] | [2468] [048] | [13579] [26]) "00") "-02-29"))";
const char* const kTime = R"((([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])))";
const char* const kLabel = R"([a-zA-Z0-9] ([a-zA-Z0-9-]{0,20} [a-zA-Z0-9])?)";

std::string make_format(std::string_view format) {
  const std::string byte = kByteOf255, label = kLabel, hostname = concat(label, " (\".\" ", label, "){0,4}");
  if (format == "date") return kDate;
  if (format == "time") return kTime;
  if (format == "date-time") return concat(kDate, " \"T\" ", kTime);
  if (format == "duration") return R"("P" ([0-9]{1,4} [YMWD] | ([0-9]{1,4} "D")? "T" ([0-9]{1,4} "H" ([0-9]{1,4} "M" ([0-9]{1,4} "S")?)? | [0-9]{1,4} "M" ([0-9]{1,4} "S")? | [0-9]{1,4} "S")))";
  if (format == "uuid") return R"([0-9a-fA-F]{8} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{12})";
  if (format == "ipv4") return concat(byte, " (\".\" ", byte, "){3}");
  if (format == "ipv6") return R"([0-9a-f]{1,4} (":" [0-9a-f]{1,4}){7})";
  if (format == "hostname") return hostname;
  if (format == "email") return concat(R"([a-zA-Z0-9_+-]{1,20} ("." [a-zA-Z0-9_+-]{1,20}){0,3} "@" )", label, " (\".\" ", label, "){0,2} \".\" [a-zA-Z]{2,8}");
  if (format == "uri") return concat(R"("http" "s"? "://" )", hostname, R"( ("/" [a-zA-Z0-9._~-]{0,40}){0,8})");
  return {};
}

void append_class_char(std::string& out, char32_t c) {
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), "\\U%08X", static_cast<unsigned>(c));
  out += text.data();
}

}  // namespace

std::string gbnf_literal(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n') out += "\\n";
    else if (c == '\r') out += "\\r";
    else out += c;
  }
  return out + "\"";
}

std::string gbnf_class(const CharSet& set) {
  std::string out = "[";
  for (const auto& [first, last] : set.ranges()) {
    append_class_char(out, first);
    if (last == first) continue;
    out += '-';
    append_class_char(out, last);
  }
  return out + "]";
}

std::string json_char(const CharSet& set) {
  CharSet special(0, 0x1F);
  special.add(U'"', U'"');
  special.add(U'\\', U'\\');
  std::string out;
  if (const CharSet plain = set.without(special); !plain.empty()) out = gbnf_class(plain);
  for (const auto& [first, last] : special.ranges())
    for (char32_t c = first; c <= last; ++c) {
      if (!set.contains(c)) continue;
      constexpr std::string_view kShort = "btn\0fr";  // from U+0008
      std::array<char, 8> escaped{'\\', static_cast<char>(c)};
      if (c >= 8 && c < 14 && c != 11) escaped[1] = kShort[c - 8];
      else if (c < 0x20) std::snprintf(escaped.data(), escaped.size(), "\\u%04X", static_cast<unsigned>(c));
      out += (out.empty() ? "" : " | ") + gbnf_literal(escaped.data());
    }
  return out.find(" | ") == std::string::npos ? out : "(" + out + ")";
}

std::string_view format_to_gbnf(std::string_view format) {
  static constexpr std::array<std::string_view, 10> kNames = {"date", "time", "date-time", "duration", "uuid", "ipv4", "ipv6", "hostname", "email", "uri"};
  static const std::array<std::string, kNames.size()> kTexts = [] {
    std::array<std::string, kNames.size()> out;
    for (size_t i = 0; i < kNames.size(); ++i) out[i] = make_format(kNames[i]);
    return out;
  }();
  const auto found = std::find(kNames.begin(), kNames.end(), format);
  return found == kNames.end() ? std::string_view() : kTexts[static_cast<size_t>(found - kNames.begin())];
}

}  // namespace duet::grammar
