// Hugging Face folder -> GGUF.
#include "converters/convert.h"

#include <algorithm>
#include <optional>
#include <unordered_set>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "converters/hf_tokenizer.h"
#include "converters/importance.h"
#include "converters/quantize.h"
#include "converters/recipe.h"
#include "converters/repack.h"
#include "converters/source.h"
#include "converters/target.h"
#include "formats/safetensors.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxConfigBytes = uint64_t{4} << 20;

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += concat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

void require_folder(const fs::path& folder) {
  if (!fs::exists(folder)) fail(ErrorKind::io, folder.string(), ": no such folder");
  if (!fs::is_directory(folder))
    fail(ErrorKind::io, folder.string(),
         ": is a file, expected a folder with config.json, *.safetensors and a "
         "tokenizer (for a GGUF file: duet quantize)");
  if (fs::exists(folder / "config.json")) return;
  if (fs::exists(folder / "params.json"))
    fail(ErrorKind::unsupported, folder.string(),
         ": Mistral's native layout (params.json); use the Hugging Face form of the model "
         "(config.json)");
  fail(ErrorKind::io, folder.string(), ": no config.json; not a Hugging Face model folder");
}

// ---- from names to rows -------------------------------------------------------------------------

const TensorView& checked_source(const Safetensors& weights, const std::string& name,
                                 const std::vector<uint64_t>& expected) {
  const TensorView& tensor = *weights.find_tensor(name);
  if (tensor.shape != expected)
    fail(ErrorKind::format, "tensor '", name, "': shape ", shape_text(tensor.shape),
         ", config.json asks for ", shape_text(expected),
         "; weights and config.json do not belong together");
  return tensor;
}

// First of the accepted forms whose tensors are all there; null when there is none.
const HfSource* find_form(const std::vector<HfSource>& forms, const Safetensors& weights) {
  for (const HfSource& form : forms) {
    const auto present = [&](const std::string& name) {
      return weights.find_tensor(name) != nullptr;
    };
    if (!form.names.empty() && std::all_of(form.names.begin(), form.names.end(), present))
      return &form;
  }
  return nullptr;
}

// The missing tensor of the form that is nearest to complete.
std::string missing_name(const std::vector<HfSource>& forms, const Safetensors& weights) {
  std::string best;
  size_t most_found = 0;
  for (const HfSource& form : forms) {
    size_t found = 0;
    std::string missing;
    for (const std::string& name : form.names) {
      if (weights.find_tensor(name) != nullptr)
        ++found;
      else if (missing.empty())
        missing = name;
    }
    if (best.empty() || found > most_found) best = missing;
    most_found = std::max(most_found, found);
  }
  return best;
}

// One fused tensor [E, rows, cols] or [E, 2 * rows, cols] of gate and up: its rows, expert by
// expert.
std::vector<RowRun> fused_runs(const Safetensors& weights, const HfSource& form,
                               const TensorSpec& spec) {
  std::vector<uint64_t> expected = spec.shape;
  const uint64_t n_expert = spec.shape[0], rows = spec.shape[1];
  const bool half = form.rows != HfSource::Rows::all;
  if (half) expected[1] *= 2;
  const TensorView& tensor = checked_source(weights, form.names[0], expected);
  const uint64_t offset = form.rows == HfSource::Rows::second_half ? rows : 0;
  std::vector<RowRun> runs;
  for (uint64_t e = 0; e < n_expert; ++e) {
    runs.push_back({.source = row_slice(tensor, e * expected[1] + offset, rows)});
  }
  return runs;
}

// Heads whose rows a rope permutation reorders.
uint32_t permuted_heads(const HParams& hparams, const TensorSpec& spec) {
  return spec.kind == TensorKind::attn_k ? hparams.n_head_kv : hparams.n_head;
}

std::vector<RowRun> source_runs(const Safetensors& weights, const HfSource& form,
                                const HParams& hparams, const TensorSpec& spec) {
  if (spec.shape.size() == 3 && form.names.size() == 1) return fused_runs(weights, form, spec);
  const std::vector<uint64_t> expected(
      spec.shape.end() - std::min<ptrdiff_t>(2, std::ssize(spec.shape)), spec.shape.end());
  std::vector<RowRun> runs;
  for (const std::string& name : form.names) {
    runs.push_back({.source = checked_source(weights, name, expected),
                    .permute_heads = form.permute_rope ? permuted_heads(hparams, spec) : 0});
  }
  return runs;
}

TensorJob rope_factor_job(const TensorSpec& spec, const std::vector<float>& factors) {
  const Format& f32 = format_of(DType::F32);
  if (spec.shape != std::vector<uint64_t>{factors.size()})
    fail(ErrorKind::internal, "rope factors: ", factors.size(), " for shape ",
         shape_text(spec.shape));
  return {spec.gguf_name,
          &f32,
          spec.shape,
          {{.source = {spec.gguf_name, &f32, spec.shape, std::as_bytes(std::span(factors))}}}};
}

// ---- the folder as a whole ---------------------------------------------------------------------

// Tensors that folders hold and GGUF does not: tables that follow from config.json, and the copy of
// the embedding that some tools write for tied models.
bool known_extra(const std::string& name, const HParams& hparams) {
  return name.ends_with("rotary_emb.inv_freq") || name.ends_with(".attn.bias") ||
         name.ends_with(".attn.masked_bias") || (hparams.tied_output && name == "lm_head.weight");
}

void check_all_used(const Safetensors& weights, const std::unordered_set<std::string>& used,
                    const HParams& hparams) {
  for (const TensorView& tensor : weights.tensors()) {
    if (used.contains(tensor.name) || known_extra(tensor.name, hparams)) continue;
    fail(ErrorKind::format, "tensor '", tensor.name, "' ", shape_text(tensor.shape),
         " belongs to no part of the model that config.json describes; it would be lost");
  }
}

void make_jobs(ConversionSource& model, const Recipe& recipe, TypeRules rules) {
  const Safetensors& weights = *model.weights;
  std::unordered_set<std::string> used;
  for (const TensorSpec& spec : tensor_table(model.hparams)) {
    if (spec.kind == TensorKind::rope_freqs) {
      model.rope_factors = llama3_rope_freqs(model.hparams);
      model.jobs.push_back(rope_factor_job(spec, model.rope_factors));
      continue;
    }
    if (spec.kind == TensorKind::output && model.hparams.tied_output) continue;
    const std::vector<HfSource> forms = hf_sources(model.hparams, spec);
    const HfSource* form = find_form(forms, weights);
    if (form == nullptr)
      fail(ErrorKind::format, "tensor '", missing_name(forms, weights),
           "' is missing from the folder (for ", spec.gguf_name, ")");
    used.insert(form->names.begin(), form->names.end());
    model.jobs.push_back({spec.gguf_name, &rules.format(recipe, model.hparams, spec), spec.shape,
                          source_runs(weights, *form, model.hparams, spec)});
    for (RowRun& run : model.jobs.back().runs)
      run.drop = [weights](const TensorView& view) { weights.drop(view); };
  }
  rules.check_used();
  check_all_used(weights, used, model.hparams);
}

std::string folder_name(const fs::path& folder) {
  const fs::path path = fs::absolute(folder).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

}  // namespace

ConversionSource open_folder(const fs::path& folder, const ConvertOptions& options) {
  require_folder(folder);
  const std::string source = (folder / "config.json").string();
  const Json config = parse_json(read_file(folder / "config.json", kMaxConfigBytes), source);
  const NoticeFn notice = options.notice ? options.notice : [](const std::string&) {};
  ConversionSource model;
  model.hparams = read_hf_config(config, source, notice);
  model.hparams.name = options.name.empty() ? folder_name(folder) : options.name;
  model.metadata = hparams_metadata(model.hparams);
  const std::vector<GgufKeyValue> tokenizer =
      read_hf_tokenizer(folder, config, model.hparams.n_vocab, notice);
  if (!options.vocab_only) {
    const Recipe& recipe = find_recipe(options.recipe);
    model.metadata.push_back(
        {"general.file_type", GgufValue::u32(static_cast<uint32_t>(recipe.file_type))});
    model.metadata.push_back({"general.quantization_version", GgufValue::u32(2)});
    model.weights = Safetensors::open(folder);
    make_jobs(model, recipe, TypeRules(options));
    apply_imatrix(options, model.hparams, model.jobs, model.metadata);
  }
  model.metadata.insert(model.metadata.end(), tokenizer.begin(), tokenizer.end());
  return model;
}

ConvertPlan plan_convert(const fs::path& folder, const ConvertOptions& options) {
  ConversionSource model = open_folder(folder, options);
  choose_types(options, {}, model);
  return plan_of(model.jobs, options.vocab_only ? "vocabulary" : recipe_label(options));
}

void convert(const fs::path& folder, const fs::path& output, const ConvertOptions& options) {
  check_overwrite(output, options.overwrite);
  ConversionSource model = open_folder(folder, options);
  choose_types(options, {}, model);
  write_parts(output, model.metadata, model.jobs, options);
}

}  // namespace duet
