// Context-free grammars over UTF-8 bytes, in llama.cpp's notation (GBNF):
//
//   root ::= "yes" | "no" ("," [ \t]* reason)?     # rules, literals, alternatives, groups
//   reason ::= [^"\n]{1,80} | .                    # classes of characters, repetitions * + ? {m} {m,} {m,n}
//
// Compiled to one automaton per rule: states that read a byte of a set, go two ways, call another rule or end
// their own. Immutable.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace duet::grammar {

using ByteSet = std::bitset<256>;

struct GrammarLimits {
  size_t max_bytes = size_t{1} << 20;   // of the text
  size_t max_states = size_t{1} << 18;  // after repetitions have been written out
  size_t max_depth = 100;               // of groups
};

class Grammar {
 public:
  enum class Kind : uint8_t { bytes, split, call, end };
  struct State {
    Kind kind;
    // bytes: reads one of sets()[set], goes to next. split: goes to next and to other (kNone: to next only).
    // call: rule `other`, then next.
    uint32_t next, other, set;
  };
  struct Rule {
    std::string name;
    uint32_t start = 0;
    bool nullable = false;  // matches the empty text
  };
  static constexpr uint32_t kNone = UINT32_MAX;

  // Error(format) naming the line: bad syntax, a rule that is missing, defined twice, or never ends, left
  // recursion, too large. The rule "root" is where texts begin.
  static Grammar parse(std::string_view gbnf, const GrammarLimits& limits = {});

  // Texts of one or the other.
  static Grammar either(const Grammar& one, const Grammar& other);

  const std::vector<State>& states() const { return states_; }
  const std::vector<Rule>& rules() const { return rules_; }
  const std::vector<ByteSet>& sets() const { return sets_; }
  uint32_t root() const { return root_; }
  // Rules, each before those that it may call without having read a byte.
  const std::vector<uint32_t>& callers_first() const { return callers_first_; }
  // Whether only the end of the rule can follow, without a byte.
  bool is_tail(uint32_t state) const;
  // Bytes that all sets treat alike have the same class.
  const std::array<uint8_t, 256>& byte_classes() const { return classes_; }
  size_t n_classes() const { return n_classes_; }

 private:
  friend class Compiler;
  Grammar() = default;
  void append(const Grammar& other);
  void classify_bytes();
  std::vector<State> states_;
  std::vector<Rule> rules_;
  std::vector<ByteSet> sets_;
  std::vector<uint32_t> callers_first_;
  std::array<uint8_t, 256> classes_{};
  size_t n_classes_ = 0;
  uint32_t root_ = 0;
};

}  // namespace duet::grammar
