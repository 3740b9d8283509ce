#include "cli/generator.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>

#include "base/error.h"
#include "base/pressure.h"
#include "base/stopwatch.h"
#include "cli/console.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

// off, auto or a number of tokens.
SpeculationOptions parse_speculation(const std::string& text) {
  if (text == "off") return {};
  if (text == "auto") return {.max_draft = kMaxDraft, .gated = true};
  size_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || end != text.data() + text.size() || n > kMaxDraft)
    throw CLI::ValidationError("--speculate", concat("'", text, "' is not off, auto or a number up to ", kMaxDraft));
  return {.max_draft = n, .gated = false};
}

void add_sampling_options(CLI::App& command, GenerateOptions& options) {
  SamplerParams& s = options.sampling;
  command.add_option("--temp", s.temperature, "Temperature; 0 always takes the likeliest token")
      ->capture_default_str();
  command.add_option("--top-k", s.top_k, "Keep the K likeliest tokens; 0: off")
      ->capture_default_str();
  command.add_option("--top-p", s.top_p, "Keep the likeliest tokens that make up P; 1: off")
      ->capture_default_str();
  command.add_option("--min-p", s.min_p, "Drop tokens below P times the likeliest; 0: off")
      ->capture_default_str();
  command.add_option("--repeat-penalty", s.repeat_penalty, "Weakens tokens of the last 64; 1: off")
      ->capture_default_str();
  command
      .add_option("--presence-penalty", s.presence_penalty,
                  "Subtracted once from tokens of the last 64")
      ->capture_default_str();
  command
      .add_option("--frequency-penalty", s.frequency_penalty,
                  "Subtracted per occurrence in the last 64")
      ->capture_default_str();
  command.add_option("--seed", options.seed,
                     "Seed of the draws [default: random; shown with the statistics]")
      ->check(whole_number(0));
}

}  // namespace

void add_generate_options(CLI::App& command, GenerateOptions& options) {
  command
      .add_option("-n,--n-predict", options.n_predict,
                  "Most tokens to generate; -1: until the end of the answer or of the context")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 32).description(""))
      ->type_name("N")
      ->capture_default_str();
  add_sampling_options(command, options);
  command
      .add_option_function<std::string>(
          "--speculate", [&options](const std::string& text) { options.speculation = parse_speculation(text); },
          "Propose what followed where the last tokens stood before, and evaluate it at once; the text stays the "
          "same. auto: as long as it is faster; N: always N tokens")
      ->type_name("off|auto|N")
      ->default_str("off");
  command.add_flag("--ignore-eos", options.ignore_eos,
                   "Go on past the end of the answer (for benchmarks)");
}

Generator::Generator(const GenerateOptions& options, const Engine& engine, Session& session, bool is_answer, bool has_line, Emit emit)
    : options_(options),
      engine_(engine),
      tokenizer_(engine.tokenizer()),
      session_(session),
      speculator_(engine, session, options.speculation),
      sampler_(options.sampling),
      stream_(tokenizer_, is_answer),
      emit_(std::move(emit)),
      line_(engine),
      has_line_(has_line) {
  if (options.constraint != nullptr) constraint_.emplace(*options.constraint, is_answer);
}

Generation Generator::run(const std::vector<Token>& prompt) {
  out_.n_prompt = prompt.size();
  out_.seed = options_.sampling.seed;
  try {
    prefill(prompt);
    out_.stop = decode();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::cancelled) throw;
    out_.stop = Stop::interrupted;
  }
  line_.clear();
  emit(stream_.finish());
  return std::move(out_);
}

void Generator::prefill(const std::vector<Token>& prompt) {
  const std::span<const Token> have = session_.tokens();
  const size_t limit = prompt.empty() ? 0 : std::min(have.size(), prompt.size() - 1);  // the last one is always evaluated
  out_.n_reused = static_cast<size_t>(
      std::mismatch(have.begin(), have.begin() + static_cast<ptrdiff_t>(limit), prompt.begin()).first - have.begin());
  const auto start = std::chrono::steady_clock::now();
  ProgressBar bar("prompt", ProgressBar::Unit::tokens);
  session_.sync(prompt, [&](size_t done, size_t total) { bar.update(done, total); });
  out_.prefill_seconds = seconds_since(start);
  in_prompt_ = false;
  line_.clear();
  for (Token token : prompt) sampler_.accept(token);
}

bool Generator::length_reached() const {
  return options_.n_predict >= 0 && out_.ids.size() >= static_cast<size_t>(options_.n_predict);
}

Stop Generator::decode() {
  out_.before_decode = engine_.stream_stats().value_or(StreamStats{});
  const uint64_t faults = major_faults();
  const auto start = std::chrono::steady_clock::now();
  if (length_reached()) return Stop::length;
  std::optional<Token> next = take(session_.logits());
  while (next) {
    if (interrupted()) return Stop::interrupted;
    if (session_.tokens().size() >= session_.n_ctx()) return Stop::context;
    const size_t limit = options_.n_predict < 0 ? session_.n_ctx() : static_cast<size_t>(options_.n_predict) - out_.ids.size();
    out_.n_decoded += speculator_.step(session_, *next, limit, [&](std::span<const float> logits) { return next = take(logits); });
    out_.decode_seconds = seconds_since(start);
    out_.major_faults = major_faults() - faults;
    if (has_line_) line_.decoded(out_.n_decoded);
  }
  return out_.stop;
}

// Rows that only pad the matrix are no tokens.
Token Generator::choose(std::span<const float> logits) {
  logits = logits.first(std::min(logits.size(), tokenizer_.n_vocab()));
  if (!constraint_) return sampler_.sample(logits);
  constrained_.assign(logits.begin(), logits.end());
  constraint_->apply(constrained_, !options_.ignore_eos);
  return sampler_.sample(constrained_);
}

std::optional<Token> Generator::take(std::span<const float> logits) {
  const Token token = choose(logits);
  out_.stop = Stop::eos;
  if (tokenizer_.is_eog(token) && !options_.ignore_eos) return std::nullopt;
  sampler_.accept(token);
  if (constraint_) constraint_->accept(token);
  out_.ids.push_back(token);
  emit(stream_.push(token));
  if (constraint_ && constraint_->complete()) return std::nullopt;
  out_.stop = Stop::length;
  return length_reached() ? std::nullopt : std::optional(token);
}

void Generator::emit(const std::string& text) {
  out_.text += text;
  if (!text.empty()) emit_(text);
}

}  // namespace duet::cli
