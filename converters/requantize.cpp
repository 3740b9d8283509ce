// GGUF -> GGUF of another recipe.
#include <string_view>
#include <unordered_set>

#include "base/error.h"
#include "converters/convert.h"
#include "converters/importance.h"
#include "converters/lora.h"
#include "converters/quantize.h"
#include "converters/recipe.h"
#include "converters/repack.h"
#include "converters/source.h"
#include "converters/target.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

bool replaced_key(std::string_view key) {
  return key == "general.file_type" || key == "general.quantization_version" ||
         key == "general.alignment" || key.starts_with("split.");
}

std::vector<GgufKeyValue> new_metadata(const GgufFile& file, const Recipe& recipe) {
  std::vector<GgufKeyValue> out;
  for (const GgufKeyValue& kv : file.metadata()) {
    if (!replaced_key(kv.key)) out.push_back(kv);
  }
  out.push_back({"general.file_type", GgufValue::u32(static_cast<uint32_t>(recipe.file_type))});
  out.push_back({"general.quantization_version", GgufValue::u32(2)});
  return out;
}

// The tensors that make up one of the table: itself, or the experts of the old layout in order.
// Empty when there are none; Error(format) when only some experts are there.
std::vector<const TensorView*> find_parts(const GgufFile& file, const HParams& hparams,
                                          const TensorSpec& spec) {
  if (const TensorView* whole = file.find_tensor(spec.gguf_name)) return {whole};
  std::vector<const TensorView*> parts;
  if (spec.shape.size() != 3) return parts;
  for (uint32_t e = 0; e < hparams.n_expert; ++e) {
    const std::string name = split_expert_name(spec.kind, spec.layer, static_cast<int>(e));
    const TensorView* part = file.find_tensor(name);
    if (part == nullptr && !parts.empty())
      fail(ErrorKind::format, file.source(), ": tensor '", name,
           "' is missing; the file is incomplete");
    if (part != nullptr) parts.push_back(part);
  }
  if (!parts.empty() && parts.size() != hparams.n_expert)
    fail(ErrorKind::format, file.source(), ": layer ", spec.layer, " has ", parts.size(), " of ",
         hparams.n_expert, " experts");
  return parts;
}

TensorJob make_job(const GgufFile& file, const TensorSpec& spec, const Format& format,
                   const std::vector<const TensorView*>& parts) {
  TensorJob job{spec.gguf_name, &format, spec.shape, {}};
  uint64_t n_rows = 0;
  for (const TensorView* part : parts) {
    n_rows += part->rows();
    if (part->cols() != spec.shape.back())
      fail(ErrorKind::format, file.source(), ": tensor '", part->name, "' has rows of ",
           part->cols(), ", expected ", spec.shape.back());
    // One run per expert, so that a slice is let go as soon as it is done.
    job.runs.push_back(
        {.source = *part, .drop = [file](const TensorView& view) { file.drop(view); }});
  }
  uint64_t expected = 1;
  for (size_t i = 0; i + 1 < spec.shape.size(); ++i) expected *= spec.shape[i];
  if (n_rows != expected)
    fail(ErrorKind::format, file.source(), ": tensor '", spec.gguf_name, "' has ", n_rows,
         " rows, expected ", expected);
  job.must_be_finite = false;
  return job;
}

}  // namespace

ConversionSource open_gguf(const fs::path& input, const ConvertOptions& options) {
  const Recipe& recipe = find_recipe(options.recipe);
  ConversionSource source;
  source.file = GgufFile::open(input);
  const GgufFile& file = *source.file;
  source.identity = identity_of(file);
  TypeRules rules(options);
  const NoticeFn notice = options.notice ? options.notice : [](const std::string&) {};
  const HParams hparams = source.hparams = read_hparams(file, notice);
  source.metadata = new_metadata(file, recipe);
  std::unordered_set<std::string> used;
  for (const TensorSpec& spec : tensor_table(hparams)) {
    const auto parts = find_parts(file, hparams, spec);
    if (parts.empty() && spec.optional) continue;
    if (parts.empty())
      fail(ErrorKind::format, file.source(), ": tensor '", spec.gguf_name,
           "' is missing; the file is incomplete");
    for (const TensorView* part : parts) used.insert(part->name);
    source.jobs.push_back(make_job(file, spec, rules.format(recipe, hparams, spec), parts));
  }
  rules.check_used();
  for (const TensorView& tensor : file.tensors()) {
    if (used.contains(tensor.name)) continue;
    notice(concat("tensor '", tensor.name,
                  "' is copied as it is: not part of the model that the metadata describe"));
    source.jobs.push_back({tensor.name, tensor.format, tensor.shape, {{.source = tensor}}, false});
  }
  apply_imatrix(options, hparams, source.jobs, source.metadata);
  apply_loras(options, source);
  return source;
}

ConvertPlan plan_quantize(const fs::path& input, const ConvertOptions& options) {
  ConversionSource source = open_gguf(input, options);
  choose_types(options, {}, source);
  return plan_parts(source.metadata, source.jobs, recipe_label(options), options);
}

void quantize(const fs::path& input, const fs::path& output, const ConvertOptions& options) {
  ConversionSource source = open_gguf(input, options);
  choose_types(options, {}, source);
  write_parts(output, source.metadata, source.jobs, source.identity, options);
}

}  // namespace duet
