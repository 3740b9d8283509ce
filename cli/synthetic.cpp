// duet make-synthetic: a model of random weights.
#include <CLI/CLI.hpp>
#include <memory>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/options.h"
#include "converters/convert.h"

namespace duet::cli {
namespace {

struct SyntheticArgs {
  SyntheticOptions options;
  std::string output;
};

}  // namespace

void add_make_synthetic(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("make-synthetic", "A model of random weights for benchmarks");
  auto args = std::make_shared<SyntheticArgs>();
  SyntheticOptions& options = args->options;
  command.add_option("SHAPE", options.shape, "8x7b, 8x22b or tiny")
      ->required()
      ->check(CLI::IsMember({"8x7b", "8x22b", "tiny"}));
  command.add_option("--layers", options.n_layer, "Number of layers [default: the shape's own]")
      ->check(whole_number(1, 1024))
      ->type_name("N");
  command.add_option("--type", options.type, "Type of every matrix, for instance Q4_K")
      ->capture_default_str();
  command.add_option("-o,--output", args->output, "GGUF file to write")->required();
  command.add_flag("--split-experts", options.split_experts, "Old layout: one tensor per expert");
  const auto set_routing = [&options](const std::string& name) {
    options.routing = name == "mixtral" ? SyntheticRouting::mixtral : SyntheticRouting::uniform;
  };
  command
      .add_option_function<std::string>("--routing", set_routing,
                                        "Experts of consecutive tokens: uniform: independent; mixtral: shared as often as in Mixtral")
      ->check(CLI::IsMember({"uniform", "mixtral"}))
      ->type_name("KIND")
      ->default_str("uniform");
  command.add_option("--seed", options.seed, "Same seed, same file")->check(whole_number(0))->capture_default_str();
  command.add_flag("--force", options.overwrite, "Replace an existing output file");
  add_threads_option(command, options.n_threads);
  add_environment(command);
  command.callback([args] {
    args->options.notice = notices();
    args->options.cancel = &interrupted();
    ProgressBar bar("make-synthetic", ProgressBar::Unit::bytes);
    args->options.progress = [&bar](const ConvertProgress& p) {
      bar.update(p.done_bytes, p.total_bytes,
                 concat(p.tensor_index + 1, "/", p.n_tensors, " ", p.tensor));
    };
    make_synthetic(args->output, args->options);
  });
}

}  // namespace duet::cli
