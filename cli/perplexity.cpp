// perplexity: how well a model predicts a text, by llama.cpp's method.
#include "runtime/perplexity.h"

#include <CLI/CLI.hpp>
#include <array>
#include <cstdio>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct PerplexityCommand {
  ModelOptions model;
  std::string file;
  size_t max_chunks = 0;
  bool json = false;
};

PerplexityResult measure(const PerplexityCommand& command) {
  const std::string text = read_text(command.file);
  const Engine engine = open_engine(command.model);
  ProgressBar bar("perplexity", ProgressBar::Unit::chunks);
  PerplexityOptions options{.n_ctx = command.model.n_ctx,
                            .n_batch = command.model.n_batch,
                            .max_chunks = command.max_chunks,
                            .kv_type = command.model.kv_type,
                            .cancel = &interrupted(),
                            .progress = {}};
  options.progress = [&](const PerplexityResult& so_far, size_t n_chunks) {
    bar.update(so_far.n_chunks, n_chunks, std::to_string(so_far.perplexity));
  };
  return perplexity(engine, text, options);
}

void run_perplexity(const PerplexityCommand& command) {
  const PerplexityResult r = measure(command);
  if (command.json)
    return print_json(Json{{"perplexity", r.perplexity},
                           {"nll", r.nll},
                           {"nll_stderr", r.nll_stderr},
                           {"tokens", r.n_tokens},
                           {"chunks", r.n_chunks},
                           {"ctx", r.n_ctx}});
  std::array<char, 160> line{};
  std::snprintf(line.data(), line.size(),
                "perplexity %.4f +- %.4f (%zu tokens scored, %zu chunks of %u)\n", r.perplexity,
                r.perplexity * r.nll_stderr, r.n_tokens, r.n_chunks, r.n_ctx);
  print(line.data());
}

}  // namespace

void add_perplexity(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "perplexity",
      "Perplexity of a text, by llama.cpp's method: BOS at each chunk, its second half scored");
  auto options = std::make_shared<PerplexityCommand>();
  options->model.n_ctx = 512;
  options->model.kv_type = KvType::f32;
  add_model_options(command, options->model, "512: the size of a chunk");
  command.add_option("-f,--file", options->file, "File of text; - is standard input")->required();
  command
      .add_option("--chunks", options->max_chunks, "Score only the first N chunks [default: all]")
      ->check(CLI::Range(size_t{1}, size_t{1} << 40).description(""))
      ->type_name("N");
  command.add_flag("--json", options->json,
                   "One JSON document: {perplexity, nll, nll_stderr, tokens, chunks, ctx}");
  add_environment(command);
  command.callback([options] { run_perplexity(*options); });
}

}  // namespace duet::cli
