// imatrix: importance matrix of a model from a text.
#include "formats/imatrix.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <numeric>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "converters/quantize.h"
#include "formats/gguf_parts.h"
#include "runtime/calibration.h"
#include "runtime/perplexity.h"

namespace duet::cli {
namespace {

struct ImatrixCommand {
  ModelOptions model;
  std::string file, output = "imatrix.gguf";
  size_t max_chunks = 0;
  bool output_head = false, force = false, json = false;
};

// Rows that each expert saw, by layer; empty for dense models.
using Coverage = std::vector<std::vector<uint64_t>>;

Coverage coverage_of(const Imatrix& imatrix, const HParams& hparams) {
  Coverage out;
  for (uint32_t layer = 0; hparams.n_expert > 0 && layer < hparams.n_layer; ++layer)
    out.push_back(expert_coverage(imatrix, hparams, layer));
  return out;
}

Json report_json(const ImatrixCommand& command, const Imatrix& imatrix, const Coverage& coverage) {
  return {{"file", command.output}, {"entries", imatrix.entries.size()}, {"chunks", imatrix.n_chunks},
          {"ctx", imatrix.chunk_size}, {"expert_rows", coverage}};
}

std::string report_text(const ImatrixCommand& command, const Imatrix& imatrix, const Coverage& coverage) {
  const uint64_t n_tokens = uint64_t{imatrix.n_chunks} * imatrix.chunk_size;
  std::string out = concat(command.output, ": ", imatrix.entries.size(), " matrices from ", n_tokens, " tokens (",
                           imatrix.n_chunks, " chunks of ", imatrix.chunk_size, ")\n");
  if (coverage.empty()) return out;
  out += "tokens that reached each expert, in percent:\n";
  size_t n_unused = 0;
  for (size_t layer = 0; layer < coverage.size(); ++layer) {
    out += concat("layer ", layer, ":");
    for (const uint64_t n : coverage[layer]) {
      out += " " + fixed(100.0 * static_cast<double>(n) / static_cast<double>(n_tokens), 1);
      n_unused += n == 0;
    }
    out += "\n";
  }
  if (n_unused > 0) out += concat(n_unused, " experts were never used: a longer or more varied text is needed to measure them\n");
  return out;
}

void run_imatrix(const ImatrixCommand& command) {
  check_whole_name(command.output);
  check_overwrite(command.output, command.force);
  static_cast<void>(OutputFile(command.output, 0));  // fails before the work
  const std::string text = read_text(command.file);
  ModelOptions options = command.model;
  if (options.gpu.mode != GpuOptions::Mode::automatic && options.gpu.mode != GpuOptions::Mode::off)
    fail(ErrorKind::unsupported, "the inputs of matrix products are seen on the CPU only; use --gpu off");
  options.gpu.mode = GpuOptions::Mode::off;
  const Engine engine = open_engine(options);
  const std::vector<Token> chunks = perplexity_chunks(engine, text, command.model.n_ctx, command.max_chunks);
  ProgressBar bar("imatrix", ProgressBar::Unit::chunks);
  Imatrix imatrix = collect_imatrix(engine, chunks, command.model.n_ctx,
                                    {.n_batch = command.model.n_batch, .kv_type = command.model.kv_type, .output = command.output_head,
                                     .cancel = &interrupted(), .progress = [&](size_t done, size_t n) { bar.update(done, n); }});
  imatrix.datasets = {std::filesystem::path(command.file).filename().string()};
  write_imatrix(command.output, imatrix);
  const Coverage coverage = coverage_of(imatrix, engine.info().hparams);
  if (command.json) return print_json(report_json(command, imatrix, coverage));
  print(report_text(command, imatrix, coverage));
}

}  // namespace

void add_imatrix(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("imatrix", "Importance matrix: the size of every matrix's inputs over a text, for convert and quantize --imatrix");
  auto options = std::make_shared<ImatrixCommand>();
  options->model.n_ctx = 512;
  options->model.kv_type = KvType::f32;
  add_model_options(command, options->model, "512: the size of a chunk");
  command.add_option("-f,--file", options->file, "File of text; - is standard input")->required();
  command.add_option("-o,--output", options->output, "File to write (GGUF, as llama-imatrix writes it)")->capture_default_str();
  command.add_option("--chunks", options->max_chunks, "Only the first N chunks [default: all]")
      ->check(whole_number(1, uint64_t{1} << 40))
      ->type_name("N");
  command.add_flag("--output-head", options->output_head, "Measure the inputs of the output head (output.weight) too");
  command.add_flag("--force", options->force, "Replace an existing output file");
  command.add_flag("--json", options->json, "One JSON document: {file, entries, chunks, ctx, expert_rows}");
  add_environment(command);
  command.callback([options] { run_imatrix(*options); });
}

}  // namespace duet::cli
