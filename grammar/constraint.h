// Holds a generation to a grammar: which tokens of a vocabulary may come next.
#pragma once

#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "grammar/grammar.h"
#include "grammar/matcher.h"
#include "grammar/token_trie.h"

namespace duet::grammar {

// What a text must be, for one vocabulary. Immutable; any number of generations follow it.
struct Constraint {
  const TokenTrie* vocabulary = nullptr;
  std::optional<Grammar> grammar = {};    // of the text; none: any text
  // A control token that opens another text: at any time where there is no grammar, else before all text.
  std::optional<Token> trigger = {};
  std::optional<Grammar> triggered = {};  // of that text, to the end
};

// One generation. The constraint must outlive it.
class ConstraintState {
 public:
  // at_text_start: the text is an answer of its own (see TextStream).
  ConstraintState(const Constraint& constraint, bool at_text_start);

  // Logits of tokens that may not come next become -infinity; with `ends` end-of-generation tokens may come where
  // the text may end. Error(unsupported): the vocabulary has no token to go on with, or the grammar is too ambiguous.
  void apply(std::span<float> logits, bool ends);
  void accept(Token token);  // one that apply() has left
  // Whether the text is complete and nothing can be added.
  bool complete() const { return matcher_ && matcher_->may_end(state_) && !matcher_->may_go_on(state_); }

 private:
  using Mask = std::vector<uint64_t>;  // a bit for each token
  void follow(const Grammar& grammar);
  Mask mask();
  Mask make_mask();
  void walk(size_t first, size_t last, bool dropped, Mask& mask);
  void limit_memory();

  const Constraint& constraint_;
  std::optional<Matcher> matcher_;  // none: any token
  Matcher::State state_ = Matcher::kDead;
  bool at_start_, untouched_ = true;
  std::vector<Matcher::State> path_;  // scratch: by depth
  std::unordered_map<Matcher::State, Mask> masks_;
  size_t max_bytes_;  // before what is not needed is forgotten
};

}  // namespace duet::grammar
