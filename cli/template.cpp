// template: a conversation as the prompt text and ids that the model sees.
#include <CLI/CLI.hpp>

#include "base/error.h"
#include "base/json.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct TemplateOptions {
  std::string model, messages, tools, name;
  bool json = false;
};

ChatTemplate choose(const GgufFile& file, const std::string& name) {
  if (!name.empty()) return ChatTemplate::named(name);
  if (const auto found = ChatTemplate::of_model(file, notices())) return *found;
  std::string choices;
  for (const std::string& each : ChatTemplate::names())
    choices += (choices.empty() ? "" : ", ") + each;
  fail(ErrorKind::usage, file.source(),
       ": a base model without a chat template; choose one with --template: ", choices);
}

Json read_json(const std::string& path) { return parse_json(read_text(path), path); }

void run_template(const TemplateOptions& options) {
  const GgufFile file = GgufFile::open(model_file(options.model));
  const Tokenizer tokenizer = Tokenizer::load(file, notices());
  const ChatTemplate chat = choose(file, options.name);
  const Json tools = options.tools.empty() ? Json() : read_json(options.tools);
  const std::vector<Segment> segments =
      chat.render(parse_messages(read_json(options.messages)), tools);
  const std::vector<Token> ids = tokenizer.encode(segments, chat.wants_bos(tokenizer));
  const std::string text =
      tokenizer.decode(ids, true);  // what the model sees, spaces and BOS included
  if (options.json)
    return print_json(Json{{"text", text}, {"ids", ids}, {"template", chat.name()}});
  print(text + "\n");
}

}  // namespace

void add_template(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("template", "Show a conversation as the model's prompt");
  auto options = std::make_shared<TemplateOptions>();
  command.add_option("MODEL", options->model, "GGUF file; its vocabulary is enough")->required();
  command
      .add_option("--messages", options->messages,
                  "File with a JSON array of OpenAI messages; - is standard input")
      ->required();
  command.add_option("--tools", options->tools, "File with a JSON array of OpenAI tools");
  command.add_option("--template", options->name, "Format by name [default: the file's own]");
  command.add_flag("--json", options->json,
                   "One JSON document: {text, ids (BOS included), template}");
  add_environment(command);
  command.callback([options] { run_template(*options); });
}

}  // namespace duet::cli
