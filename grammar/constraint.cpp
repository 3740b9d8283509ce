#include "grammar/constraint.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "base/error.h"

namespace duet::grammar {
namespace {

// Of what is remembered of a generation; of what has to be.
constexpr size_t kMaxBytes = size_t{16} << 20, kMaxNeeded = size_t{64} << 20;
constexpr size_t kBits = 64;

void set(std::vector<uint64_t>& mask, Token token) { mask[static_cast<size_t>(token) / kBits] |= uint64_t{1} << static_cast<size_t>(token) % kBits; }

void exclude(std::span<float> logits, const std::vector<uint64_t>& mask) {
  for (size_t word = 0; word < mask.size(); ++word)
    for (uint64_t out = ~mask[word]; out != 0; out &= out - 1) {
      const size_t token = word * kBits + static_cast<size_t>(std::countr_zero(out));
      if (token >= logits.size()) break;
      logits[token] = -std::numeric_limits<float>::infinity();
    }
}

}  // namespace

ConstraintState::ConstraintState(const Constraint& constraint, bool at_text_start)
    : constraint_(constraint), at_start_(at_text_start), path_(constraint.vocabulary->max_depth() + 1), max_bytes_(kMaxBytes) {
  if (constraint.grammar) follow(*constraint.grammar);
}

void ConstraintState::follow(const Grammar& grammar) {
  masks_.clear();
  matcher_.emplace(grammar);
  state_ = matcher_->start();
}

void ConstraintState::apply(std::span<float> logits, bool ends) {
  if (!matcher_) return;
  matcher_->allow_work();
  Mask allowed = mask();
  allowed.resize((logits.size() + kBits - 1) / kBits);
  if (ends && matcher_->may_end(state_))
    for (const Token token : constraint_.vocabulary->ends()) set(allowed, token);
  if (untouched_ && constraint_.trigger) set(allowed, *constraint_.trigger);
  if (std::all_of(allowed.begin(), allowed.end(), [](uint64_t word) { return word == 0; }))
    fail(ErrorKind::unsupported, "the grammar asks for text that no token of this model's vocabulary can write");
  exclude(logits, allowed);
}

void ConstraintState::accept(Token token) {
  if (token == constraint_.trigger && constraint_.triggered) {
    follow(*constraint_.triggered);
    untouched_ = false;
    return;
  }
  std::string_view text = constraint_.vocabulary->text(token);
  if (text.empty()) return;
  if (at_start_ && constraint_.vocabulary->drops_space(token)) text.remove_prefix(1);
  at_start_ = untouched_ = false;
  if (!matcher_) return;
  matcher_->allow_work();
  for (const char c : text) state_ = matcher_->next(state_, static_cast<uint8_t>(c));
  if (state_ == Matcher::kDead) fail(ErrorKind::internal, "a token that the grammar does not allow was chosen");
  limit_memory();
}

ConstraintState::Mask ConstraintState::mask() {
  if (at_start_) return make_mask();
  const auto known = masks_.find(state_);
  if (known != masks_.end()) return known->second;
  return masks_.emplace(state_, make_mask()).first->second;
}

ConstraintState::Mask ConstraintState::make_mask() {
  const TokenTrie& trie = *constraint_.vocabulary;
  Mask mask((trie.n_vocab() + kBits - 1) / kBits);
  path_[0] = state_;
  walk(0, trie.nodes().size(), false, mask);
  if (!at_start_) return mask;
  for (size_t i = 0; i < trie.nodes().size(); i = trie.nodes()[i].skip) {
    if (trie.nodes()[i].byte != ' ') continue;
    path_[1] = state_;
    walk(i + 1, trie.nodes()[i].skip, true, mask);
  }
  return mask;
}

// Marks the tokens between two nodes that can be followed to their end. At the start of a text those whose
// space is dropped are followed from behind it.
void ConstraintState::walk(size_t first, size_t last, bool dropped, Mask& mask) {
  const TokenTrie& trie = *constraint_.vocabulary;
  const std::span<const TokenTrie::Node> nodes = trie.nodes();
  for (size_t i = first; i < last;) {
    const TokenTrie::Node& node = nodes[i];
    const Matcher::State state = matcher_->next(path_[node.depth], node.byte);
    if (state == Matcher::kDead) {
      i = node.skip;
      continue;
    }
    path_[node.depth + size_t{1}] = state;
    for (const Token token : trie.tokens_of(i))
      if (!at_start_ || trie.drops_space(token) == dropped) set(mask, token);
    ++i;
  }
}

void ConstraintState::limit_memory() {
  const size_t n_words = (constraint_.vocabulary->n_vocab() + kBits - 1) / kBits;
  if (matcher_->bytes() + masks_.size() * n_words * sizeof(uint64_t) < max_bytes_) return;
  state_ = matcher_->forget(state_);
  masks_.clear();
  if (matcher_->bytes() > kMaxNeeded) fail(ErrorKind::unsupported, "the text is nested too deep for its grammar to be followed");
  max_bytes_ = std::max(kMaxBytes, 2 * matcher_->bytes());
}

}  // namespace duet::grammar
