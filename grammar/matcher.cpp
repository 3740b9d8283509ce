#include "grammar/matcher.h"

#include <algorithm>
#include <functional>

#include "base/error.h"

namespace duet::grammar {
namespace {

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15;
  return hash ^ hash >> 29;
}

}  // namespace

Matcher::Matcher(const Grammar& grammar, const MatcherLimits& limits)
    : grammar_(grammar), limits_(limits), classes_(grammar.byte_classes()), n_classes_(grammar.n_classes()), seen_(64), seen_in_(64) {
  calls_.resize(grammar.rules().size());
  ranks_.resize(grammar.rules().size());
  for (uint32_t i = 0; i < ranks_.size(); ++i) ranks_[grammar.callers_first()[i]] = i;
  clear();
  start_ = make_start();
}

void Matcher::clear() {
  edges_.clear();
  places_.clear();
  nodes_.clear();
  sets_.assign(1, {0, 0, false});
  steps_.assign(n_classes_, kDead);
  nodes_by_hash_.clear();
  sets_by_hash_.clear();
}

Matcher::State Matcher::make_start() {
  begin_step();
  call(grammar_.root(), {kAccept, 0});
  follow_calls();
  return intern_set();
}

Matcher::State Matcher::find_next(State state, uint8_t byte) {
  begin_step();
  const Set from = sets_[state];
  spend(from.n);
  for (size_t i = from.first; i < from.first + from.n; ++i) {
    const Grammar::State& s = grammar_.states()[places_[i].state];
    if (grammar_.sets()[s.set][byte]) visit({s.next, places_[i].node});
  }
  visit_all();
  follow_calls();
  const State to = intern_set();
  steps_[size_t{state} * n_classes_ + classes_[byte]] = to;
  return to;
}

void Matcher::begin_step() {
  // What an exception may have left behind.
  for (const uint32_t rank : called_) calls_[grammar_.callers_first()[rank]].clear();
  called_.clear();
  to_visit_.clear();
  found_.clear();
  may_end_ = false;
  n_seen_ = 0;
  if (++step_ == 0) std::fill(seen_in_.begin(), seen_in_.end(), step_++);
}

void Matcher::spend(size_t n) {
  work_ += n;
  if (work_ > limits_.max_work) fail(ErrorKind::unsupported, "the grammar is too ambiguous or too large to be followed: a step took more than ", limits_.max_work, " operations");
}

bool Matcher::first_seen(Place place) {
  if (2 * ++n_seen_ > seen_.size()) grow_seen();
  const size_t mask = seen_.size() - 1;
  for (size_t slot = mix(mix(0, place.state), place.node) & mask;; slot = (slot + 1) & mask) {
    if (seen_in_[slot] != step_) {
      seen_in_[slot] = step_;
      seen_[slot] = place;
      return true;
    }
    if (seen_[slot] == place) return false;
  }
}

void Matcher::grow_seen() {
  std::vector<Place> old;
  for (size_t i = 0; i < seen_.size(); ++i)
    if (seen_in_[i] == step_) old.push_back(seen_[i]);
  seen_.assign(4 * seen_.size(), {});
  seen_in_.assign(seen_.size(), 0);
  step_ = 1;
  n_seen_ = 1;  // the one that is about to be added
  for (const Place& place : old) first_seen(place);
}

void Matcher::visit(Place place) {
  if (place.state != Grammar::kNone && first_seen(place)) to_visit_.push_back(place);
}

void Matcher::visit_all() {
  while (!to_visit_.empty()) {
    const Place place = to_visit_.back();
    to_visit_.pop_back();
    spend(1);
    look_at(place);
  }
}

void Matcher::look_at(Place place) {
  const Grammar::State& s = grammar_.states()[place.state];
  switch (s.kind) {
    case Grammar::Kind::bytes:
      found_.push_back(place);
      if (found_.size() > limits_.max_places) fail(ErrorKind::unsupported, "the grammar is too ambiguous: more than ", limits_.max_places, " ways to go on");
      return;
    case Grammar::Kind::split:
      visit({s.next, place.node});
      return visit({s.other, place.node});
    case Grammar::Kind::call:
      if (grammar_.rules()[s.other].nullable) visit({s.next, place.node});
      return call(s.other, {s.next, place.node});
    default:
      break;
  }
  const Node node = nodes_[place.node];
  spend(node.n);
  for (size_t i = node.first; i < node.first + node.n; ++i) {
    if (edges_[i].state == kAccept) may_end_ = true;
    else visit(edges_[i]);
  }
}

// A call at the end of a rule returns to where the rule itself returns: chains of such calls stay short.
void Matcher::call(uint32_t rule, Place back) {
  std::vector<Place>& backs = calls_[rule];
  if (backs.empty()) {
    called_.push_back(ranks_[rule]);
    std::push_heap(called_.begin(), called_.end(), std::greater<>());
  }
  if (back.state == kAccept || !grammar_.is_tail(back.state)) return backs.push_back(back);
  const Node node = nodes_[back.node];
  spend(node.n);
  backs.insert(backs.end(), edges_.begin() + static_cast<ptrdiff_t>(node.first), edges_.begin() + static_cast<ptrdiff_t>(node.first + node.n));
}

// Callers first: all calls of a rule are known when its node is made. (Rules that end without a byte have let
// their callers go on at once.)
void Matcher::follow_calls() {
  while (!called_.empty()) {
    const uint32_t rule = grammar_.callers_first()[called_.front()];
    const uint32_t node = intern_node(calls_[rule]);
    calls_[rule].clear();
    std::pop_heap(called_.begin(), called_.end(), std::greater<>());
    called_.pop_back();
    visit({grammar_.rules()[rule].start, node});
    visit_all();
  }
}

uint32_t Matcher::intern_node(std::vector<Place>& edges) {
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  uint64_t hash = edges.size();
  for (const Place& edge : edges) hash = mix(mix(hash, edge.state), edge.node);
  const auto [begin, end] = nodes_by_hash_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    const Node& node = nodes_[it->second];
    if (std::equal(edges.begin(), edges.end(), edges_.begin() + static_cast<ptrdiff_t>(node.first), edges_.begin() + static_cast<ptrdiff_t>(node.first + node.n)))
      return it->second;
  }
  const auto id = static_cast<uint32_t>(nodes_.size());
  nodes_.push_back({edges_.size(), edges.size()});
  edges_.insert(edges_.end(), edges.begin(), edges.end());
  nodes_by_hash_.emplace(hash, id);
  return id;
}

Matcher::State Matcher::intern_set() {
  if (found_.empty() && !may_end_) return kDead;
  std::sort(found_.begin(), found_.end());
  uint64_t hash = may_end_;
  for (const Place& place : found_) hash = mix(mix(hash, place.state), place.node);
  const auto [begin, end] = sets_by_hash_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    const Set& set = sets_[it->second];
    if (set.may_end == may_end_ && std::equal(found_.begin(), found_.end(), places_.begin() + static_cast<ptrdiff_t>(set.first), places_.begin() + static_cast<ptrdiff_t>(set.first + set.n)))
      return it->second;
  }
  const auto id = static_cast<State>(sets_.size());
  sets_.push_back({places_.size(), found_.size(), may_end_});
  places_.insert(places_.end(), found_.begin(), found_.end());
  steps_.resize(steps_.size() + n_classes_, kUnknown);
  sets_by_hash_.emplace(hash, id);
  return id;
}

size_t Matcher::bytes() const {
  constexpr size_t kEntry = 40;  // of a hash map
  return (edges_.size() + places_.size()) * sizeof(Place) + nodes_.size() * (sizeof(Node) + kEntry) + sets_.size() * (sizeof(Set) + kEntry) + steps_.size() * sizeof(uint32_t);
}

Matcher::State Matcher::forget(State state) {
  const std::vector<Place> old_edges = std::move(edges_), old_places = std::move(places_);
  const std::vector<Node> old_nodes = std::move(nodes_);
  const Set kept = sets_[state];
  clear();
  start_ = make_start();
  if (state == kDead) return kDead;
  // A node's edges lead to nodes made before it.
  std::vector<bool> wanted(old_nodes.size());
  for (size_t i = kept.first; i < kept.first + kept.n; ++i) wanted[old_places[i].node] = true;
  for (size_t id = old_nodes.size(); id-- > 0;) {
    if (!wanted[id]) continue;
    for (size_t i = old_nodes[id].first; i < old_nodes[id].first + old_nodes[id].n; ++i)
      if (old_edges[i].state != kAccept) wanted[old_edges[i].node] = true;
  }
  std::vector<uint32_t> renamed(old_nodes.size());
  std::vector<Place> edges;
  for (size_t id = 0; id < old_nodes.size(); ++id) {
    if (!wanted[id]) continue;
    edges.clear();
    for (size_t i = old_nodes[id].first; i < old_nodes[id].first + old_nodes[id].n; ++i)
      edges.push_back({old_edges[i].state, old_edges[i].state == kAccept ? 0 : renamed[old_edges[i].node]});
    renamed[id] = intern_node(edges);
  }
  begin_step();
  may_end_ = kept.may_end;
  for (size_t i = kept.first; i < kept.first + kept.n; ++i) found_.push_back({old_places[i].state, renamed[old_places[i].node]});
  return intern_set();
}

}  // namespace duet::grammar
