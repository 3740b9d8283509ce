#include "server/running.h"

#include <cmath>

#include "base/error.h"
#include "server/logprobs.h"

namespace duet::server {
namespace {

std::vector<float> of_length_one(const std::vector<double>& v) {
  double squares = 0;
  for (const double x : v) squares += x * x;
  const double scale = squares > 0 ? 1 / std::sqrt(squares) : 0;
  std::vector<float> out;
  for (const double x : v) out.push_back(static_cast<float>(x * scale));
  return out;
}

double seconds(Running::Clock::duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

Running::Running(Job& job, SequencePool::Entry& entry, const Tokenizer& tokenizer, size_t n_ctx, Clock::time_point queued_since, ExpertCounts experts_before)
    : job_(&job),
      entry_(&entry),
      n_ctx_(n_ctx),
      n_cached_(entry.sequence.tokens().size()),
      sampler_(job.params.sampling),
      tokenizer_(&tokenizer),
      text_(tokenizer, job.params.is_answer),
      stops_(job.params.stop),
      experts_before_(experts_before),
      queued_(queued_since),
      started_(Clock::now()),
      first_(started_),
      latest_(started_) {
  if (job.params.constraint != nullptr) constraint_.emplace(*job.params.constraint, job.params.is_answer);
  if (job.params.penalize_prompt)
    for (const Token token : job.prompt) sampler_.accept(token);
}

std::span<const Token> Running::pending() const {
  if (in_prompt()) return std::span(job_->prompt).subspan(n_evaluated());
  return {&last_, 1};
}

void Running::prompt_progress() {
  job_->publish([&](Update& update) {
    update.n_prompt_done = n_evaluated();
    update.n_cached = n_cached_;
  });
}

void Running::take(std::span<const float> logits) {
  const auto now = Clock::now();
  token_s_.reset();
  if (n_generated_ == 0) first_ = now;
  else token_s_ = seconds(now - latest_);
  latest_ = now;
  if (job_->params.max_tokens == 0) {
    finished_ = FinishReason::length;
    return;
  }
  try {
    take_token(logits);
  } catch (const Error& e) {  // of this job alone: a grammar that cannot be followed
    error_ = e.what();
    finished_ = FinishReason::refused;
  }
}

void Running::take_token(std::span<const float> logits) {
  const Token token = choose(logits);
  const int n_top = job_->params.n_top;
  sampler_.accept(token);
  ++n_generated_;
  last_ = token;
  if (!job_->params.ignore_eos && tokenizer_->is_eog(token)) {
    finished_ = FinishReason::stop;
    shown_.clear();
    // Who scores a prompt counts on the record of one token behind it, whichever that is.
    if (job_->params.prompt_logprobs) record_ = logprob_record(logits, token, static_cast<size_t>(n_top));
    return;
  }
  if (constraint_) constraint_->accept(token);
  add(token, n_top >= 0 ? logprob_record(logits, token, static_cast<size_t>(n_top)) : TokenRecord{token, 0, {}});
}

void Running::take_hidden(std::span<const float> hidden) {
  hidden_sum_.resize(hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) hidden_sum_[i] += double{hidden[i]};
  if (in_prompt()) return;
  first_ = latest_ = Clock::now();
  finished_ = FinishReason::stop;
}

Token Running::choose(std::span<const float> logits) {
  if (job_->params.logit_bias.empty() && !constraint_) return sampler_.sample(logits);
  biased_.assign(logits.begin(), logits.end());
  for (const auto& [id, bias] : job_->params.logit_bias) biased_[static_cast<size_t>(id)] += bias;
  if (constraint_) constraint_->apply(biased_, !job_->params.ignore_eos);
  return sampler_.sample(biased_);
}

std::string Running::text_of(Token token) {
  if (token != job_->params.shown_control) return text_.push(token);
  return text_.finish().append(kControlMark);
}

void Running::add(Token token, TokenRecord record) {
  shown_ = stops_.push(text_of(token));
  record_ = std::move(record);
  if (!stops_.matched().empty() || (constraint_ && constraint_->complete())) finished_ = FinishReason::stop;
  else if (n_generated_ >= job_->params.max_tokens || n_evaluated() >= n_ctx_) finished_ = FinishReason::length;
}

void Running::tell() {
  if (!record_) return;
  job_->publish([&](Update& update) {
    update.text += shown_;
    update.tokens.push_back(std::move(*record_));
  });
  record_.reset();
}

void Running::end(FinishReason reason, const std::string& error, Metrics& metrics, ExpertCounts experts_now) {
  metrics.generated_tokens += n_generated_;
  metrics.decode_us += static_cast<uint64_t>(seconds(latest_ - first_) * 1e6);
  if (n_generated_ > 0) metrics.prompt_us += static_cast<uint64_t>(seconds(first_ - started_) * 1e6);
  std::string rest = stops_.matched().empty() ? stops_.push(text_.finish()) : std::string();
  const bool stopped = !stops_.matched().empty();  // by what was held back
  if (!stopped) rest += stops_.finish();
  job_->publish([&](Update& update) {
    update.text += rest;
    if (finished_ && !hidden_sum_.empty()) update.embedding = of_length_one(hidden_sum_);
    update.finish = Finish{stopped ? FinishReason::stop : reason, stops_.matched(), error.empty() ? error_ : error, n_generated_,
                           seconds(started_ - queued_), seconds(first_ - started_), seconds(latest_ - first_),
                           {experts_now.hits - experts_before_.hits, experts_now.misses - experts_before_.misses}};
  });
}

}  // namespace duet::server
