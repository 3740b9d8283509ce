// Follows texts through a grammar, byte by byte: which bytes may come next, whether the text may end.
//
// All ways of reading a text are followed at once. A place in the grammar is a state of an automaton and the
// calls that are open, kept as a graph: calls of one rule at one place of the text are one node, so that their
// number grows with the text, never with the number of ways (Tomita 1985; Scott and Johnstone 2010). Nodes and
// sets of places that are alike are one and the same, so equal situations have equal numbers (Matcher::State),
// whatever text led to them, and steps between them are remembered.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "grammar/grammar.h"

namespace duet::grammar {

struct MatcherLimits {
  size_t max_work = size_t{1} << 22;    // places looked at between calls of allow_work()
  size_t max_places = size_t{1} << 16;  // at once
};

// One thread at a time. The grammar must outlive it.
class Matcher {
 public:
  using State = uint32_t;
  static constexpr State kDead = 0;  // no text goes on from here, nor may it end

  explicit Matcher(const Grammar& grammar, const MatcherLimits& limits = {});

  State start() const { return start_; }
  // Error(unsupported) when a limit is reached: the grammar is too ambiguous.
  State next(State state, uint8_t byte) {
    const uint32_t known = steps_[size_t{state} * n_classes_ + classes_[byte]];
    return known != kUnknown ? known : find_next(state, byte);
  }
  bool may_end(State state) const { return sets_[state].may_end; }
  bool may_go_on(State state) const { return sets_[state].n > 0; }

  void allow_work() { work_ = 0; }
  size_t bytes() const;  // of what is remembered, about
  // Forgets all but `state`; returns its new number. All other numbers become invalid.
  State forget(State state);

 private:
  static constexpr uint32_t kUnknown = UINT32_MAX;
  // A state of an automaton, and what is to happen at the end of its rule: node.
  struct Place {
    uint32_t state, node;
    bool operator==(const Place&) const = default;
    auto operator<=>(const Place&) const = default;
  };
  // A range of edges_ or places_.
  struct Node {
    size_t first, n;
  };
  struct Set {
    size_t first, n;
    bool may_end;
  };
  // As the state to return to: the text may end.
  static constexpr uint32_t kAccept = UINT32_MAX - 1;

  State find_next(State state, uint8_t byte);
  void begin_step();
  void visit(Place place);
  bool first_seen(Place place);
  void grow_seen();
  void look_at(Place place);
  void visit_all();
  void follow_calls();
  void call(uint32_t rule, Place back);
  uint32_t intern_node(std::vector<Place>& edges);  // sorts them
  State intern_set();
  State make_start();
  void clear();
  void spend(size_t n);

  const Grammar& grammar_;
  MatcherLimits limits_;
  std::array<uint8_t, 256> classes_;
  size_t n_classes_, work_ = 0;
  std::vector<Place> edges_, places_;
  std::vector<Node> nodes_;
  std::vector<Set> sets_;        // by State
  std::vector<uint32_t> steps_;  // [state][class of byte]
  std::unordered_multimap<size_t, uint32_t> nodes_by_hash_, sets_by_hash_;
  State start_ = kDead;

  // Of the step at hand.
  std::vector<Place> to_visit_, found_;
  std::vector<Place> seen_;                // open addressing
  std::vector<uint32_t> seen_in_;          // step in which a slot was filled
  uint32_t step_ = 0;
  size_t n_seen_ = 0;
  std::vector<std::vector<Place>> calls_;  // by rule: where they return to
  std::vector<uint32_t> called_;           // ranks of rules with calls, a heap: callers first
  std::vector<uint32_t> ranks_;            // by rule: position in callers_first()
  bool may_end_ = false;
};

}  // namespace duet::grammar
