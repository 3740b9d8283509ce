// verify: is a model file whole and sane, which bytes is it, and does it come from that source.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "base/sha256.h"
#include "base/units.h"
#include "calibrate/calibrate.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "converters/compare.h"
#include "converters/quantize.h"
#include "formats/block_check.h"
#include "runtime/model.h"

namespace duet::cli {
namespace {

constexpr int kExitFormat = 4;  // as of Error(format)

struct VerifyCommand {
  std::string file, source;
  int n_threads = 0;
  bool sha256 = false, json = false;
};

struct Part {
  std::string path, sha256;
};

struct Report {
  uint64_t n_tensors = 0, n_blocks = 0, file_bytes = 0;
  uint32_t version = 0;
  std::string layout, types;
  bool calibrated = false;  // weights were moved, not only rounded
  std::vector<Part> parts;
  std::optional<TensorDifference> largest;  // relative error from the source
  std::vector<std::string> problems;
};

// Damage beyond use is an Error already: of the header, of a tensor's place or shape.
GgufFile check_structure(const VerifyCommand& command, Report& report) {
  const GgufFile file = GgufFile::open(command.file);
  const Model model = Model::bind(file, read_hparams(file, notices()));
  report.version = file.version();
  report.file_bytes = file.file_bytes();
  report.layout = model.layout();
  report.types = model.types();
  report.calibrated = file.find(kCalibratedKey) != nullptr;
  for (const auto& path : file.part_paths()) report.parts.push_back({path.string(), {}});
  return file;
}

void check_all_blocks(const VerifyCommand& command, const GgufFile& file, Report& report) {
  ProgressBar bar("blocks", ProgressBar::Unit::bytes);
  const BlockCheck check = check_blocks(file, {.n_threads = thread_count(command.n_threads), .cancel = &interrupted(),
      .progress = [&](uint64_t done, uint64_t total, const std::string& tensor) { bar.update(done, total, tensor); }});
  report.n_tensors = check.n_tensors;
  report.n_blocks = check.n_blocks;
  for (const BadBlocks& bad : check.bad)
    report.problems.push_back(concat("tensor '", bad.tensor, "': block ", bad.first, " (row ", bad.first_row, ") has a scale or value that is not finite; ",
                                     bad.n_bad, " of ", bad.n_blocks, " blocks are bad"));
}

void compute_sums(Report& report) {
  for (Part& part : report.parts) {
    ProgressBar bar("sha256", ProgressBar::Unit::bytes);
    part.sha256 = sha256_of(part.path, [&](uint64_t done) { bar.update(done, report.file_bytes); }, &interrupted());
  }
}

// Relative error (of root mean squares) that the bits of a tensor leave room for: four times what
// rounding of Gaussian weights leaves, 1.6 * 2^-bits. In calibrated files any matrix in blocks may make up for errors of others,
// much coarser ones too: it may be off by half. Other weights, also those of another row or tensor, are off by 1.4.
double allowed_error(const TensorDifference& t, bool calibrated) {
  const double bits = 8.0 * static_cast<double>(t.bytes_b) / static_cast<double>(t.n_elems);
  return bits >= 16 ? 0.01 : std::clamp(4 * 1.6 * std::exp2(-bits), calibrated ? 0.5 : 0.0, 0.95);
}

void check_source(const VerifyCommand& command, Report& report) {
  ProgressBar bar("source", ProgressBar::Unit::bytes);
  const ModelDifference difference = compare_models(command.source, command.file, {.n_threads = command.n_threads, .notice = notices(),
      .progress = [&](const ConvertProgress& p) { bar.update(p.done_bytes, p.total_bytes, p.tensor); }, .cancel = &interrupted()});
  for (const TensorDifference& t : difference.tensors) {
    if (!report.largest || !(t.relative() <= report.largest->relative())) report.largest = t;
    const double allowed = allowed_error(t, report.calibrated);
    if (t.relative() <= allowed) continue;
    report.problems.push_back(concat("tensor '", t.name, "' does not hold the source's weights: relative error ", fixed(t.relative(), 4), ", ", t.type_b,
                                     report.calibrated ? " of a calibrated file allows " : " allows ", fixed(allowed, 4), "; largest in row ", t.worst_row));
  }
  for (const std::string& name : difference.only_a) report.problems.push_back(concat("tensor '", name, "' of the source is missing"));
  for (const std::string& name : difference.only_b) report.problems.push_back(concat("tensor '", name, "' is not in the source"));
}

void print_report_json(const Report& report) {
  Json parts = Json::array();
  for (const Part& part : report.parts) {
    parts.push_back({{"file", part.path}});
    if (!part.sha256.empty()) parts.back()["sha256"] = part.sha256;
  }
  Json out{{"ok", report.problems.empty()}, {"version", report.version}, {"tensors", report.n_tensors}, {"blocks", report.n_blocks},
           {"bytes", report.file_bytes}, {"layout", report.layout}, {"types", report.types}, {"parts", parts}, {"problems", report.problems}};
  if (report.largest) out["largest_error"] = {{"tensor", report.largest->name}, {"relative", report.largest->relative()}};
  print_json(out);
}

void print_report(const VerifyCommand& command, const Report& report) {
  print(concat(command.file, ": GGUF v", report.version, ", ", report.parts.size(), report.parts.size() == 1 ? " file, " : " files, ", report.n_tensors,
               " tensors, ", format_size(report.file_bytes), "; ", report.layout, "; ", report.types, "\n"));
  print(concat("blocks: ", report.n_blocks, ", all finite\n"));
  if (report.largest) print(concat("source: the largest relative error is ", fixed(report.largest->relative(), 6), ", of ", one_line(report.largest->name), " (", report.largest->type_b, ")\n"));
  for (const Part& part : report.parts)
    if (!part.sha256.empty()) print(concat(part.sha256, "  ", part.path, "\n"));
}

void run_verify(VerifyCommand command) {
  Report report;
  command.file = model_file(command.file).string();
  const GgufFile file = check_structure(command, report);
  check_all_blocks(command, file, report);
  if (!command.source.empty() && report.problems.empty()) check_source(command, report);
  if (command.sha256) compute_sums(report);
  if (command.json) print_report_json(report);
  else if (report.problems.empty()) print_report(command, report);
  if (report.problems.empty()) return;
  if (command.json) throw Quit{kExitFormat};
  const size_t more = report.problems.size() - 1;
  fail(ErrorKind::format, command.file, ": ", report.problems[0], more > 0 ? concat(" (and ", more, " more: --json lists them)") : "");
}

}  // namespace

void add_verify(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("verify", "Checks a model file: structure, every block, checksum, and the weights it was made from");
  auto options = std::make_shared<VerifyCommand>();
  command.add_option("FILE", options->file, "GGUF file (for a split one, any part), or the name of a model that is here")->required();
  command.add_option("--source", options->source, "GGUF file or Hugging Face folder with the weights it was made from. Those of a file made with --calibrate "
                     "were moved too: less is noticed")->type_name("SRC");
  command.add_flag("--sha256", options->sha256, "Print the SHA-256 of each file");
  add_threads_option(command, options->n_threads);
  command.add_flag("--json", options->json, "One JSON document: {ok, version, tensors, blocks, bytes, layout, types, parts, problems}");
  add_environment(command);
  command.callback([options] { run_verify(*options); });
}

}  // namespace duet::cli
