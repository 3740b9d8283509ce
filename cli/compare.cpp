// compare: two models tensor by tensor, and the divergence of their predictions.
#include "converters/compare.h"

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/divergence_report.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "formats/logits_reference.h"
#include "runtime/divergence.h"
#include "runtime/perplexity.h"

namespace duet::cli {
namespace {

namespace fs = std::filesystem;

struct CompareCommand {
  std::string a, b, file;
  ModelOptions model;  // how both are run
  size_t max_chunks = 0;
  bool json = false, file_given = false;  // given: on the command line
};

// In a folder of its own; removed at the end.
class TemporaryFile {
 public:
  TemporaryFile() {
    std::string folder = (fs::temp_directory_path() / "duet-compare-XXXXXX").string();
    if (::mkdtemp(folder.data()) == nullptr) fail(ErrorKind::io, folder, ": cannot make a temporary folder; set TMPDIR");
    folder_ = folder;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }
  fs::path path() const { return folder_ / "predictions.ref"; }

 private:
  fs::path folder_;
};

PerplexityOptions library_options(const CompareCommand& command, ProgressBar& bar) {
  return {.n_ctx = command.model.n_ctx, .n_batch = command.model.n_batch, .max_chunks = command.max_chunks, .kv_type = command.model.kv_type,
          .cancel = &interrupted(), .rows = {},
          .progress = [&bar](const PerplexityResult& so_far, size_t n_chunks) { bar.update(so_far.n_chunks, n_chunks); }};
}

// One model in memory at a time: the predictions of the first pass through a file.
void save_predictions(const CompareCommand& command, const std::string& text, const fs::path& path) {
  ModelOptions model = command.model;
  model.path = command.a;
  const Engine engine = open_engine(model);
  ProgressBar bar("first model", ProgressBar::Unit::chunks);
  save_reference(engine, text, command.a, path, library_options(command, bar));
}

DivergenceResult measure_divergence(const CompareCommand& command) {
  const std::string text = read_text(command.file);
  const TemporaryFile file;
  save_predictions(command, text, file.path());
  ModelOptions model = command.model;
  model.path = command.b;
  LogitsReferenceReader reference = LogitsReferenceReader::open(file.path());
  const Engine engine = open_engine(model);
  ProgressBar bar("second model", ProgressBar::Unit::chunks);
  return divergence(engine, reference, library_options(command, bar));
}

Json to_json(const ModelDifference& difference) {
  Json tensors = Json::array();
  for (const TensorDifference& t : difference.tensors)
    tensors.push_back({{"name", t.name}, {"types", {t.type_a, t.type_b}}, {"bytes", {t.bytes_a, t.bytes_b}}, {"rmse", t.rmse},
                       {"relative", t.relative()}, {"max_error", t.max_error}, {"worst_row", t.worst_row}});
  return {{"tensors", tensors}, {"only_first", difference.only_a}, {"only_second", difference.only_b},
          {"bytes", {difference.bytes_a, difference.bytes_b}}};
}

void print_text(const ModelDifference& difference) {
  print(formatted("%-36s %-11s %-11s %11s %11s %11s %10s\n", "tensor", "first", "second", "size", "size", "RMSE", "relative"));
  for (const TensorDifference& t : difference.tensors)
    print(formatted("%-36s %-11s %-11s %11s %11s %11.4e %10.6f\n", one_line(t.name).c_str(), t.type_a.c_str(), t.type_b.c_str(), format_size(t.bytes_a).c_str(),
                    format_size(t.bytes_b).c_str(), t.rmse, t.relative()));
  for (const std::string& name : difference.only_a) print(concat(one_line(name), ": only in the first\n"));
  for (const std::string& name : difference.only_b) print(concat(one_line(name), ": only in the second\n"));
  size_t n_same = 0;
  for (const TensorDifference& t : difference.tensors) n_same += t.rmse == 0;
  print(concat(difference.tensors.size(), " tensors, ", n_same, " with equal values; ", format_size(difference.bytes_a), " and ",
               format_size(difference.bytes_b), "\n"));
}

// A folder, a file, or the name of a model that is here.
std::string resolved(const std::string& model) { return fs::is_directory(model) ? model : model_file(model).string(); }

// A folder cannot be run: with one a text of the command line is refused, one of a setting is of no use.
void check_text(CompareCommand& command) {
  for (const std::string& model : {command.a, command.b}) {
    if (!fs::is_directory(model)) continue;
    if (command.file_given) fail(ErrorKind::usage, "--file: predictions are those of GGUF files, and ", model, " is a folder; make a file with duet convert");
    command.file.clear();
  }
}

void run_compare(CompareCommand command) {
  command.a = resolved(command.a);
  command.b = resolved(command.b);
  check_text(command);
  std::optional<ProgressBar> bar(std::in_place, "compare", ProgressBar::Unit::bytes);
  const ModelDifference difference = compare_models(command.a, command.b, {.n_threads = command.model.n_threads, .notice = notices(),
      .progress = [&](const ConvertProgress& p) { bar->update(p.done_bytes, p.total_bytes, p.tensor); }, .cancel = &interrupted()});
  bar.reset();
  if (!command.json) print_text(difference);
  std::optional<DivergenceResult> predictions;
  if (!command.file.empty()) predictions = measure_divergence(command);
  if (!command.json) return predictions ? print(divergence_text(*predictions)) : void();
  Json out = to_json(difference);
  if (predictions) out["divergence"] = divergence_json(*predictions);
  print_json(out);
}

}  // namespace

void add_compare(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("compare", "Two models tensor by tensor: types, sizes, errors; with a text, how far their predictions are apart");
  auto options = std::make_shared<CompareCommand>();
  options->model.n_ctx = 512;
  options->model.kv_type = KvType::f32;
  command.add_option("FIRST", options->a, "GGUF file or Hugging Face folder: what errors are measured from")->required();
  command.add_option("SECOND", options->b, "GGUF file or Hugging Face folder")->required();
  const CLI::Option* file = command.add_option("-f,--file", options->file, "Text on which SECOND's predictions are compared with FIRST's; both GGUF files; - is standard input");
  command.add_option("-c,--ctx", options->model.n_ctx, "Positions of a chunk of the text")->check(whole_number(4, 1u << 24))->capture_default_str()->type_name("N")->needs("--file");
  command.add_option("--chunks", options->max_chunks, "Only the first N chunks [default: all]")
      ->check(whole_number(1, uint64_t{1} << 40))
      ->type_name("N")
      ->needs("--file");
  add_memory_option(command, options->model.memory);
  add_threads_option(command, options->model.n_threads);
  command.add_flag("--json", options->json, "One JSON document: {tensors, only_first, only_second, bytes, divergence}");
  add_environment(command);
  command.callback([options, file] {
    options->file_given = file->count() > 0;
    run_compare(*options);
  });
}

}  // namespace duet::cli
