#include "grammar/grammar.h"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <unordered_map>

#include "base/error.h"
#include "grammar/syntax.h"

namespace duet::grammar {

// Writes automata from their ends: what follows a part is known when the part is written.
class Compiler {
 public:
  Compiler(const Syntax& syntax, const GrammarLimits& limits) : syntax_(syntax), limits_(limits) {}

  Grammar compile() {
    const auto root = std::find_if(syntax_.rules.begin(), syntax_.rules.end(), [](const Syntax::Rule& rule) { return rule.name == "root"; });
    if (root == syntax_.rules.end()) fail(ErrorKind::format, "grammar: there is no rule 'root', where texts begin");
    out_.root_ = static_cast<uint32_t>(root - syntax_.rules.begin());
    for (const Syntax::Rule& rule : syntax_.rules) {
      const uint32_t end = add({Grammar::Kind::end, Grammar::kNone, Grammar::kNone, 0});
      out_.rules_.push_back({.name = rule.name, .start = write(rule.body, end)});
    }
    check_ends();
    const std::vector<bool> empty = reach_end(false);
    for (Grammar::Rule& rule : out_.rules_) rule.nullable = empty[rule.start];
    order_rules();
    out_.classify_bytes();
    return std::move(out_);
  }

 private:
  using Kind = Grammar::Kind;
  using Type = SyntaxNode::Type;

  uint32_t add(Grammar::State state) {
    if (out_.states_.size() >= limits_.max_states)
      fail(ErrorKind::format, "grammar: larger than ", limits_.max_states, " states; long repetitions and classes of characters count once for each time");
    out_.states_.push_back(state);
    return static_cast<uint32_t>(out_.states_.size() - 1);
  }
  uint32_t split(uint32_t one, uint32_t other) { return add({Kind::split, one, other, 0}); }
  uint32_t read(const ByteSet& bytes, uint32_t next) { return add({Kind::bytes, next, Grammar::kNone, set_of(bytes)}); }

  uint32_t set_of(const ByteSet& bytes) {
    const auto [entry, is_new] = sets_.try_emplace(bytes, static_cast<uint32_t>(out_.sets_.size()));
    if (is_new) out_.sets_.push_back(bytes);
    return entry->second;
  }

  uint32_t write(uint32_t index, uint32_t next) {
    // Repetitions of nothing make no states and would go on for ever.
    if (++n_written_ > 4 * limits_.max_states) fail(ErrorKind::format, "grammar: its repetitions come to more than ", limits_.max_states, " states");
    const SyntaxNode& node = syntax_.nodes[index];
    switch (node.type) {
      case Type::literal: return write_literal(node.text, next);
      case Type::chars: return write_chars(node.chars, next);
      case Type::reference: return add({Kind::call, next, node.rule, 0});
      case Type::repeat: return write_repeat(node, next);
      case Type::sequence:
        for (size_t i = node.children.size(); i-- > 0;) next = write(node.children[i], next);
        return next;
      default: return write_choice(node, next);
    }
  }

  uint32_t write_literal(const std::string& text, uint32_t next) {
    for (size_t i = text.size(); i-- > 0;) next = read(ByteSet().set(static_cast<unsigned char>(text[i])), next);
    return next;
  }

  uint32_t write_choice(const SyntaxNode& node, uint32_t next) {
    std::vector<uint32_t> starts;
    for (const uint32_t child : node.children) starts.push_back(write(child, next));
    return any_of(starts);
  }

  uint32_t any_of(const std::vector<uint32_t>& starts) {
    uint32_t out = starts.back();
    for (size_t i = starts.size() - 1; i-- > 0;) out = split(starts[i], out);
    return out;
  }

  // Common ends of UTF-8 forms share their states, and first bytes with the same rest share one.
  uint32_t write_chars(const CharSet& chars, uint32_t next) {
    std::map<std::pair<std::pair<uint8_t, uint8_t>, uint32_t>, uint32_t> tails;
    std::map<uint32_t, ByteSet> firsts;  // by what follows
    for (const ByteRanges& form : utf8_ranges(chars)) {
      uint32_t rest = next;
      for (size_t i = form.n; i-- > 1;) {
        const auto [entry, is_new] = tails.try_emplace({form.bytes[i], rest}, 0);
        if (is_new) entry->second = read(byte_range(form.bytes[i]), rest);
        rest = entry->second;
      }
      firsts[rest] |= byte_range(form.bytes[0]);
    }
    std::vector<uint32_t> starts;
    for (const auto& [rest, bytes] : firsts) starts.push_back(read(bytes, rest));
    return any_of(starts);
  }

  static ByteSet byte_range(std::pair<uint8_t, uint8_t> range) {
    ByteSet out;
    for (size_t byte = range.first; byte <= range.second; ++byte) out.set(byte);
    return out;
  }

  uint32_t write_repeat(const SyntaxNode& node, uint32_t next) {
    const uint32_t child = node.children[0], end = next;
    if (node.most == SyntaxNode::kNoLimit) {
      const uint32_t loop = split(end, Grammar::kNone);
      const uint32_t again = write(child, loop);
      out_.states_[loop].other = again;
      next = loop;
    } else {
      for (uint32_t i = node.least; i < node.most; ++i) next = split(write(child, next), end);
    }
    for (uint32_t i = 0; i < node.least; ++i) next = write(child, next);
    return next;
  }

  // States from which the end of their rule can be reached; through_bytes: by any text, else by none.
  std::vector<bool> reach_end(bool through_bytes) const {
    const std::vector<Grammar::State>& states = out_.states_;
    std::vector<std::vector<uint32_t>> before(states.size()), calls(out_.rules_.size()), starts(states.size());
    for (uint32_t rule = 0; rule < out_.rules_.size(); ++rule) starts[out_.rules_[rule].start].push_back(rule);
    std::vector<uint32_t> work;
    for (uint32_t i = 0; i < states.size(); ++i) {
      const Grammar::State& s = states[i];
      if (s.kind == Kind::end) work.push_back(i);
      if (s.kind == Kind::call) calls[s.other].push_back(i);
      if (s.next != Grammar::kNone && (s.kind != Kind::bytes || through_bytes)) before[s.next].push_back(i);
      if (s.kind == Kind::split && s.other != Grammar::kNone) before[s.other].push_back(i);
    }
    std::vector<bool> good(states.size()), good_rule(out_.rules_.size());
    const auto reached = [&](uint32_t i) { return states[i].kind != Kind::call || (good_rule[states[i].other] && good[states[i].next]); };
    while (!work.empty()) {
      const uint32_t i = work.back();
      work.pop_back();
      if (good[i] || !reached(i)) continue;
      good[i] = true;
      work.insert(work.end(), before[i].begin(), before[i].end());
      for (const uint32_t rule : starts[i]) {
        good_rule[rule] = true;
        work.insert(work.end(), calls[rule].begin(), calls[rule].end());
      }
    }
    return good;
  }

  void check_ends() const {
    const std::vector<bool> ends = reach_end(true);
    for (size_t i = 0; i < out_.rules_.size(); ++i)
      if (!ends[out_.rules_[i].start])
        fail(ErrorKind::format, "grammar: line ", syntax_.rules[i].line, ": the rule ", quote(out_.rules_[i].name), " never ends: it always needs itself");
  }

  // Rules that `rule` may call before it has read a byte.
  std::vector<uint32_t> left_calls(uint32_t rule, std::vector<uint32_t>& seen) const {
    std::vector<uint32_t> out, work{out_.rules_[rule].start};
    while (!work.empty()) {
      const uint32_t i = work.back();
      work.pop_back();
      if (i == Grammar::kNone || seen[i] == rule) continue;
      seen[i] = rule;
      const Grammar::State& s = out_.states_[i];
      if (s.kind == Kind::call) out.push_back(s.other);
      if (s.kind == Kind::split || (s.kind == Kind::call && out_.rules_[s.other].nullable)) work.push_back(s.next);
      if (s.kind == Kind::split) work.push_back(s.other);
    }
    return out;
  }

  // Depth first; a rule that is met again while it is open calls itself on the left.
  void order_rules() {
    enum class Mark : uint8_t { fresh, open, done };
    struct Visit {
      uint32_t rule;
      std::vector<uint32_t> calls;
    };
    std::vector<uint32_t> seen(out_.states_.size(), Grammar::kNone);
    std::vector<Mark> marks(out_.rules_.size(), Mark::fresh);
    std::vector<Visit> stack;
    const auto open = [&](uint32_t rule) {
      marks[rule] = Mark::open;
      stack.push_back({rule, left_calls(rule, seen)});
    };
    for (uint32_t first = 0; first < marks.size(); ++first) {
      if (marks[first] == Mark::fresh) open(first);
      while (!stack.empty()) {
        Visit& visit = stack.back();
        if (visit.calls.empty()) {
          marks[visit.rule] = Mark::done;
          out_.callers_first_.push_back(visit.rule);
          stack.pop_back();
          continue;
        }
        const uint32_t called = visit.calls.back();
        visit.calls.pop_back();
        if (marks[called] == Mark::open)
          fail(ErrorKind::format, "grammar: line ", syntax_.rules[called].line, ": the rule ", quote(out_.rules_[called].name),
               " is left-recursive: it begins with itself; write a repetition instead");
        if (marks[called] == Mark::fresh) open(called);
      }
    }
    std::reverse(out_.callers_first_.begin(), out_.callers_first_.end());
  }

  const Syntax& syntax_;
  const GrammarLimits& limits_;
  size_t n_written_ = 0;
  Grammar out_;
  std::unordered_map<ByteSet, uint32_t> sets_;
};

Grammar Grammar::parse(std::string_view gbnf, const GrammarLimits& limits) {
  const Syntax syntax = parse_gbnf(gbnf, limits);
  return Compiler(syntax, limits).compile();
}

void Grammar::classify_bytes() {
  constexpr size_t kManySets = 2048;  // then each byte is taken as a class of its own
  size_t n = 1;
  std::array<size_t, 256> classes{};
  if (sets_.size() > kManySets) {
    for (size_t byte = 0; byte < 256; ++byte) classes_[byte] = static_cast<uint8_t>(byte);
    n_classes_ = 256;
    return;
  }
  for (const ByteSet& set : sets_) {
    std::map<std::pair<size_t, bool>, size_t> refined;
    for (size_t byte = 0; byte < 256; ++byte) classes[byte] = refined.try_emplace({classes[byte], set[byte]}, refined.size()).first->second;
    n = refined.size();
    if (n == 256) break;
  }
  for (size_t byte = 0; byte < 256; ++byte) classes_[byte] = static_cast<uint8_t>(classes[byte]);
  n_classes_ = n;
}

void Grammar::append(const Grammar& other) {
  const auto n_states = static_cast<uint32_t>(states_.size()), n_rules = static_cast<uint32_t>(rules_.size()), n_sets = static_cast<uint32_t>(sets_.size());
  for (State s : other.states_) {
    if (s.next != kNone) s.next += n_states;
    if (s.other != kNone) s.other += s.kind == Kind::call ? n_rules : n_states;
    s.set += n_sets;
    states_.push_back(s);
  }
  for (Rule rule : other.rules_) {
    rule.start += n_states;
    rules_.push_back(std::move(rule));
  }
  sets_.insert(sets_.end(), other.sets_.begin(), other.sets_.end());
  for (const uint32_t rule : other.callers_first_) callers_first_.push_back(rule + n_rules);
}

Grammar Grammar::either(const Grammar& one, const Grammar& other) {
  Grammar out;
  out.rules_.push_back({.name = "either", .start = 0, .nullable = one.rules_[one.root_].nullable || other.rules_[other.root_].nullable});
  out.callers_first_ = {0};
  const auto n_one = static_cast<uint32_t>(one.rules_.size());
  out.states_ = {{Kind::split, 1, 2, 0}, {Kind::call, 3, 1 + one.root_, 0}, {Kind::call, 3, 1 + n_one + other.root_, 0}, {Kind::end, kNone, kNone, 0}};
  out.append(one);
  out.append(other);
  out.classify_bytes();
  return out;
}

bool Grammar::is_tail(uint32_t state) const {
  while (states_[state].kind == Kind::split && states_[state].other == kNone) state = states_[state].next;
  return states_[state].kind == Kind::end;
}

}  // namespace duet::grammar
