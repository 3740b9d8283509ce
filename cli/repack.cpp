// repack and merge: GGUF files in another arrangement, weights untouched.
#include "converters/repack.h"

#include <CLI/CLI.hpp>
#include <memory>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/model_options.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct RepackCommand {
  std::string input, output, split_max_size;
  bool force = false, resume = false;
};

using WriteFn = void (*)(const std::filesystem::path&, const std::filesystem::path&, const ConvertOptions&);

void run_repack(const RepackCommand& command, const char* label, WriteFn write) {
  const std::filesystem::path input = model_file(command.input);
  ProgressBar bar(label, ProgressBar::Unit::bytes);
  ConvertOptions options;
  options.overwrite = command.force;
  options.resume = command.resume;
  options.program = program_name();
  options.notice = notices();
  options.cancel = &interrupted();
  options.split_max_bytes = split_bytes(command.split_max_size);
  options.progress = [&](const ConvertProgress& p) { bar.update(p.done_bytes, p.total_bytes, p.tensor); };
  with_resumption(command.output, command.resume, [&] { write(input, command.output, options); });
}

void add_shared(CLI::App& command, RepackCommand& options) {
  command.add_option("IN", options.input, "GGUF file (for a split one, any part)")->required();
  command.add_option("OUT", options.output, "GGUF file to write")->required();
  command.add_flag("--force", options.force, "Replace an existing output file, and begin an unfinished one anew");
  add_resume_option(command, options.resume);
}

}  // namespace

void add_repack(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("repack", "GGUF of the old per-expert layout -> merged experts; joins or cuts files; weights keep their bits");
  auto options = std::make_shared<RepackCommand>();
  add_shared(command, *options);
  add_split_option(command, options->split_max_size);
  add_environment(command);
  command.callback([options] { run_repack(*options, "repack", repack); });
}

void add_merge(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("merge", "Split GGUF file (-00001-of-0000N) -> one file");
  auto options = std::make_shared<RepackCommand>();
  add_shared(command, *options);
  add_environment(command);
  command.callback([options] { run_repack(*options, "merge", merge_parts); });
}

}  // namespace duet::cli
