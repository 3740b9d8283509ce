#include <algorithm>
#include <tuple>
#include <unordered_map>

#include "base/error.h"
#include "grammar/syntax.h"
#include "runtime/unicode.h"

namespace duet::grammar {
namespace {

bool is_name_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

class GbnfParser {
 public:
  GbnfParser(std::string_view text, const GrammarLimits& limits) : text_(text), limits_(limits) {}

  Syntax parse() {
    if (text_.size() > limits_.max_bytes) fail(ErrorKind::format, "grammar: ", text_.size(), " bytes; at most ", limits_.max_bytes, " are taken");
    for (skip(true); at_ < text_.size(); skip(true)) rule();
    for (const Syntax::Rule& rule : out_.rules)
      if (!rule.defined) fail(ErrorKind::format, "grammar: line ", rule.line, ": there is no rule ", quote(rule.name));
    return std::move(out_);
  }

 private:
  using Type = SyntaxNode::Type;

  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(ErrorKind::format, "grammar: line ", line_, ": ", parts...);
  }

  char peek(size_t n = 0) const { return at_ + n < text_.size() ? text_[at_ + n] : '\0'; }
  bool at_end() const { return at_ >= text_.size(); }
  bool take(std::string_view expected) {
    if (!text_.substr(at_).starts_with(expected)) return false;
    at_ += expected.size();
    return true;
  }

  // Spaces and comments, lines too where they mean nothing.
  void skip(bool lines) {
    for (; !at_end(); ++at_) {
      if (peek() == '#') at_ = std::min(text_.find('\n', at_), text_.size());
      if (at_end()) return;
      const bool line_break = peek() == '\n' || peek() == '\r';
      if (!(peek() == ' ' || peek() == '\t' || (lines && line_break))) return;
      if (peek() == '\n') ++line_;
    }
  }

  std::string name() {
    const size_t begin = at_;
    while (is_name_char(peek())) ++at_;
    if (at_ == begin) bad("a rule's name is expected", at_end() ? std::string(" at the end") : concat(", not ", quote(text_.substr(at_, 1))));
    return std::string(text_.substr(begin, at_ - begin));
  }

  uint32_t rule_index(const std::string& rule) {
    const auto [entry, is_new] = by_name_.try_emplace(rule, static_cast<uint32_t>(out_.rules.size()));
    if (is_new) out_.rules.push_back({rule, line_});
    return entry->second;
  }

  uint32_t add(SyntaxNode node) {
    out_.nodes.push_back(std::move(node));
    return static_cast<uint32_t>(out_.nodes.size() - 1);
  }

  void rule() {
    const uint32_t index = rule_index(name());
    skip(false);
    if (!take("::=")) bad("'::=' is expected after ", quote(out_.rules[index].name));
    if (out_.rules[index].defined) bad("the rule ", quote(out_.rules[index].name), " is defined twice");
    out_.rules[index].line = line_;
    skip_to_body();
    const uint32_t body = choice(0);
    out_.rules[index].body = body;
    out_.rules[index].defined = true;
    if (!at_end() && peek() != '\n' && peek() != '\r') bad("unexpected ", quote(text_.substr(at_, 1)));
  }

  // It may begin in a later line, unless that begins the next rule: then there is none.
  void skip_to_body() {
    const size_t at = at_, line = line_;
    skip(true);
    if (!at_end() && !defines_rule()) return;
    at_ = at;
    line_ = line;
  }

  // In a group, and before a '|', line breaks mean nothing.
  uint32_t choice(size_t depth) {
    if (depth > limits_.max_depth) bad("groups are nested deeper than ", limits_.max_depth);
    SyntaxNode out{.type = Type::choice};
    for (;;) {
      out.children.push_back(sequence(depth));
      const size_t at = at_, line = line_;
      skip(true);
      if (take("|")) {
        skip(true);
        continue;
      }
      if (depth == 0) {
        at_ = at;
        line_ = line;
      }
      break;
    }
    return out.children.size() == 1 ? out.children[0] : add(std::move(out));
  }

  uint32_t sequence(size_t depth) {
    SyntaxNode out{.type = Type::sequence};
    for (skip(depth > 0); !at_end(); skip(depth > 0)) {
      if (peek() == '"') out.children.push_back(literal());
      else if (peek() == '[') out.children.push_back(char_class());
      else if (peek() == '.') out.children.push_back(any_char());
      else if (peek() == '(') out.children.push_back(group(depth));
      else if (is_name_char(peek()) && !defines_rule()) out.children.push_back(reference());
      else break;
      n_repetitions_ = 0;
      for (skip(depth > 0); repetition(out.children.back()); skip(depth > 0)) continue;
    }
    return add(std::move(out));
  }

  // A name that begins the next rule: in a group that was not closed.
  bool defines_rule() const {
    size_t at = at_;
    while (at < text_.size() && is_name_char(text_[at])) ++at;
    while (at < text_.size() && (text_[at] == ' ' || text_[at] == '\t')) ++at;
    return text_.substr(at).starts_with("::=");
  }

  uint32_t group(size_t depth) {
    const size_t opened = line_;
    ++at_;
    const uint32_t inner = choice(depth + 1);
    if (!take(")")) bad("the group opened in line ", opened, " is not closed");
    return inner;
  }

  uint32_t reference() { return add({.type = Type::reference, .rule = rule_index(name())}); }

  uint32_t any_char() {
    ++at_;
    return add({.type = Type::chars, .chars = CharSet(0, 0x10FFFF)});
  }

  uint32_t literal() {
    ++at_;
    SyntaxNode out{.type = Type::literal};
    while (peek() != '"') append_utf8(out.text, character("literal"));
    ++at_;
    return add(std::move(out));
  }

  uint32_t char_class() {
    ++at_;
    const bool negated = take("^");
    std::vector<std::pair<char32_t, char32_t>> ranges;
    while (peek() != ']') {
      const char32_t first = character("class");
      char32_t last = first;
      if (peek() == '-' && peek(1) != ']') {
        ++at_;
        last = character("class");
      }
      if (last < first) bad("a range of characters runs backwards");
      ranges.emplace_back(first, last);
    }
    ++at_;
    CharSet set = CharSet::of(std::move(ranges));
    if (negated) set = set.complement();
    if (set.empty()) bad("a class of characters holds none");
    return add({.type = Type::chars, .chars = std::move(set)});
  }

  char32_t character(const char* where) {
    if (at_end() || peek() == '\n') bad("a ", where, " is not closed");
    if (peek() == '\\') return escaped();
    const Utf8Char c = decode_utf8(text_.substr(at_));
    if (!c.valid) bad("invalid UTF-8");
    at_ += c.n_bytes;
    return c.cp;
  }

  char32_t escaped() {
    const char c = peek(1);
    at_ += 2;
    switch (c) {
      case 'n': return '\n';
      case 'r': return '\r';
      case 't': return '\t';
      case 'x': return hex(2);
      case 'u': return hex(4);
      case 'U': return hex(8);
      case '\\': case '"': case '[': case ']': case '^': case '-': case '/': return static_cast<char32_t>(c);
      default: bad("unknown escape ", quote(text_.substr(std::min(at_ - 2, text_.size()), 2)));
    }
  }

  char32_t hex(size_t n) {
    char32_t out = 0;
    for (; n > 0; --n, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) bad("an escape lacks hexadecimal digits");
      out = out << 4 | static_cast<char32_t>(digit);
    }
    if (out > 0x10FFFF || (out >= 0xD800 && out < 0xE000)) bad("an escape that is no character");
    return out;
  }

  bool repetition(uint32_t& node) {
    uint32_t least = 0, most = SyntaxNode::kNoLimit;
    if (take("+")) least = 1;
    else if (take("?")) most = 1;
    else if (take("{")) std::tie(least, most) = bounds();
    else if (!take("*")) return false;
    if (++n_repetitions_ > 8) bad("a repetition of a repetition of ...");
    node = add({.type = Type::repeat, .children = {node}, .least = least, .most = most});
    return true;
  }

  std::pair<uint32_t, uint32_t> bounds() {
    skip(true);
    const uint32_t least = number();
    uint32_t most = least;
    skip(true);
    if (take(",")) {
      skip(true);
      most = peek() == '}' ? SyntaxNode::kNoLimit : number();
    }
    skip(true);
    if (!take("}")) bad("a repetition {m}, {m,} or {m,n} is not closed");
    if (most < least) bad("a repetition {", least, ",", most, "} runs backwards");
    return {least, most};
  }

  uint32_t number() {
    const size_t begin = at_;
    uint32_t out = 0;
    for (; peek() >= '0' && peek() <= '9'; ++at_) {
      out = out * 10 + static_cast<uint32_t>(peek() - '0');
      if (out > limits_.max_states) bad("a repetition of more than ", limits_.max_states);
    }
    if (at_ == begin) bad("a repetition lacks its number");
    return out;
  }

  std::string_view text_;
  const GrammarLimits& limits_;
  size_t at_ = 0, line_ = 1, n_repetitions_ = 0;
  Syntax out_;
  std::unordered_map<std::string, uint32_t> by_name_;
};

}  // namespace

Syntax parse_gbnf(std::string_view text, const GrammarLimits& limits) { return GbnfParser(text, limits).parse(); }

}  // namespace duet::grammar
