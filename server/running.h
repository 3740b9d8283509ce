// A job while it is processed: its place in a sequence, its sampler, its text so far. Of the inference
// thread.
#pragma once

#include <chrono>
#include <optional>
#include <span>

#include "server/generation.h"
#include "server/metrics.h"
#include "server/sequence_pool.h"
#include "server/stop_matcher.h"

namespace duet::server {

class Running {
 public:
  using Clock = std::chrono::steady_clock;
  Running(Job& job, SequencePool::Entry& entry, const Tokenizer& tokenizer, size_t n_ctx, Clock::time_point queued_since, ExpertCounts experts_before);

  Job& job() const { return *job_; }
  SequencePool::Entry& entry() const { return *entry_; }
  size_t n_generated() const { return n_generated_; }
  size_t n_evaluated() const { return entry_->sequence.tokens().size(); }
  // Still to be evaluated: what is left of the prompt, or the token generated last.
  std::span<const Token> pending() const;
  bool in_prompt() const { return n_evaluated() < job_->prompt.size(); }
  bool finished() const { return finished_.has_value(); }
  FinishReason reason() const { return *finished_; }
  // The owner has been told of the end and may be gone.
  bool ended() const { return job_ == nullptr; }
  void forget() { job_ = nullptr; }

  void prompt_progress();                          // tells the owner how much of the prompt is done
  void take(std::span<const float> logits);        // the next token; different jobs at the same time
  void tell();                                     // tells the owner what take() has found
  void take_hidden(std::span<const float> hidden); // of the next token of a prompt that is embedded
  void end(FinishReason reason, const std::string& error, Metrics& metrics, ExpertCounts experts_now);  // last of all
  std::optional<double> token_seconds() const { return token_s_; }  // of the last take(), from the one before
  double first_token_seconds() const { return std::chrono::duration<double>(first_ - queued_).count(); }

 private:
  Token choose(std::span<const float> logits);
  void take_token(std::span<const float> logits);
  void add(Token token, TokenRecord record);
  std::string text_of(Token token);

  Job* job_;
  SequencePool::Entry* entry_;
  size_t n_ctx_, n_cached_;
  Sampler sampler_;
  std::optional<grammar::ConstraintState> constraint_;
  const Tokenizer* tokenizer_;
  TextStream text_;
  StopMatcher stops_;
  std::vector<float> biased_;  // scratch
  std::string error_;          // why it failed
  std::vector<double> hidden_sum_;
  Token last_ = 0;
  size_t n_generated_ = 0;
  std::optional<FinishReason> finished_;
  std::optional<double> token_s_;
  std::string shown_;                  // of the token that the owner has not been told of
  std::optional<TokenRecord> record_;
  ExpertCounts experts_before_;
  Clock::time_point queued_, started_, first_, latest_;
};

}  // namespace duet::server
