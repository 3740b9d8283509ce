// A request for text and what comes of it, between the protocols and the scheduler.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "grammar/constraint.h"
#include "runtime/sampler.h"

namespace duet::server {

// Stands for a control token in a text. No token's text has such a byte: names that are spelt out are words.
inline constexpr std::string_view kControlMark = "\xFF";

struct GenerationParams {
  SamplerParams sampling = {};
  size_t max_tokens = SIZE_MAX;           // the context ends it anyway
  std::vector<std::string> stop = {};     // not part of the text
  std::vector<std::pair<Token, float>> logit_bias = {};  // added to logits; -infinity: never
  int n_top = -1;                         // >= 0: log probabilities, and of the so many best tokens
  bool prompt_logprobs = false;           // those of the prompt's tokens too
  bool penalize_prompt = false;           // penalties count the prompt's tokens
  bool embedding = false;                 // no text: the mean of the hidden states, of length 1
  bool ignore_eos = false;
  // Something is wanted of every token of the prompt: none may come from earlier requests.
  bool needs_whole_prompt() const { return prompt_logprobs || embedding; }
  const grammar::Constraint* constraint = nullptr;  // what the text must be; outlives the job
  std::optional<Token> shown_control = {};          // a control token whose place is shown by kControlMark
  bool is_answer = false;                 // a text of its own, not the continuation of one: no space before its first word
};

struct TokenRecord {
  Token id = 0;
  float logprob = 0;  // of the model, before sampling parameters; NaN where there is none (first of a prompt)
  std::vector<std::pair<Token, float>> top = {};  // best first
};

// Experts that were needed and in memory, and that were not; none where all weights are.
struct ExpertCounts {
  uint64_t hits = 0, misses = 0;
};

enum class FinishReason { stop, length, cancelled, failed, refused };  // refused: what was asked cannot be done

struct Finish {
  FinishReason reason = FinishReason::stop;
  std::string stop_string = {};  // which ended it, if one did
  std::string error = {};        // when failed or refused
  size_t n_generated = 0;
  double queue_s = 0, prompt_s = 0, decode_s = 0;  // decode: from the first token to the last
  ExpertCounts experts = {};  // of all batches meanwhile, whose ever
};

// What has happened since the last look.
struct Update {
  size_t n_prompt_done = 0, n_cached = 0;  // of the prompt's tokens: evaluated so far; taken from earlier requests
  std::string text = {};                   // whole UTF-8 characters that no stop string can take back
  std::vector<TokenRecord> prompt = {}, tokens = {};
  std::vector<float> embedding = {};       // with the end
  std::optional<Finish> finish = {};       // last
};

// Where the jobs of one request leave their news.
struct Inbox {
  std::mutex mutex;
  std::condition_variable changed;
};

// One sequence to be generated. Its owner (a connection's thread) keeps it and the inbox alive until the
// scheduler has let go of it: see Ticket.
class Job {
 public:
  Job(Inbox& inbox, std::vector<Token> prompt_ids, GenerationParams generation)
      : prompt(std::move(prompt_ids)), params(std::move(generation)), inbox_(&inbox) {}
  const std::vector<Token> prompt;
  const GenerationParams params;

  // For the owner, which waits for news of any of its jobs: the index of one that has some, or nothing
  // after `wait`.
  static std::optional<size_t> wait_any(Inbox& inbox, std::span<const std::unique_ptr<Job>> jobs, std::chrono::milliseconds wait);
  Update take();  // what is new

  // For the scheduler.
  template <class Change>
  void publish(const Change& change) {
    const std::lock_guard lock(inbox_->mutex);
    change(pending_);
    news_ = true;
    inbox_->changed.notify_one();
  }

 private:
  Inbox* inbox_;
  Update pending_;
  bool news_ = false;
};

}  // namespace duet::server
