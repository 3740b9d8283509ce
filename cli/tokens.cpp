// tokenize, detokenize: text <-> ids. Only the vocabulary is read, so vocab-only files will do.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct TokenizeOptions {
  std::string model;
  std::optional<std::string> text, file, jsonl;
  bool bos = false, json = false;
};

struct DetokenizeOptions {
  std::string model;
  std::optional<std::string> ids, jsonl;
  bool json = false;
};

Tokenizer load_tokenizer(const std::string& path) {
  return Tokenizer::load(GgufFile::open(model_file(path)), notices());
}

std::vector<Token> encode(const Tokenizer& tokenizer, std::string text, bool bos) {
  const Segment segment{std::move(text), false};
  return tokenizer.encode({&segment, 1}, bos);
}

// Calls body("path:line", value) for the JSON value on every line.
void for_each_json_line(const std::string& path,
                        const std::function<void(const std::string&, const Json&)>& body) {
  const std::string text = read_text(path);
  size_t line = 1;
  for (size_t begin = 0; begin < text.size(); ++line) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string where = concat(path == "-" ? "standard input" : path, ":", line);
    body(where, parse_json(std::string_view(text).substr(begin, end - begin), where));
    begin = end + 1;
  }
}

void run_tokenize(const TokenizeOptions& options) {
  if (!options.text && !options.file && !options.jsonl)
    fail(ErrorKind::usage, "tokenize: give exactly one of --text, --file, --jsonl");
  const Tokenizer tokenizer = load_tokenizer(options.model);
  if (options.jsonl) {
    Json all = Json::array();
    for_each_json_line(*options.jsonl, [&](const std::string& where, const Json& value) {
      if (!value.is_string()) fail(ErrorKind::format, where, ": expected a JSON string");
      Json ids = encode(tokenizer, value.get<std::string>(), options.bos);
      if (options.json)
        all.push_back(std::move(ids));
      else
        print_json(ids);
    });
    if (options.json) print_json(all);
    return;
  }
  const std::vector<Token> ids =
      encode(tokenizer, options.text ? *options.text : read_text(*options.file), options.bos);
  if (options.json) return print_json(Json{{"ids", ids}, {"n_tokens", ids.size()}});
  std::string line;
  for (Token id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
  print(line + "\n");
}

std::vector<Token> ids_of(const Json& value, const std::string& where) {
  const bool good = value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& id) {
                      return id.is_number_integer() && id >= 0 && id <= INT32_MAX;
                    });
  if (!good) fail(ErrorKind::format, where, ": expected a JSON array of token ids");
  return value.get<std::vector<Token>>();
}

void run_detokenize(const DetokenizeOptions& options) {
  if (!options.ids && !options.jsonl)
    fail(ErrorKind::usage, "detokenize: give exactly one of --ids, --jsonl");
  const Tokenizer tokenizer = load_tokenizer(options.model);
  if (options.jsonl) {
    Json all = Json::array();
    for_each_json_line(*options.jsonl, [&](const std::string& where, const Json& value) {
      Json text = tokenizer.decode(ids_of(value, where));
      if (options.json)
        all.push_back(std::move(text));
      else
        print_json(text);
    });
    if (options.json) print_json(all);
    return;
  }
  const std::string text = tokenizer.decode(parse_ids(*options.ids));
  if (options.json) return print_json(Json{{"text", text}});
  print(text + "\n");
}

}  // namespace

void add_tokenize(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("tokenize", "Text to token ids, without BOS unless --bos");
  auto options = std::make_shared<TokenizeOptions>();
  command.add_option("MODEL", options->model, "GGUF file; its vocabulary is enough")->required();
  command.add_option("--text", options->text, "The text");
  command.add_option("--file", options->file, "File of text, taken whole; - is standard input")->excludes("--text");
  command.add_option("--jsonl", options->jsonl,
                     "File with one JSON string per line: prints one JSON array of ids per line")
      ->excludes("--text", "--file");
  command.add_flag("--bos", options->bos, "Put the beginning-of-sequence token first");
  command.add_flag("--json", options->json,
                   "One JSON document: {ids, n_tokens}, or an array of arrays with --jsonl");
  add_environment(command);
  command.callback([options] { run_tokenize(*options); });
}

void add_detokenize(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("detokenize", "Token ids to text; control tokens give none");
  auto options = std::make_shared<DetokenizeOptions>();
  command.add_option("MODEL", options->model, "GGUF file; its vocabulary is enough")->required();
  command.add_option("--ids", options->ids, "Token ids: 1,2,3");
  command.add_option("--jsonl", options->jsonl,
                     "File with one JSON array of ids per line: prints one JSON string per line")
      ->excludes("--ids");
  command.add_flag("--json", options->json,
                   "One JSON document: {text}, or an array of strings with --jsonl");
  add_environment(command);
  command.callback([options] { run_detokenize(*options); });
}

}  // namespace duet::cli
