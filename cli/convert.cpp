// duet convert, quantize: from a Hugging Face folder or a GGUF file to a GGUF file.
#include "converters/convert.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"
#include "calibrate/calibrate.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

struct ConvertArgs {
  std::string source, output, type, name, imatrix, token_embedding_type, output_tensor_type;
  std::vector<std::string> tensor_types, loras;
  std::string calibrate, split_max_size, target_size, ram;
  double target_bpw = 0;
  size_t calibrate_tokens = 0;
  bool vocab_only = false, dry_run = false, force = false, resume = false, json = false;
  int n_threads = 0;
};

auto progress_on(ProgressBar& bar) {
  return [&bar](const ConvertProgress& p) {
    bar.update(p.done_bytes, p.total_bytes,
               concat(p.tensor_index + 1, "/", p.n_tensors, " ", p.tensor));
  };
}

ConvertOptions library_options(const ConvertArgs& args) {
  ConvertOptions options;
  options.recipe = args.type.empty() ? "Q4_K_M" : args.type;  // empty: a size is asked for
  options.vocab_only = args.vocab_only;
  options.overwrite = args.force;
  options.resume = args.resume;
  options.program = program_name();
  options.n_threads = args.n_threads;
  options.name = args.name;
  options.imatrix = args.imatrix;
  options.split_max_bytes = split_bytes(args.split_max_size);
  if (!args.target_size.empty()) options.target_bytes = std::max<uint64_t>(parse_size(args.target_size), 1);
  options.target_bpw = args.target_bpw;
  options.token_embedding_type = args.token_embedding_type;
  options.output_tensor_type = args.output_tensor_type;
  options.tensor_types = args.tensor_types;
  for (const std::string& lora : args.loras) options.loras.push_back(parse_lora(lora));
  options.notice = notices();
  options.cancel = &interrupted();
  return options;
}

// ---- --dry-run
// -----------------------------------------------------------------------------------

std::string shape_text(const PlannedTensor& tensor) {
  std::string text;
  for (const uint64_t d : tensor.shape) text += concat(text.empty() ? "" : " x ", d);
  return text;
}

void print_plan(const ConvertPlan& plan) {
  for (const PlannedTensor& tensor : plan.tensors)
    print(formatted("%-40s %-5s %22s %12s\n", one_line(tensor.name).c_str(), tensor.format->name, shape_text(tensor).c_str(), format_size(tensor.n_bytes).c_str()));
  print(concat(plan.recipe, ": ", plan.tensors.size(), " tensors, ", format_size(plan.source_bytes), " -> ", format_size(plan.output_bytes), ", ",
               fixed(plan.bits_per_weight, 3), " bits per weight\n"));
  print(concat(plan.n_files == 1 ? "1 file" : concat(plan.n_files, " files"), ", ", plan.file_bytes, " bytes\n"));
}

void print_plan_json(const ConvertPlan& plan) {
  Json tensors = Json::array();
  for (const PlannedTensor& tensor : plan.tensors) {
    tensors.push_back({{"name", tensor.name},
                       {"type", tensor.format->name},
                       {"shape", tensor.shape},
                       {"bytes", tensor.n_bytes}});
  }
  print_json({{"recipe", plan.recipe},
              {"source_bytes", plan.source_bytes},
              {"output_bytes", plan.output_bytes},
              {"file_bytes", plan.file_bytes},
              {"files", plan.n_files},
              {"bits_per_weight", plan.bits_per_weight},
              {"tensors", tensors}});
}

// ---- the commands
// --------------------------------------------------------------------------------

using PlanFn = ConvertPlan (*)(const std::filesystem::path&, const ConvertOptions&);
using CalibratedPlanFn = ConvertPlan (*)(const std::filesystem::path&, const ConvertOptions&,
                                         const CalibrationOptions&);
using CalibratedFn = void (*)(const std::filesystem::path&, const std::filesystem::path&,
                              const ConvertOptions&, const CalibrationOptions&);
using WriteFn = void (*)(const std::filesystem::path&, const std::filesystem::path&,
                         const ConvertOptions&);
// convert or quantize.
struct Conversion {
  const char* label;
  PlanFn plan;
  WriteFn write;
  CalibratedPlanFn plan_calibrated;
  CalibratedFn write_calibrated;
};

CalibrationOptions calibration_options(const ConvertArgs& args) {
  return {.text = read_text(args.calibrate),
          .max_tokens = args.calibrate_tokens,
          .ram_bytes = args.ram.empty() ? 0 : std::max<uint64_t>(parse_size(args.ram), 1)};
}

void run_conversion(const ConvertArgs& args, const Conversion& conversion) {
  if (args.type.empty() && args.target_size.empty() && args.target_bpw == 0)
    fail(ErrorKind::usage, "no type given: add one of ", joined(recipe_names(), " "), ", or --target-size or --target-bpw");
  ConvertOptions options = library_options(args);
  if (args.dry_run) {
    // Only a choice of types depends on the text; it is read in any case, so that a wrong name is found here.
    const ConvertPlan result = args.calibrate.empty() ? conversion.plan(args.source, options)
                                                      : conversion.plan_calibrated(args.source, options, calibration_options(args));
    return args.json ? print_plan_json(result) : print_plan(result);
  }
  if (args.output.empty())
    fail(ErrorKind::usage, "no output file given: add -o OUT.gguf, or --dry-run to see the plan");
  ProgressBar bar(conversion.label, ProgressBar::Unit::bytes);
  options.progress = progress_on(bar);
  with_resumption(args.output, args.resume, [&] {
    if (args.calibrate.empty()) return conversion.write(args.source, args.output, options);
    conversion.write_calibrated(args.source, args.output, options, calibration_options(args));
  });
}

void add_type_options(CLI::App& command, ConvertArgs& args) {
  command.add_option("--token-embedding-type", args.token_embedding_type,
                     "Type of token_embd.weight [default: the mix's]");
  command.add_option("--output-tensor-type", args.output_tensor_type,
                     "Type of output.weight [default: the mix's]");
  command.add_option("--tensor", args.tensor_types,
                     "REGEX=TYPE: type of the matrices in whose name the expression is found; may be "
                     "given several times, the first that fits wins");
}

// Instead of `type`, an option of the same command.
void add_target_options(CLI::App& command, CLI::Option& type, ConvertArgs& args) {
  CLI::Option* size = command
                          .add_option("--target-size", args.target_size,
                                      "Instead of a mix of types: chooses the type of each tensor so that the file "
                                      "has at most this size and loses least. --calibrate measures what each "
                                      "tensor's errors cost, else errors in the weights decide")
                          ->type_name("SIZE")
                          ->excludes(&type);
  command.add_option("--target-bpw", args.target_bpw, "The same by bits per weight on average")
      ->check(CLI::Range(1.0, 32.0).description(""))
      ->type_name("X")
      ->excludes(&type)
      ->excludes(size);
}

void add_shared_options(CLI::App& command, CLI::Option& type, ConvertArgs& args) {
  add_target_options(command, type, args);
  add_type_options(command, args);
  command
      .add_option("--calibrate", args.calibrate,
                  "Text that the encoded weights are fitted to, layer by layer: each makes up for the "
                  "errors of others. Takes some forward passes over the text")
      ->type_name("FILE");
  command
      .add_option("--calibrate-tokens", args.calibrate_tokens,
                  "Tokens of that text to use at most [default: as many as fit in 1 GiB]")
      ->check(whole_number(0))
      ->type_name("N")
      ->needs("--calibrate");
  command
      .add_option("--ram", args.ram,
                  "Most memory that --calibrate may take: it then uses less of the text and of what inputs have "
                  "in common; without --calibrate a conversion takes some hundred MiB anyway")
      ->type_name("SIZE")
      ->needs("--calibrate");
  command.add_option("--imatrix", args.imatrix,
                     "Importance matrix that weights errors: made by duet imatrix or llama-imatrix")
      ->type_name("FILE")
      ->excludes("--calibrate");  // which measures the inputs itself
  add_lora_option(command, args.loras, "Merge this PEFT adapter into the weights");
  add_split_option(command, args.split_max_size);
  // These write one file, which duet repack can cut.
  command.get_option("--split-max-size")->excludes("--target-size", "--target-bpw", "--calibrate");
  add_threads_option(command, args.n_threads);
  command.add_flag("--dry-run", args.dry_run,
                   "Only print what would be written: each tensor's type and size");
  command.add_flag("--json", args.json, "With --dry-run: as JSON")->needs("--dry-run");
  command.add_flag("--force", args.force, "Replace an existing output file, and begin an unfinished one anew");
  add_resume_option(command, args.resume);
}

}  // namespace

void add_convert(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("convert", "Hugging Face model folder -> quantized GGUF file");
  auto args = std::make_shared<ConvertArgs>();
  args->type = "Q4_K_M";
  command.add_option("SRC", args->source, "Folder with *.safetensors, a tokenizer and config.json, or params.json (Mistral's own form)")
      ->required();
  CLI::Option* type = command.add_option("-q,--type", args->type, "Mix of types: " + joined(recipe_names(), " "))
                          ->capture_default_str();
  command.add_option("-o,--output", args->output, "GGUF file to write");
  command.add_option("--name", args->name,
                     "general.name in the file [default: name of the folder]");
  CLI::Option* vocab_only = command.add_flag("--vocab-only", args->vocab_only,
                                             "Only the vocabulary: needs config.json and the tokenizer, writes no tensors");
  add_shared_options(command, *type, *args);
  vocab_only->excludes("--target-size", "--target-bpw", "--tensor", "--token-embedding-type", "--output-tensor-type", "--imatrix", "--lora",
                       "--split-max-size", "--calibrate");
  add_environment(command);
  command.callback([args] {
    run_conversion(*args, {"convert", plan_convert, convert, plan_convert_calibrated, convert_calibrated});
  });
}

void add_quantize(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("quantize", "GGUF file -> GGUF file of other types");
  auto args = std::make_shared<ConvertArgs>();
  command.add_option("IN", args->source, "GGUF file (for a split one, any part)")->required();
  command.add_option("OUT", args->output, "GGUF file to write")->required();
  CLI::Option* type = command.add_option("TYPE", args->type, "Mix of types: " + joined(recipe_names(), " "));
  add_shared_options(command, *type, *args);
  add_environment(command);
  command.callback([args] {
    run_conversion(*args, {"quantize", plan_quantize, quantize, plan_quantize_calibrated, quantize_calibrated});
  });
}

}  // namespace duet::cli
