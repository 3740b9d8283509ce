#include "runtime/python_json.h"

#include <array>
#include <charconv>
#include <cmath>
#include <unordered_map>
#include <vector>

#include "runtime/unicode.h"

namespace duet {
namespace {

constexpr int kMaxDepth = 64;

struct NotJson {};

// repr() of a Python float: the shortest digits that read back the same, plain from 1e-4 to 1e16.
std::string python_float(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  std::array<char, 64> buffer;
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                    std::chars_format::scientific);
  std::string digits(buffer.data(), result.ptr);
  const size_t e = digits.find('e');
  const int exponent = std::stoi(digits.substr(e + 1));
  if (exponent < -4 || exponent >= 16) {  // as to_chars: at least two digits and a sign
    return digits;
  }
  const auto plain =
      std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::fixed);
  std::string out(buffer.data(), plain.ptr);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

void append_escaped(std::string& out, std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\b':
        out += "\\b";
        break;
      default:
        if (byte >= 0x20) {
          out += c;
        } else {
          out += "\\u00";
          out += kHex[byte >> 4];
          out += kHex[byte & 15];
        }
    }
  }
  out += '"';
}

class Rewriter {
 public:
  explicit Rewriter(std::string_view text) : rest_(text) {}

  std::string document() {
    std::string out = value(0);
    skip_space();
    if (!rest_.empty()) throw NotJson{};
    return out;
  }

 private:
  void skip_space() {
    while (!rest_.empty() && std::string_view(" \t\n\r").find(rest_[0]) != std::string_view::npos)
      rest_.remove_prefix(1);
  }
  bool take(std::string_view word) {
    if (!rest_.starts_with(word)) return false;
    rest_.remove_prefix(word.size());
    return true;
  }
  char peek() const { return rest_.empty() ? '\0' : rest_[0]; }

  std::string value(int depth) {
    if (depth > kMaxDepth) throw NotJson{};
    skip_space();
    for (const std::string_view word : {"null", "true", "false", "NaN", "Infinity", "-Infinity"})
      if (take(word)) return std::string(word);
    if (take("{")) return object(depth);
    if (take("[")) return array(depth);
    if (take("\"")) return literal(string());
    return number();
  }

  static std::string literal(const std::string& text) {
    std::string out;
    append_escaped(out, text);
    return out;
  }

  std::string object(int depth) {
    std::vector<std::pair<std::string, std::string>> members;
    std::unordered_map<std::string, size_t> place;
    skip_space();
    while (!take("}")) {
      skip_space();
      if (!take("\"")) throw NotJson{};
      std::string key = string();
      skip_space();
      if (!take(":")) throw NotJson{};
      std::string text = value(depth + 1);
      const auto [at, is_new] = place.try_emplace(key, members.size());
      if (is_new)
        members.emplace_back(std::move(key), std::move(text));
      else
        members[at->second].second = std::move(text);
      if (after_element('}')) break;
    }
    std::string out = "{";
    for (const auto& [key, text] : members) {
      if (out.size() > 1) out += ", ";
      append_escaped(out, key);
      out += ": " + text;
    }
    return out + "}";
  }

  std::string array(int depth) {
    std::string out = "[";
    skip_space();
    while (!take("]")) {
      if (out.size() > 1) out += ", ";
      out += value(depth + 1);
      if (after_element(']')) break;
    }
    return out + "]";
  }

  // After an element: true at the closing bracket; else past a comma that something must follow.
  bool after_element(char close) {
    skip_space();
    if (take({&close, 1})) return true;
    if (!take(",")) throw NotJson{};
    skip_space();
    if (peek() == close) throw NotJson{};
    return false;
  }

  std::string string() {
    std::string out;
    while (!rest_.empty() && rest_[0] != '"') {
      if (static_cast<unsigned char>(rest_[0]) < 0x20) throw NotJson{};
      if (take("\\")) {
        append_escape(out);
        continue;
      }
      out += rest_[0];
      rest_.remove_prefix(1);
    }
    if (!take("\"")) throw NotJson{};
    return sanitize_utf8(out);
  }

  void append_escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (c == '\0') throw NotJson{};
    rest_.remove_prefix(1);
    if (c == 'u') return append_utf8(out, unicode_escape());
    const size_t at = kNames.find(c);
    if (at == std::string_view::npos) throw NotJson{};
    out += kMeanings[at];
  }

  // Behind "\u"; a pair of surrogates is one character, a lone one cannot be written as UTF-8.
  char32_t unicode_escape() {
    const char32_t first = hex4();
    if (first < 0xD800 || first > 0xDFFF) return first;
    const std::string_view before = rest_;
    if (first < 0xDC00 && take("\\u")) {
      const char32_t second = hex4();
      if (second >= 0xDC00 && second <= 0xDFFF)
        return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
    }
    rest_ = before;
    return 0xFFFD;
  }

  char32_t hex4() {
    uint32_t out = 0;
    if (rest_.size() < 4) throw NotJson{};
    const auto result = std::from_chars(rest_.data(), rest_.data() + 4, out, 16);
    if (result.ptr != rest_.data() + 4) throw NotJson{};
    rest_.remove_prefix(4);
    return out;
  }

  size_t count_digits(size_t at) const {
    size_t n = 0;
    while (at + n < rest_.size() && rest_[at + n] >= '0' && rest_[at + n] <= '9') ++n;
    return n;
  }

  // -?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?
  std::string number() {
    const size_t sign = peek() == '-' ? 1 : 0;
    size_t n_digits = count_digits(sign);
    if (n_digits == 0) throw NotJson{};
    if (rest_[sign] == '0') n_digits = 1;  // what follows a leading zero is left over, and refused
    size_t end = sign + n_digits;
    const size_t integer_end = end;
    if (end < rest_.size() && rest_[end] == '.' && count_digits(end + 1) > 0)
      end += 1 + count_digits(end + 1);
    if (end < rest_.size() && (rest_[end] == 'e' || rest_[end] == 'E')) {
      const size_t after =
          end + 1 < rest_.size() && (rest_[end + 1] == '-' || rest_[end + 1] == '+') ? end + 2
                                                                                     : end + 1;
      if (count_digits(after) > 0) end = after + count_digits(after);
    }
    const std::string text(rest_.substr(0, end));
    rest_.remove_prefix(end);
    if (end == integer_end) return text == "-0" ? "0" : text;
    return python_float(to_double(text));
  }

  static double to_double(const std::string& text) {
    double out = 0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), out);
    if (result.ec != std::errc::result_out_of_range) return out;
    return std::strtod(text.c_str(), nullptr);  // rounds to 0 or infinity, as Python does
  }

  std::string_view rest_;
};

}  // namespace

std::optional<std::string> python_json(std::string_view text) {
  try {
    return Rewriter(text).document();
  } catch (const NotJson&) {
    return std::nullopt;
  }
}

std::string python_json_string(std::string_view text) {
  std::string out;
  append_escaped(out, sanitize_utf8(text));
  return out;
}

}  // namespace duet
