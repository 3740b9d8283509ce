// inspect: what a GGUF file holds, also one that duet cannot run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct InspectOptions {
  std::string model;
  bool tensors = false, json = false;
};

struct TypeShare {
  size_t n_tensors = 0;
  uint64_t n_elems = 0, n_bytes = 0;
};

struct Summary {
  std::string arch, name, layout, tokenizer, chat_template;
  std::optional<std::string> problem;  // why `duet run` would refuse the file
  std::map<std::string, TypeShare> types;
  uint64_t n_params = 0, tensor_bytes = 0;
  double bits_per_weight() const {
    return n_params == 0 ? 0
                         : 8 * static_cast<double>(tensor_bytes) / static_cast<double>(n_params);
  }
};

// By tensor names alone, so that it serves files of any architecture.
std::string layout_of(const GgufFile& file) {
  if (file.tensors().empty()) return "vocabulary only";
  const auto has = [&](const char* name) { return file.find_tensor(name) != nullptr; };
  if (has("blk.0.ffn_down_exps.weight")) return "merged experts";
  return has("blk.0.ffn_down.0.weight") ? "per-expert" : "dense";
}

// What the runtime says of the file; its refusals become text.
template <class Fn>
std::string say(Fn&& fn) {
  try {
    return fn();
  } catch (const Error& e) {
    return e.what();
  }
}

std::string describe_tokenizer(const GgufFile& file) {
  const std::string* model = file.get_string("tokenizer.ggml.model");
  if (model == nullptr) return "none";
  return say([&] {
    const Tokenizer tokenizer = Tokenizer::load(file, {});
    std::string text = concat(*model, ", ", tokenizer.n_vocab(), " tokens");
    if (tokenizer.bos())
      text += concat(", bos ", *tokenizer.bos(), tokenizer.add_bos() ? " (added)" : " (not added)");
    if (tokenizer.eos()) text += concat(", eos ", *tokenizer.eos());
    return text;
  });
}

std::string describe_template(const GgufFile& file) {
  return say([&] {
    const auto chat = ChatTemplate::of_model(file, {});
    return chat ? chat->name() : std::string("none");
  });
}

Summary summarize(const GgufFile& file) {
  Summary s;
  const auto text = [&](const char* key) {
    const std::string* value = file.get_string(key);
    return value != nullptr ? *value : std::string();
  };
  s.arch = text("general.architecture");
  s.name = text("general.name");
  s.layout = layout_of(file);
  s.tokenizer = describe_tokenizer(file);
  s.chat_template = describe_template(file);
  for (const TensorView& tensor : file.tensors()) {
    TypeShare& share = s.types[tensor.format->name];
    ++share.n_tensors;
    share.n_elems += tensor.n_elems();
    share.n_bytes += tensor.data.size();
    s.n_params += tensor.n_elems();
    s.tensor_bytes += tensor.data.size();
  }
  try {
    read_hparams(file, {});
  } catch (const Error& e) {
    s.problem = e.what();
  }
  return s;
}

// ---- metadata values
// -----------------------------------------------------------------------------

constexpr size_t kShownElements = 8;
constexpr size_t kShownBytes = 200;

Json abridge(const std::string& text) {
  return text.size() <= kShownBytes
             ? Json(text)
             : Json(concat(text.substr(0, kShownBytes), "... (", text.size(), " bytes)"));
}
template <class T>
Json abridge(const T& scalar) {
  return scalar;
}
template <class T>
Json abridge(const std::vector<T>& array) {
  Json first = Json::array();
  for (size_t i = 0; i < std::min(array.size(), kShownElements); ++i)
    first.push_back(abridge(T{array[i]}));
  if (array.size() <= kShownElements) return first;
  return Json{{"n", array.size()}, {"first", first}};
}

Json metadata_json(const GgufFile& file) {
  Json out = Json::object();
  for (const GgufKeyValue& kv : file.metadata())
    out[kv.key] = std::visit([](const auto& value) { return abridge(value); }, kv.value.data);
  return out;
}

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string text;
  for (uint64_t n : shape) text += (text.empty() ? "" : " x ") + std::to_string(n);
  return text;
}

// ---- output
// --------------------------------------------------------------------------------------

Json to_json(const GgufFile& file, const Summary& s) {
  Json types = Json::object(), tensors = Json::array();
  for (const auto& [name, share] : s.types)
    types[name] = {
        {"tensors", share.n_tensors}, {"params", share.n_elems}, {"bytes", share.n_bytes}};
  for (const TensorView& t : file.tensors())
    tensors.push_back(
        {{"name", t.name}, {"type", t.format->name}, {"shape", t.shape}, {"bytes", t.data.size()}});
  return {{"arch", s.arch},
          {"name", s.name},
          {"layout", s.layout},
          {"params", s.n_params},
          {"bits_per_weight", s.bits_per_weight()},
          {"file_bytes", file.file_bytes()},
          {"parts", file.n_parts()},
          {"gguf_version", file.version()},
          {"alignment", file.alignment()},
          {"tokenizer", s.tokenizer},
          {"chat_template", s.chat_template},
          {"problem", s.problem ? Json(*s.problem) : Json()},
          {"types", types},
          {"metadata", metadata_json(file)},
          {"tensors", tensors}};
}

void print_field(std::string_view label, std::string_view text) { print(one_line(concat(label, text)) + "\n"); }

void print_summary(const GgufFile& file, const Summary& s) {
  print_field(
      "file:       ",
      concat(file.source(), " (GGUF v", file.version(), ", ", format_size(file.file_bytes()),
             file.n_parts() > 1 ? concat(" in ", file.n_parts(), " parts") : "", ")"));
  print_field("name:       ", s.name.empty() ? "-" : s.name);
  print_field("arch:       ", s.arch.empty() ? "-" : s.arch);
  print_field("layout:     ", s.layout);
  print(formatted("params:     %.3f G, %.2f bits per weight\n", static_cast<double>(s.n_params) / 1e9,
                  s.bits_per_weight()));
  print_field("tokenizer:  ", s.tokenizer);
  print_field("template:   ", s.chat_template);
  if (s.problem) print_field("not run by duet: ", *s.problem);
  for (const auto& [name, share] : s.types)
    print(formatted("  %-6s %5zu tensors  %12s  %5.1f %% of the parameters\n", name.c_str(),
                    share.n_tensors, format_size(share.n_bytes).c_str(),
                    100 * static_cast<double>(share.n_elems) / static_cast<double>(s.n_params)));
}

void print_metadata(const GgufFile& file) {
  print("\n");
  const Json metadata = metadata_json(file);
  for (const auto& [key, value] : metadata.items())
    print_field(concat(key, ": "), to_line(value));
}

void print_tensors(const GgufFile& file) {
  print("\n");
  for (const TensorView& t : file.tensors())
    print(formatted("%-40s %-6s %12s  %s\n", one_line(t.name).c_str(), t.format->name,
                    format_size(t.data.size()).c_str(), shape_text(t.shape).c_str()));
}

void run_inspect(const InspectOptions& options) {
  const GgufFile file = GgufFile::open(model_file(options.model));
  const Summary summary = summarize(file);
  if (options.json) return print_json(to_json(file, summary));
  print_summary(file, summary);
  print_metadata(file);
  if (options.tensors) print_tensors(file);
}

}  // namespace

void add_inspect(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("inspect", "Show what a GGUF file holds");
  auto options = std::make_shared<InspectOptions>();
  command.add_option("MODEL", options->model, "GGUF file, of any architecture")->required();
  command.add_flag("--tensors", options->tensors,
                   "List every tensor: name, type, size, shape (rows x columns)");
  command.add_flag(
      "--json", options->json,
      "One JSON document: {arch, layout, params, tensors: [{name, type, shape, bytes}], ...}");
  add_environment(command);
  command.callback([options] { run_inspect(*options); });
}

}  // namespace duet::cli
