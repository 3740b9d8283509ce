#include <algorithm>

#include "base/error.h"
#include "grammar/json_text.h"
#include "runtime/unicode.h"

namespace duet::grammar {
namespace {

constexpr size_t kMaxPattern = 4096, kMaxDepth = 30, kMaxTimes = 100000;

// Classes that are told by what they lack offer no control characters: nobody means them.
CharSet without_controls(const CharSet& set) { return set.without(CharSet(0, 0x1F)); }

class PatternReader {
 public:
  explicit PatternReader(std::string_view pattern) : text_(pattern) {}

  std::string read() {
    if (text_.size() > kMaxPattern) bad("more than ", kMaxPattern, " bytes");
    const std::string out = alternatives(0);
    if (at_ < text_.size()) bad("unbalanced ')'");
    return out;
  }

 private:
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(ErrorKind::unsupported, "the pattern ", quote(text_), " cannot be used: ", parts...);
  }
  bool at_end() const { return at_ >= text_.size(); }
  char peek(size_t n = 0) const { return at_ + n < text_.size() ? text_[at_ + n] : '\0'; }
  bool take(std::string_view expected) {
    if (!text_.substr(at_).starts_with(expected)) return false;
    at_ += expected.size();
    return true;
  }

  std::string alternatives(size_t depth) {
    if (depth > kMaxDepth) bad("groups are nested too deep");
    std::string out = sequence(depth);
    if (peek() != '|') return out;
    while (take("|")) out += " | " + sequence(depth);
    return "(" + out + ")";
  }

  // Without anchors a pattern may match anywhere in the text.
  std::string sequence(size_t depth) {
    const std::string any = json_char(without_controls(CharSet(0, 0x10FFFF))) + "*";
    const bool from_start = depth == 0 && take("^");
    std::string out = depth > 0 || from_start ? "" : any;
    bool to_end = false;
    while (!at_end() && peek() != '|' && peek() != ')') {
      if (depth == 0 && peek() == '$' && (at_ + 1 == text_.size() || peek(1) == '|')) {
        ++at_;
        to_end = true;
        break;
      }
      out += (out.empty() ? "" : " ") + repeated(atom(depth));
    }
    if (depth == 0 && !to_end) out += (out.empty() ? "" : " ") + any;
    return out.empty() ? "\"\"" : out;
  }

  std::string repeated(std::string part) {
    std::string times;
    if (peek() == '*' || peek() == '+' || peek() == '?') times = text_[at_++];
    else if (peek() == '{' && peek(1) >= '0' && peek(1) <= '9') times = bounds();
    else return part;
    if (peek() == '?') ++at_;  // a lazy repetition matches the same texts
    if (peek() == '*' || peek() == '+' || peek() == '?' || peek() == '{') bad("a repetition of a repetition");
    return part + times;
  }

  std::string bounds() {
    const size_t end = text_.find('}', at_);
    if (end == std::string_view::npos) bad("a repetition is not closed");
    const std::string_view out = text_.substr(at_, end + 1 - at_);
    ++at_;
    const size_t least = number();
    const bool open = take(",") && peek() == '}';
    const size_t most = open ? kMaxTimes : text_[at_ - 1] == ',' ? number() : least;
    if (at_ != end) bad("a repetition ", quote(out));
    if (least > kMaxTimes || most > kMaxTimes) bad("a repetition ", quote(out), "; at most ", kMaxTimes, " times");
    if (most < least) bad("a repetition ", quote(out), " that runs backwards");
    at_ = end + 1;
    return std::string(out);
  }

  size_t number() {
    size_t out = 0;
    for (; peek() >= '0' && peek() <= '9'; ++at_) out = std::min(out * 10 + static_cast<size_t>(peek() - '0'), kMaxTimes + 1);
    return out;
  }

  std::string atom(size_t depth) {
    if (peek() == '(') return group(depth);
    if (peek() == '[') return json_char(char_class());
    if (take(".")) return json_char(without_controls(line_separators().complement()));
    if (peek() == '\\') {
      bool is_set = false;
      const CharSet set = escape(is_set);
      return json_char(set);
    }
    if (peek() == '^' || peek() == '$') bad("'", peek(), "' other than at its ends");
    if (peek() == '*' || peek() == '+' || peek() == '?') bad("'", peek(), "' has nothing to repeat");
    return json_char(one_char());
  }

  std::string group(size_t depth) {
    ++at_;
    if (take("?<")) {
      if (peek() == '=' || peek() == '!') bad("it looks behind");
      at_ = std::min(text_.find('>', at_), text_.size() - 1) + 1;  // a name
    } else if (peek() == '?' && !take("?:")) {
      bad("'(?", peek(1), "'");
    }
    const std::string inner = alternatives(depth + 1);
    if (!take(")")) bad("a group is not closed");
    return "(" + inner + ")";
  }

  CharSet one_char() {
    const Utf8Char c = decode_utf8(text_.substr(at_));
    at_ += c.n_bytes;
    return {c.cp, c.cp};
  }

  CharSet char_class() {
    ++at_;
    const bool negated = take("^");
    CharSet out;
    while (peek() != ']') {
      if (at_end()) bad("a class is not closed");
      bool is_set = false;
      CharSet first = peek() == '\\' ? escape(is_set) : one_char();
      if (!is_set && peek() == '-' && peek(1) != ']' && peek(1) != '\0') {
        ++at_;
        const CharSet last = peek() == '\\' ? escape(is_set) : one_char();
        if (is_set || first.empty() || last.empty() || last.ranges()[0].first < first.ranges()[0].first) bad("a range of characters in a class");
        first = CharSet(first.ranges()[0].first, last.ranges()[0].first);
      }
      out.add(first);
    }
    ++at_;
    if (negated) out = without_controls(out.complement());
    if (out.empty()) bad("a class holds no character");
    return out;
  }

  // is_set: a class, as \d.
  CharSet escape(bool& is_set) {
    ++at_;
    if (at_end()) bad("it ends with '\\'");
    const char c = text_[at_++];
    is_set = true;
    switch (c) {
      case 'd': return digits();
      case 'D': return without_controls(digits().complement());
      case 'w': return word();
      case 'W': return without_controls(word().complement());
      case 's': return space();
      case 'S': return without_controls(space().complement());
      default: break;
    }
    is_set = false;
    switch (c) {
      case 'n': return {'\n', '\n'};
      case 'r': return {'\r', '\r'};
      case 't': return {'\t', '\t'};
      case 'f': return {'\f', '\f'};
      case 'v': return {'\v', '\v'};
      case 'x': return hex(2);
      case 'u': return hex(4);
      default: break;
    }
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (letter) bad("'\\", c, "'");
    --at_;
    return one_char();
  }

  CharSet hex(size_t n) {
    char32_t value = 0;
    for (; n > 0; --n, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) bad("an escape lacks hexadecimal digits");
      value = value << 4 | static_cast<char32_t>(digit);
    }
    const CharSet out(value, value);
    if (out.empty()) bad("half a surrogate pair");
    return out;
  }

  static CharSet digits() { return {U'0', U'9'}; }
  static CharSet word() { return CharSet::of({{U'a', U'z'}, {U'A', U'Z'}, {U'0', U'9'}, {U'_', U'_'}}); }
  static CharSet space() {
    return CharSet::of({{U' ', U' '}, {U'\t', U'\r'}, {0xA0, 0xA0}, {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}, {0xFEFF, 0xFEFF}});
  }
  static CharSet line_separators() { return {0x2028, 0x2029}; }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

std::string pattern_to_gbnf(std::string_view pattern) { return PatternReader(pattern).read(); }

}  // namespace duet::grammar
