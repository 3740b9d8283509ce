// perplexity: how well a model predicts a text, by llama.cpp's method, and how far its predictions are
// from those of a reference.
#include "runtime/perplexity.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/divergence_report.h"
#include "cli/model_options.h"
#include "cli/options.h"
#include "converters/quantize.h"
#include "formats/logits_reference.h"
#include "runtime/divergence.h"

namespace duet::cli {
namespace {

struct PerplexityCommand {
  ModelOptions model;
  std::string file, save_logits, kld;
  size_t max_chunks = 0;
  bool json = false, force = false;
};

PerplexityOptions library_options(const PerplexityCommand& command, ProgressBar& bar) {
  return {.n_ctx = command.model.n_ctx,
          .n_batch = command.model.n_batch,
          .max_chunks = command.max_chunks,
          .kv_type = command.model.kv_type,
          .cancel = &interrupted(),
          .rows = {},
          .progress = [&bar](const PerplexityResult& so_far, size_t n_chunks) {
            bar.update(so_far.n_chunks, n_chunks, std::to_string(so_far.perplexity));
          }};
}

void print_result(const PerplexityCommand& command, const PerplexityResult& r) {
  if (command.json)
    return print_json(Json{{"perplexity", r.perplexity},
                           {"nll", r.nll},
                           {"nll_stderr", r.nll_stderr},
                           {"tokens", r.n_tokens},
                           {"chunks", r.n_chunks},
                           {"ctx", r.n_ctx}});
  print(concat("perplexity ", fixed(r.perplexity, 4), " +- ", fixed(r.perplexity * r.nll_stderr, 4), " (", r.n_tokens,
               " tokens scored, ", r.n_chunks, " chunks of ", r.n_ctx, ")\n"));
}

void measure(const PerplexityCommand& command) {
  if (!command.save_logits.empty()) check_overwrite(command.save_logits, command.force);
  const std::string text = read_text(command.file);
  const Engine engine = open_engine(command.model);
  ProgressBar bar("perplexity", ProgressBar::Unit::chunks);
  const PerplexityOptions options = library_options(command, bar);
  if (command.save_logits.empty()) return print_result(command, perplexity(engine, text, options));
  print_result(command, save_reference(engine, text, engine.info().hparams.name, command.save_logits, options));
}

// The text, when it is given, must be the reference's.
void check_text(const PerplexityCommand& command, const Engine& engine, const LogitsReferenceHeader& header) {
  if (command.file.empty()) return;
  const std::string text = read_text(command.file);
  if (perplexity_chunks(engine, text, header.n_ctx, header.n_chunks) == header.tokens) return;
  fail(ErrorKind::usage, command.kld, ": made from another text, or with another tokenizer, than ", command.file,
       "; leave out --file to measure on the reference's own tokens");
}

void compare_with_reference(PerplexityCommand command) {
  LogitsReferenceReader reference = LogitsReferenceReader::open(command.kld);
  command.model.n_ctx = reference.header().n_ctx;
  const Engine engine = open_engine(command.model);
  check_text(command, engine, reference.header());
  ProgressBar bar("perplexity", ProgressBar::Unit::chunks);
  const DivergenceResult result = divergence(engine, reference, library_options(command, bar));
  if (command.json) return print_json(divergence_json(result));
  print(divergence_text(result));
}

void run_perplexity(const PerplexityCommand& command) {
  if (!command.kld.empty()) return compare_with_reference(command);
  if (command.file.empty()) fail(ErrorKind::usage, "no text given: add --file FILE, or --kld REF to use a reference's");
  measure(command);
}

}  // namespace

void add_perplexity(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "perplexity",
      "Perplexity of a text, by llama.cpp's method: BOS at each chunk, its second half scored; divergence from another model");
  auto options = std::make_shared<PerplexityCommand>();
  options->model.n_ctx = 512;
  options->model.kv_type = KvType::f32;
  add_model_options(command, options->model, "512: the size of a chunk");
  command.add_option("-f,--file", options->file, "File of text; - is standard input");
  command
      .add_option("--chunks", options->max_chunks, "Score only the first N chunks [default: all]")
      ->check(whole_number(1, uint64_t{1} << 40))
      ->type_name("N");
  command.add_option("--save-logits", options->save_logits, "Write the predictions to this file, a reference for --kld")->type_name("REF");
  command.add_flag("--force", options->force, "Replace an existing file of --save-logits")->needs("--save-logits");
  command.add_option("--kld", options->kld, "Kullback-Leibler divergence from the predictions of this reference, on its text and all of its chunks")
      ->type_name("REF")
      ->excludes("--save-logits", "--chunks", "--ctx");
  command.add_flag("--json", options->json,
                   "One JSON document: {perplexity, nll, nll_stderr, tokens, chunks, ctx}, with --kld those of the comparison");
  add_environment(command);
  command.callback([options] { run_perplexity(*options); });
}

}  // namespace duet::cli
