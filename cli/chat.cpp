// chat: a conversation on the terminal, or one message a line from a pipe.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"
#include "base/user_folders.h"
#include "cli/chat_input.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/conversation.h"
#include "cli/generator.h"
#include "cli/line_editor.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct ChatOptions {
  ModelOptions model;
  GenerateOptions generate;
  std::string system, template_name;
};

constexpr const char* kHelp =
    "/system [TEXT|-]    show the system message, set it, remove it\n"
    "/set [NAME VALUE]   show the settings of the sampler, change one\n"
    "/template [NAME]    show the chat template, choose another\n"
    "/regen              answer the last message again\n"
    "/save FILE          save the conversation (JSON)\n"
    "/load FILE          go on with a saved conversation\n"
    "/clear              start over; the system message stays\n"
    "/stats              this session in figures\n"
    "/help, /exit\n"
    "\"\"\" begins and ends a message of several lines; a \\ at the end of a line goes on in the next.\n"
    "Ctrl-C stops an answer; at the prompt it drops the line, and leaves when pressed twice. Ctrl-D leaves.\n";

// ---- where messages come from ------------------------------------------------------------------

class Input {
 public:
  virtual ~Input() = default;
  virtual LineEditor::Line line(bool continues) = 0;
  virtual void remember(const std::string&) {}
};

class TerminalInput : public Input {
 public:
  LineEditor::Line line(bool continues) override { return editor_.read(continues ? "... " : ">>> "); }
  void remember(const std::string& text) override { editor_.remember(text); }

 private:
  LineEditor editor_{state_folder() / "chat_history"};
};

class PipeInput : public Input {
 public:
  LineEditor::Line line(bool) override {
    std::string text;
    const bool got = !interrupted() && std::getline(std::cin, text);
    if (interrupted()) return {LineEditor::Line::Kind::interrupted, "", false};
    if (text.ends_with('\r')) text.pop_back();
    return {got ? LineEditor::Line::Kind::text : LineEditor::Line::Kind::end, std::move(text), false};
  }
};

ChatTemplate choose_template(const Engine& engine, const std::string& name) {
  if (!name.empty()) return ChatTemplate::named(name);
  if (engine.chat_template()) return *engine.chat_template();
  std::string choices;
  for (const std::string& each : ChatTemplate::names()) choices += (choices.empty() ? "" : ", ") + each;
  fail(ErrorKind::usage, "a base model without a chat template; choose one with --template: ", choices,
       "; or have it continue text with: duet run MODEL -p TEXT");
}

// ---- the chat ----------------------------------------------------------------------------------

class Chat {
 public:
  Chat(const ChatOptions& options, const Engine& engine, bool interactive)
      : options_(options),
        generate_(options.generate),
        engine_(engine),
        chat_(choose_template(engine, options.template_name)),
        ids_(engine.tokenizer(), chat_),
        session_(open_session(engine, options.model, 0, [this](int layer, std::span<const int32_t>) {
          if (generator_) generator_->layer_done(layer);
        })),
        interactive_(interactive),
        first_seed_(std::random_device{}()) {
    conversation_.system = options.system;
  }

  void run();

 private:
  std::optional<ChatInput> next_input();
  void interrupted_at_prompt();
  void handle(const ChatInput& input);
  void obey(const ChatCommand& command);
  bool obey_model_command(const ChatCommand& command);
  void say(const std::string& text) { std::fputs(text.c_str(), stderr); }
  void set_system(const std::string& text);
  void set_template(const std::string& name);
  void change_setting(const std::string& text);
  void load(const std::string& path);
  void save(const std::string& path);
  void regenerate();
  void show_stats();
  void send(const std::string& text);
  void answer();
  std::vector<Token> prompt_ids(const std::vector<ChatMessage>& messages);
  void keep(const Generation& g, std::vector<ChatMessage> messages, const std::vector<Token>& prompt);
  void show_statistics(const Generation& g);

  const ChatOptions& options_;
  GenerateOptions generate_;
  const Engine& engine_;
  ChatTemplate chat_;
  ConversationIds ids_;
  std::optional<Generator> generator_;  // of the answer at hand
  Session session_;
  bool interactive_, leaving_ = false, interrupted_before_ = false;
  uint64_t first_seed_, n_answers_ = 0;
  Conversation conversation_;
  std::unique_ptr<Input> input_;
  size_t n_generated_ = 0, n_evaluated_ = 0;
  double decode_seconds_ = 0, prefill_seconds_ = 0;
};

void Chat::run() {
  print_status(engine_, session_);
  if (interactive_) {
    say("[" + chat_.name() + " template | /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves]\n");
    input_ = std::make_unique<TerminalInput>();
    survive_interrupts();
  } else {
    input_ = std::make_unique<PipeInput>();
  }
  while (!leaving_) {
    const std::optional<ChatInput> input = next_input();
    if (!input) return;
    try {
      handle(*input);
    } catch (const Error& e) {
      // A script must see that it failed; a person can do something else.
      if (!interactive_ || e.kind() == ErrorKind::internal) throw;
      print_error(e.what());
    }
  }
}

// The second Ctrl-C in a row leaves, and so does a signal that asks for it.
void Chat::interrupted_at_prompt() {
  if (interactive_) say("\n");
  if (!interactive_ || !forget_interrupt() || std::exchange(interrupted_before_, true)) throw Quit{kExitInterrupted};
  say("(Ctrl-C again or /exit leaves)\n");
}

std::optional<ChatInput> Chat::next_input() {
  MessageAssembler assembler;
  for (;;) {
    const LineEditor::Line line = input_->line(assembler.is_open());
    if (line.kind == LineEditor::Line::Kind::interrupted) {
      interrupted_at_prompt();
      assembler.clear();
      continue;
    }
    interrupted_before_ = false;
    if (line.kind == LineEditor::Line::Kind::end) {
      if (interactive_) say("\n");
      return assembler.finish();
    }
    if (!trimmed(line.text).empty()) input_->remember(line.text);
    if (std::optional<ChatInput> input = assembler.add(line.text, line.goes_on)) return input;
  }
}

void Chat::handle(const ChatInput& input) {
  if (const std::optional<ChatCommand> command = parse_command(input)) return obey(*command);
  if (!trimmed(input.text).empty()) send(input.text);
}

void Chat::obey(const ChatCommand& command) {
  if (command.name == "exit" || command.name == "bye" || command.name == "quit")
    leaving_ = true;
  else if (command.name == "help" || command.name == "?")
    say(kHelp);
  else if (command.name == "stats")
    show_stats();
  else if (command.name == "save")
    save(command.argument);
  else if (command.name == "load")
    load(command.argument);
  else if (command.name == "regen")
    regenerate();
  else if (!obey_model_command(command))
    fail(ErrorKind::usage, "no command /", command.name, "; /help lists them (a message that begins so: put it in \"\"\")");
}

bool Chat::obey_model_command(const ChatCommand& command) {
  if (command.name == "clear")
    conversation_.messages.clear();
  else if (command.name == "system")
    set_system(command.argument);
  else if (command.name == "set")
    change_setting(command.argument);
  else if (command.name == "template")
    set_template(command.argument);
  else
    return false;
  return true;
}

void Chat::change_setting(const std::string& text) {
  if (text.empty()) return say(list_settings(generate_));
  if (text.starts_with("system ")) return set_system(std::string(trimmed(std::string_view(text).substr(7))));
  apply_setting(generate_, text);
}

void Chat::set_system(const std::string& text) {
  if (text.empty()) return say(conversation_.system.empty() ? "no system message\n" : without_controls(conversation_.system) + "\n");
  conversation_.system = text == "-" ? "" : text;
}

void Chat::set_template(const std::string& name) {
  if (!name.empty()) {
    chat_ = ChatTemplate::named(name);
    ids_.forget();
    return;
  }
  std::string choices;
  for (const std::string& each : ChatTemplate::names()) choices += " " + each;
  say(chat_.name() + " (there are:" + choices + ")\n");
}

void Chat::save(const std::string& path) {
  if (path.empty()) fail(ErrorKind::usage, "/save: which file?");
  save_conversation(conversation_, engine_.info().hparams.name, expand_home(path));
  note(concat(conversation_.messages.size(), " messages saved in ", path));
}

void Chat::load(const std::string& path) {
  if (path.empty()) fail(ErrorKind::usage, "/load: which file?");
  conversation_ = load_conversation(expand_home(path));
  ids_.forget();
  note(conversation_.messages.empty() ? "loaded; there are no messages in it" : concat(conversation_.messages.size(), " messages loaded; /regen answers the last again"));
}

void Chat::regenerate() {
  std::vector<ChatMessage>& messages = conversation_.messages;
  const bool answered = !messages.empty() && messages.back().role == "assistant";
  if (messages.size() < (answered ? 2u : 1u)) fail(ErrorKind::usage, "/regen: there is no message to answer yet");
  const ChatMessage old = messages.back();
  if (answered) messages.pop_back();
  const size_t n = messages.size();
  try {
    answer();
  } catch (...) {
    if (answered) messages.push_back(old);
    throw;
  }
  if (answered && messages.size() == n) messages.push_back(old);  // stopped before it began
}

void Chat::show_stats() {
  const auto rate = [](size_t n, double seconds) { return seconds > 0 ? fixed(static_cast<double>(n) / seconds, 1) : std::string("0"); };
  print_status(engine_, session_);
  say(concat("[", conversation_.messages.size(), " messages | context ", session_.tokens().size(), " of ", session_.n_ctx(), " | ",
             n_answers_, " answers of ", n_generated_, " tok, ", rate(n_generated_, decode_seconds_), " tok/s | evaluated ", n_evaluated_,
             " tok of prompts, ", rate(n_evaluated_, prefill_seconds_), " tok/s | seed ", generate_.seed.value_or(first_seed_), "]\n"));
  if (const std::optional<StreamStats> s = engine_.stream_stats())
    say(concat("[experts: ", s->hits, " found in memory, ", s->misses, " read, ", format_size(s->reads.bytes), " in all]\n"));
}

void Chat::send(const std::string& text) {
  std::vector<ChatMessage>& messages = conversation_.messages;
  const size_t n = messages.size();
  messages.push_back({.role = "user", .content = text});
  try {
    answer();
  } catch (...) {
    messages.resize(n);
    throw;
  }
  if (messages.size() == n + 1) messages.resize(n);  // stopped before an answer began
}

std::vector<Token> Chat::prompt_ids(const std::vector<ChatMessage>& messages) {
  std::vector<Token> ids = ids_.prompt(messages);
  if (ids.size() >= session_.n_ctx())
    fail(ErrorKind::usage, "the conversation with this message has ", ids.size(), " tokens, the context ", session_.n_ctx(),
         "; nothing was cut. /clear starts over, /save FILE keeps it for: duet chat --ctx ", std::max<size_t>(ids.size() + 512, 2 * size_t{session_.n_ctx()}),
         " ... and /load FILE");
  return ids;
}

void Chat::answer() {
  std::vector<ChatMessage> messages = conversation_.all();
  const std::vector<Token> prompt = prompt_ids(messages);
  generate_.sampling.seed = generate_.seed.value_or(first_seed_) + n_answers_;
  generator_.emplace(generate_, engine_, session_, true, !interactive_ && stdout_is_file(), print_generated);
  const Generation g = generator_->run(prompt);
  print("\n");
  flush_stdout();
  keep(g, std::move(messages), prompt);
  show_statistics(g);
  generator_.reset();
  if (g.stop == Stop::interrupted && (!interactive_ || !forget_interrupt())) throw Quit{kExitInterrupted};
}

void Chat::keep(const Generation& g, std::vector<ChatMessage> messages, const std::vector<Token>& prompt) {
  ++n_answers_;
  n_generated_ += g.ids.size();
  n_evaluated_ += g.n_prompt - g.n_reused;
  decode_seconds_ += g.decode_seconds;
  prefill_seconds_ += g.prefill_seconds;
  if (g.ids.empty() && g.stop == Stop::interrupted) return note("stopped before the answer began; the message is dropped");
  messages.push_back({.role = "assistant", .content = g.text});
  conversation_.messages.push_back(messages.back());
  ids_.answered(std::move(messages), prompt, g.ids);
}

void Chat::show_statistics(const Generation& g) {
  const std::string text = answer_statistics(g, streaming(engine_, g), session_);
  say(interactive_ && stderr_has_colour() ? "\033[2m" + text + "\033[0m\n" : text + "\n");
  if (g.stop == Stop::context)
    note("the context is full: the answer ends here. /clear starts over; /save keeps the conversation for a chat with a larger --ctx");
}

void run_chat(const ChatOptions& options) {
  static_cast<void>(Sampler(options.generate.sampling));  // refuses before a model is opened
  if (!options.template_name.empty()) static_cast<void>(ChatTemplate::named(options.template_name));
  const bool interactive = ::isatty(STDIN_FILENO) != 0 && ::isatty(STDOUT_FILENO) != 0;
  const Engine engine = open_engine(options.model);
  Chat(options, engine, interactive).run();
}

}  // namespace

void add_chat(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "chat", "Talk with a model on the terminal. Piped in: one message a line, only answers on stdout; the first error ends it");
  auto options = std::make_shared<ChatOptions>();
  options->generate.n_predict = -1;
  add_model_options(command, options->model, "the model's, at most 4096");
  command.add_option("--system", options->system, "System message");
  command.add_option("--template", options->template_name, "Chat template by name [default: the model's own]");
  add_generate_options(command, options->generate);
  add_environment(command);
  command.callback([options] { run_chat(*options); });
}

}  // namespace duet::cli
