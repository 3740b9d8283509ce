// From the ids of a prompt to the text of an answer, shown as it comes: what run and chat share.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/generation.h"
#include "cli/streaming.h"
#include "grammar/constraint.h"
#include "runtime/engine.h"
#include "runtime/speculation.h"

namespace CLI {
class App;
}

namespace duet::cli {

struct GenerateOptions {
  int64_t n_predict = 512;  // -1: until the end of the answer or of the context
  SamplerParams sampling;   // its seed is taken from `seed`
  std::optional<uint64_t> seed;
  SpeculationOptions speculation;
  bool ignore_eos = false;
  const grammar::Constraint* constraint = nullptr;  // what the text must be
};

// --n-predict, the sampler's, --seed, --speculate and --ignore-eos; the defaults are those in `options`.
void add_generate_options(CLI::App& command, GenerateOptions& options);

// One answer. The session must not be changed by others meanwhile.
class Generator {
 public:
  // Text as it becomes printable, never a part of a character.
  using Emit = std::function<void(const std::string& text)>;
  // `is_answer`: the text starts a turn of its own instead of continuing the prompt. `has_line`: the text is not
  // shown on the terminal, so that a status line may be.
  Generator(const GenerateOptions& options, const Engine& engine, Session& session, bool is_answer, bool has_line, Emit emit);

  // A layer of the tokens at hand is done: to be called from the session's RoutingFn.
  void layer_done(int layer) {
    if (in_prompt_) line_.prompt(layer);
  }
  // Keeps what the session has of `prompt` already and evaluates the rest. An interruption ends the answer
  // (Stop::interrupted); the interrupt flag stays as it is.
  Generation run(const std::vector<Token>& prompt);

  const Speculator& speculator() const { return speculator_; }

 private:
  void prefill(const std::vector<Token>& prompt);
  Stop decode();
  bool length_reached() const;
  // The next token, shown; nothing when it is the last or ends the answer (out_.stop says which).
  std::optional<Token> take(std::span<const float> logits);
  Token choose(std::span<const float> logits);
  void emit(const std::string& text);

  const GenerateOptions& options_;
  const Engine& engine_;
  const Tokenizer& tokenizer_;
  Session& session_;
  Speculator speculator_;
  Sampler sampler_;
  std::optional<grammar::ConstraintState> constraint_;
  std::vector<float> constrained_;  // scratch
  TextStream stream_;
  Emit emit_;
  StreamLine line_;
  bool has_line_, in_prompt_ = true;
  Generation out_;
};

}  // namespace duet::cli
