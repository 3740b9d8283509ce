// run: one prompt in, the model's continuation or answer out.
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <chrono>
#include <optional>
#include <random>

#include "base/error.h"
#include "base/json.h"
#include "base/stopwatch.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/generation.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "cli/streaming.h"
#include "runtime/expert_trace.h"
#include "runtime/speculation.h"

namespace duet::cli {
namespace {

struct RunOptions {
  ModelOptions model;
  std::optional<std::string> prompt, file;
  std::string template_name, trace;
  int64_t n_predict = 512;  // -1: until the end of the answer or of the context
  SamplerParams sampling;
  SpeculationOptions speculation;
  std::optional<uint64_t> seed;
  bool raw = false, ignore_eos = false, json = false;
};

// ---- the prompt --------------------------------------------------------------------------------

// Whether to read standard input. Beside a prompt only what was clearly piped or redirected in
// counts: programs start others with sockets and devices on it that never end.
bool stdin_has_text(bool have_prompt) {
  struct stat info {};
  if (::fstat(STDIN_FILENO, &info) != 0) return false;
  return S_ISFIFO(info.st_mode) || S_ISREG(info.st_mode) ||
         (!have_prompt && ::isatty(STDIN_FILENO) == 0);
}

// A pipe that nobody writes to would look like a hang: say what is being waited for.
void tell_when_waiting() {
  struct pollfd input {
    STDIN_FILENO, POLLIN, 0
  };
  if (::poll(&input, 1, 2000) == 0)
    note("waiting for text on standard input; when none is to come, add < /dev/null");
}

// -p, then -f, then piped text, each on its own lines. The last newline of a file is not part of
// the prompt: editors and echo put it there.
std::string assemble_prompt(const RunOptions& options) {
  std::string prompt = options.prompt.value_or("");
  auto append = [&](std::string text) {
    if (text.ends_with('\n')) text.pop_back();
    if (!prompt.empty() && prompt.back() != '\n' && !text.empty()) prompt += '\n';
    prompt += text;
  };
  const bool have_prompt = options.prompt.has_value() || options.file.has_value();
  if (options.file) append(read_text(*options.file));
  if (options.file != "-" && stdin_has_text(have_prompt)) {
    tell_when_waiting();
    append(read_text("-"));
  }
  if (!have_prompt && prompt.empty())
    fail(ErrorKind::usage, "run: no prompt; give -p TEXT, -f FILE, or pipe text in");
  return prompt;
}

std::vector<Token> prompt_ids(const Tokenizer& tokenizer, const std::optional<ChatTemplate>& chat,
                              const std::string& prompt) {
  if (chat) {
    const std::vector<ChatMessage> messages =
        parse_messages(Json::array({{{"role", "user"}, {"content", prompt}}}));
    return tokenizer.encode(chat->render(messages, Json()), chat->wants_bos(tokenizer));
  }
  const Segment segment{prompt, false};
  return tokenizer.encode({&segment, 1}, tokenizer.add_bos());
}

// ---- generation --------------------------------------------------------------------------------

class Generator {
 public:
  // `is_answer`: the text starts a turn of its own instead of continuing the prompt.
  Generator(const RunOptions& options, const Engine& engine, Session& session, Sampler sampler, bool is_answer)
      : options_(options),
        engine_(engine),
        tokenizer_(engine.tokenizer()),
        session_(session),
        speculator_(engine, session, options.speculation),
        sampler_(std::move(sampler)),
        stream_(tokenizer_, is_answer),
        line_(engine),
        has_line_(options.json || stdout_is_file()) {}

  // A layer of the tokens at hand is done.
  void layer_done(int layer) {
    if (in_prompt_) line_.prompt(layer);
  }

  Generation run(const std::vector<Token>& prompt) {
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

  const Speculator& speculator() const { return speculator_; }

 private:
  void prefill(const std::vector<Token>& prompt) {
    const auto start = std::chrono::steady_clock::now();
    ProgressBar bar("prompt", ProgressBar::Unit::tokens);
    session_.sync(prompt, [&](size_t done, size_t total) { bar.update(done, total); });
    out_.prefill_seconds = seconds_since(start);
    in_prompt_ = false;
    line_.clear();
    for (Token token : prompt) sampler_.accept(token);
  }

  bool length_reached() const {
    return options_.n_predict >= 0 && out_.ids.size() >= static_cast<size_t>(options_.n_predict);
  }

  Stop decode() {
    out_.before_decode = engine_.stream_stats().value_or(StreamStats{});
    const auto start = std::chrono::steady_clock::now();
    if (length_reached()) return Stop::length;
    std::optional<Token> next = take(session_.logits());
    while (next) {
      if (interrupted()) return Stop::interrupted;
      if (session_.tokens().size() >= session_.n_ctx()) return Stop::context;
      const size_t limit = options_.n_predict < 0 ? session_.n_ctx() : static_cast<size_t>(options_.n_predict) - out_.ids.size();
      out_.n_decoded += speculator_.step(session_, *next, limit, [&](std::span<const float> logits) { return next = take(logits); });
      out_.decode_seconds = seconds_since(start);
      if (has_line_) line_.decoded(out_.n_decoded);
    }
    return out_.stop;
  }

  // The next token, shown; nothing when it is the last or ends the answer (out_.stop says which).
  std::optional<Token> take(std::span<const float> logits) {
    const Token token = sampler_.sample(logits);
    out_.stop = Stop::eos;
    if (tokenizer_.is_eog(token) && !options_.ignore_eos) return std::nullopt;
    sampler_.accept(token);
    out_.ids.push_back(token);
    emit(stream_.push(token));
    out_.stop = Stop::length;
    return length_reached() ? std::nullopt : std::optional(token);
  }

  void emit(const std::string& text) {
    out_.text += text;
    if (options_.json || text.empty()) return;
    print(text);
    flush_stdout();
  }

  const RunOptions& options_;
  const Engine& engine_;
  const Tokenizer& tokenizer_;
  Session& session_;
  Speculator speculator_;
  Sampler sampler_;
  TextStream stream_;
  StreamLine line_;
  bool has_line_, in_prompt_ = true;  // has_line_: the text being made is not shown on the terminal
  Generation out_;
};

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

void run_generate(RunOptions options) {
  const std::string prompt = assemble_prompt(options);
  options.sampling.seed = options.seed ? *options.seed : std::random_device{}();
  const Sampler sampler(options.sampling);
  std::optional<ChatTemplate> chat;
  if (!options.template_name.empty() && !options.raw)
    chat = ChatTemplate::named(options.template_name);
  const Engine engine = open_engine(options.model);
  if (!chat && !options.raw) chat = engine.chat_template();
  const std::vector<Token> ids = prompt_ids(engine.tokenizer(), chat, prompt);
  std::optional<ExpertTraceWriter> trace;
  std::optional<Generator> generator;
  RoutingFn traced;
  if (!options.trace.empty()) {
    trace.emplace(options.trace, trace_header(engine));
    traced = trace_routing(*trace, engine);
  }
  Session session = open_session(engine, options.model, 0, [&](int layer, std::span<const int32_t> experts) {
    if (traced) traced(layer, experts);
    generator->layer_done(layer);
  });
  if (ids.size() > session.n_ctx())
    fail(ErrorKind::usage, "the prompt has ", ids.size(), " tokens, the context ", session.n_ctx(),
         "; shorten it or give --ctx ", ids.size() + 512);
  print_status(engine, session);
  generator.emplace(options, engine, session, sampler, chat.has_value());
  const size_t max_draft = generator->speculator().max_draft();
  if (max_draft < options.speculation.max_draft)
    note(concat("at most ", max_draft, " tokens are proposed at once: with float weights more would change the last bits of logits"));
  const Generation result = generator->run(ids);
  if (trace) trace->commit(engine.stream_stats());
  const std::optional<StreamUse> stream = streaming(engine, result);
  if (options.json) {
    Json json = to_json(result, stream);
    if (options.speculation.max_draft > 0) json["speculation"] = to_json(generator->speculator());
    print_json(json);
  } else
    print("\n");
  flush_stdout();
  print_statistics(result);
  if (stream) print_streaming(*stream);
  if (options.speculation.max_draft > 0) print_speculation(generator->speculator());
  if (result.stop == Stop::interrupted) throw Quit{kExitInterrupted};
}

void add_sampling_options(CLI::App& command, RunOptions& options) {
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
                     "Seed of the draws [default: random; shown with the statistics]");
}

}  // namespace

void add_run(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("run", "Generate text: the answer to, or the continuation of, a prompt");
  auto options = std::make_shared<RunOptions>();
  add_model_options(command, options->model, "the model's, at most 4096");
  command.add_option("-p,--prompt", options->prompt, "The prompt");
  command.add_option("-f,--file", options->file,
                     "File of text that follows -p; - is standard input. Piped text follows both");
  command
      .add_option("-n,--n-predict", options->n_predict,
                  "Most tokens to generate; -1: until the end of the answer or of the context")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 32).description(""))
      ->type_name("N")
      ->capture_default_str();
  add_sampling_options(command, *options);
  command
      .add_option_function<std::string>(
          "--speculate", [options](const std::string& text) { options->speculation = parse_speculation(text); },
          "Propose what followed where the last tokens stood before, and evaluate it at once; the text stays the "
          "same. auto: as long as it is faster; N: always N tokens")
      ->type_name("off|auto|N")
      ->default_str("off");
  command.add_flag("--raw", options->raw, "Continue the prompt as it stands: no chat template");
  command.add_option("--template", options->template_name,
                     "Chat template by name [default: the model's own, none for a base model]");
  add_trace_option(command, options->trace);
  command.add_flag("--ignore-eos", options->ignore_eos,
                   "Go on past the end of the answer (for benchmarks)");
  command.add_flag(
      "--json", options->json,
      "One JSON document: {text, ids, prompt_tokens, prefill_s, decode_tok_s, stop, ...}");
  add_environment(command);
  command.callback([options] { run_generate(*options); });
}

}  // namespace duet::cli
