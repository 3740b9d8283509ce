// Speculative decoding without a second model ("prompt lookup", Saxena 2023): where the end of the
// sequence has stood before, what followed it then is proposed again, evaluated in one batch, and kept
// as far as the sampler chooses the same tokens. A token's logits do not depend on the batch it is
// evaluated in (ModelInfo::exact_batch), and the sampler sees them in the same order and draws the same
// random numbers, so the output is that of plain decoding, token for token.
//
// A batch costs more than a token, above all where it needs more experts, so SpeculationGate measures
// whether it pays.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "runtime/engine.h"

namespace duet {

inline constexpr size_t kMaxDraft = 16;

// Where the longest end of a sequence stood before, latest occurrence first. A few hash look-ups per
// token; memory is allocated once.
class PromptLookup {
 public:
  // Shorter matches than two tokens say little about what follows.
  static constexpr size_t kMinMatch = 2, kLongestGram = 4;

  explicit PromptLookup(size_t max_tokens);
  void push(Token token);
  size_t size() const { return tokens_.size(); }
  // Tokens at the end of the sequence that stood before; 0, or at least kMinMatch.
  size_t match_length() const { return match_; }
  // What followed them then, always n tokens: past the end of the sequence the proposal itself goes on,
  // as a repetition does. `draft` is left empty without a match.
  void propose(size_t n, std::vector<Token>& draft) const;

 private:
  size_t bucket(size_t n) const;
  bool ends_alike(size_t end, size_t n) const;
  void find(size_t at_least);

  std::vector<Token> tokens_;
  std::vector<uint32_t> ends_;  // by hash of an n-gram: position behind its latest occurrence; 0: none
  size_t next_ = 0, match_ = 0; // what followed the match begins at next_
};

// Decides how many tokens to propose from what steps have cost and brought. Whether a proposal would
// have been right is known after plain steps too, so only the cost of a batch needs trials: losses of
// trials are held to a small share of the time, and what was found not to pay is tried again now and
// then. Pure bookkeeping in seconds that the caller measures.
class SpeculationGate {
 public:
  explicit SpeculationGate(size_t max_draft);

  // Tokens to propose after a match of so many (PromptLookup; 0: nothing can be proposed), at most
  // `limit`. 0: a plain step.
  size_t choose(size_t match_length, size_t limit) const;
  // The same but for the plain steps that are due from time to time.
  size_t best(size_t match_length, size_t limit) const;

  struct Step {
    size_t match_length = 0;  // when it began; 0: there was nothing to propose
    size_t n_draft = 0;       // 0: a plain step
    size_t n_right = 0;       // of max(n_draft, 1) proposed tokens, how many were what came, from the first on
    double seconds = 0;
  };
  void record(const Step& step);

  // What is known of a number of proposed tokens.
  struct Length {
    size_t n_draft = 0;
    double cost = 0;  // time of such a step / time of a plain one; 0: never tried
    uint64_t steps = 0, last_step = 0;
    uint64_t recent = 0;  // steps that `cost` is the mean of; it is measured anew after a long time
  };
  std::span<const Length> lengths() const { return {lengths_.data(), n_lengths_}; }
  double plain_seconds() const { return plain_seconds_; }

 private:
  static constexpr size_t kClasses = 5;  // of match lengths
  static size_t class_of(size_t match_length);
  bool out_of_date(const Length& length) const;
  double expected_tokens(size_t match_length, size_t n_draft) const;
  void learn(const Step& step);

  std::array<Length, 6> lengths_{};
  size_t n_lengths_ = 0;
  std::array<double, kClasses> right_{}, seen_{};  // proposed tokens by length of match, recent ones weigh more
  double plain_seconds_ = 0;
  uint64_t n_steps_ = 0, n_plain_ = 0, last_plain_ = 0;
  double balance_ = 0;  // plain steps saved so far, with an allowance for trials
};

struct SpeculationOptions {
  size_t max_draft = 0;  // tokens proposed at once, at most kMaxDraft; 0: none
  bool gated = true;     // false: always max_draft, where there is something to propose
};

struct SpeculationStats {
  uint64_t steps = 0, tokens = 0;       // of all kinds; tokens that they gave
  uint64_t drafted = 0, accepted = 0;   // tokens
};

// Drives one session from token to token; from the first step on nothing else may change the session.
class Speculator {
 public:
  // Error(usage) for more than kMaxDraft tokens. Float weights allow fewer: max_draft().
  Speculator(const Engine& engine, const Session& session, const SpeculationOptions& options);

  size_t max_draft() const { return max_draft_; }
  bool gated() const { return gated_; }

  // The token after these logits, or nothing: then no more are wanted.
  using Take = std::function<std::optional<Token>(std::span<const float> logits)>;
  // Appends `last`, which a sampler has chosen, and hands the logits after it to `take`; goes on with
  // the logits after what `take` gave as long as that had been proposed. The session then holds the
  // sequence up to and without the latest token taken, also after an exception. Returns how many
  // tokens it has grown by, which is how often `take` was called: 1 to max(limit, 1).
  size_t step(Session& session, Token last, size_t limit, const Take& take);

  const SpeculationStats& stats() const { return stats_; }
  const SpeculationGate& gate() const { return gate_; }

 private:
  size_t draft_length(const Session& session, size_t limit) const;
  void verify(Session& session, const Take& take);

  size_t max_draft_;
  bool gated_;
  PromptLookup lookup_;
  SpeculationGate gate_;
  SpeculationStats stats_;
  std::vector<Token> batch_;  // the last token and the proposed ones
  std::vector<Token> guess_;  // scratch
  size_t n_taken_ = 0, n_right_ = 0;  // of the step at hand
  double take_seconds_ = 0;
};

}  // namespace duet
