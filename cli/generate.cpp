// run: one prompt in, the model's continuation or answer out.
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <optional>
#include <random>

#include "base/error.h"
#include "base/json.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/generation.h"
#include "cli/generator.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "cli/streaming.h"
#include "grammar/json_schema.h"
#include "runtime/expert_trace.h"

namespace duet::cli {
namespace {

struct RunOptions {
  ModelOptions model;
  std::optional<std::string> prompt, file;
  std::string template_name, trace, grammar, schema;
  GenerateOptions generate;
  bool raw = false, json = false;
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

// raw: its writer has put the whole prompt together, so names of control tokens are those tokens.
std::vector<Token> prompt_ids(const Tokenizer& tokenizer, const std::optional<ChatTemplate>& chat, const std::string& prompt, bool raw) {
  if (chat) {
    const std::vector<ChatMessage> messages =
        parse_messages(Json::array({{{"role", "user"}, {"content", prompt}}}));
    return tokenizer.encode(chat->render(messages, Json()), chat->wants_bos(tokenizer));
  }
  const Segment segment{prompt, raw};
  return tokenizer.encode({&segment, 1}, tokenizer.add_bos());
}

// --grammar or --json-schema; nothing: the text is free.
std::optional<grammar::Grammar> wanted_grammar(const RunOptions& options) {
  if (!options.grammar.empty()) return grammar::Grammar::parse(read_text(options.grammar));
  if (options.schema.empty()) return std::nullopt;
  return grammar::Grammar::parse(grammar::schema_grammar(parse_json(read_text(options.schema), options.schema), options.schema));
}

struct Form {
  Form(std::optional<grammar::Grammar> grammar, const Tokenizer& tokenizer) : vocabulary(tokenizer), constraint{.vocabulary = &vocabulary, .grammar = std::move(grammar)} {}
  grammar::TokenTrie vocabulary;
  grammar::Constraint constraint;
};

// ---- generation --------------------------------------------------------------------------------

void run_generate(RunOptions options) {
  const std::string prompt = assemble_prompt(options);
  GenerateOptions& generate = options.generate;
  generate.sampling.seed = generate.seed ? *generate.seed : std::random_device{}();
  static_cast<void>(Sampler(generate.sampling));  // refuses before a model is opened
  std::optional<ChatTemplate> chat;
  if (!options.template_name.empty() && !options.raw)
    chat = ChatTemplate::named(options.template_name);
  std::optional<grammar::Grammar> grammar = wanted_grammar(options);
  const Engine engine = open_engine(options.model);
  if (!chat && !options.raw) chat = engine.chat_template();
  const std::vector<Token> ids = prompt_ids(engine.tokenizer(), chat, prompt, options.raw);
  std::optional<Form> form;
  if (grammar) generate.constraint = &form.emplace(std::move(grammar), engine.tokenizer()).constraint;
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
  generator.emplace(generate, engine, session, chat.has_value(), options.json || stdout_is_file(), [&](const std::string& text) {
    if (!options.json) print_generated(text);
  });
  const size_t max_draft = generator->speculator().max_draft();
  if (max_draft < generate.speculation.max_draft)
    note(concat("at most ", max_draft, " tokens are proposed at once: with float weights more would change the last bits of logits"));
  const Generation result = generator->run(ids);
  if (trace) trace->commit(engine.stream_stats());
  const std::optional<StreamUse> stream = streaming(engine, result);
  if (options.json) {
    Json json = to_json(result, stream);
    if (generate.speculation.max_draft > 0) json["speculation"] = to_json(generator->speculator());
    print_json(json);
  } else
    print("\n");
  flush_stdout();
  print_statistics(result);
  if (stream) print_streaming(*stream);
  print_faults(engine, result);
  if (generate.speculation.max_draft > 0) print_speculation(generator->speculator());
  if (result.stop == Stop::interrupted) throw Quit{kExitInterrupted};
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
  add_generate_options(command, options->generate);
  auto* raw = command.add_flag("--raw", options->raw, "Continue the prompt as it stands, control tokens by their names: no chat template");
  command.add_option("--template", options->template_name, "Chat template by name [default: the model's own, none for a base model]")->excludes(raw);
  auto* grammar = command.add_option("--grammar", options->grammar, "File of a grammar (GBNF) that the text keeps to")->type_name("FILE");
  command.add_option("--json-schema", options->schema, "File of a JSON schema that the text, JSON, keeps to")->type_name("FILE")->excludes(grammar);
  add_trace_option(command, options->trace);
  command.add_flag(
      "--json", options->json,
      "One JSON document: {text, ids, prompt_tokens, prefill_s, decode_tok_s, stop, ...}");
  add_environment(command);
  command.callback([options] { run_generate(*options); });
}

}  // namespace duet::cli
