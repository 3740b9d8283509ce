// Hugging Face folder -> GGUF.
#include "converters/convert.h"

#include <algorithm>
#include <optional>
#include <unordered_set>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/sha256.h"
#include "converters/float8.h"
#include "converters/hf_tokenizer.h"
#include "converters/importance.h"
#include "converters/lora.h"
#include "converters/mistral_folder.h"
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
  const std::string ending = folder.extension().string();
  if (!fs::is_directory(folder) && (ending == ".pt" || ending == ".pth" || ending == ".bin"))
    fail(ErrorKind::unsupported, folder.string(),
         ": a PyTorch pickle, which can run programs when it is read; get the model's .safetensors files, or make some with "
         "torch.load(FILE, weights_only=True) and safetensors.torch.save_file, and convert their folder");
  if (!fs::is_directory(folder))
    fail(ErrorKind::io, folder.string(),
         ": is a file, expected a folder with config.json, *.safetensors and a "
         "tokenizer (for a GGUF file: duet quantize)");
  if (fs::exists(folder / "config.json") || is_mistral_folder(folder)) return;
  fail(ErrorKind::io, folder.string(), ": no config.json and no params.json; not a model folder");
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

// One tensor of a folder, and what is known of its rows beside their place.
struct SourceTensor {
  const TensorView* view;
  RowChange scale;

  RowRun run(uint64_t first_row, uint64_t n_rows) const {
    RowRun out{.source = row_slice(*view, first_row, n_rows)};
    if (scale) out.scale = [change = scale, first_row](uint64_t row, float* values) { change(first_row + row, values); };
    return out;
  }
};

using Names = std::unordered_set<std::string>;

SourceTensor source_tensor(const Safetensors& weights, const std::string& name, const std::vector<uint64_t>& expected, Names& used) {
  const TensorView& view = checked_source(weights, name, expected);
  std::string scale_name;
  SourceTensor out{&view, float8_scales(weights, view, scale_name)};
  used.insert(name);
  if (out.scale) used.insert(scale_name);
  return out;
}

// One fused tensor [E, rows, cols] or [E, 2 * rows, cols] of gate and up: its rows, expert by
// expert.
std::vector<RowRun> fused_runs(const Safetensors& weights, const HfSource& form,
                               const TensorSpec& spec, Names& used) {
  std::vector<uint64_t> expected = spec.shape;
  const uint64_t n_expert = spec.shape[0], rows = spec.shape[1];
  const bool half = form.rows != HfSource::Rows::all;
  if (half) expected[1] *= 2;
  const SourceTensor tensor = source_tensor(weights, form.names[0], expected, used);
  const uint64_t offset = form.rows == HfSource::Rows::second_half ? rows : 0;
  std::vector<RowRun> runs;
  for (uint64_t e = 0; e < n_expert; ++e) {
    runs.push_back(tensor.run(e * expected[1] + offset, rows));
  }
  return runs;
}

// One matrix [E * n_ff, n_embd] for all experts, also for the down projections [n_embd, n_ff].
std::vector<RowRun> stacked_runs(const Safetensors& weights, const HfSource& form, const TensorSpec& spec, Names& used) {
  const uint64_t n_expert = spec.shape[0], rows = spec.shape[form.transposed ? 2 : 1], cols = spec.shape[form.transposed ? 1 : 2];
  const SourceTensor tensor = source_tensor(weights, form.names[0], {n_expert * rows, cols}, used);
  if (tensor.scale && form.transposed) fail(ErrorKind::unsupported, "tensor '", form.names[0], "' is of 8-bit floats and to be transposed");
  std::vector<RowRun> runs;
  for (uint64_t e = 0; e < n_expert; ++e) {
    runs.push_back(tensor.run(e * rows, rows));
    runs.back().transposed = form.transposed;
  }
  return runs;
}

// Heads whose rows a rope permutation reorders.
uint32_t permuted_heads(const HParams& hparams, const TensorSpec& spec) {
  return spec.kind == TensorKind::attn_k ? hparams.n_head_kv : hparams.n_head;
}

std::vector<RowRun> source_runs(const Safetensors& weights, const HfSource& form,
                                const HParams& hparams, const TensorSpec& spec, Names& used) {
  if (form.stacked) return stacked_runs(weights, form, spec, used);
  if (spec.shape.size() == 3 && form.names.size() == 1) return fused_runs(weights, form, spec, used);
  const std::vector<uint64_t> expected(
      spec.shape.end() - std::min<ptrdiff_t>(2, std::ssize(spec.shape)), spec.shape.end());
  std::vector<RowRun> runs;
  for (const std::string& name : form.names) {
    const SourceTensor tensor = source_tensor(weights, name, expected, used);
    RowRun run{.source = *tensor.view, .permute_heads = form.permute_rope ? permuted_heads(hparams, spec) : 0};
    run.scale = tensor.scale;
    runs.push_back(std::move(run));
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
  return name.ends_with("rotary_emb.inv_freq") || name == "rope.freqs" || name.ends_with(".attn.bias") ||
         name.ends_with(".input_scale") || name.ends_with(".k_scale") || name.ends_with(".v_scale") ||  // of activations
         name.ends_with(".attn.masked_bias") || (hparams.tied_output && name == "lm_head.weight");
}

void check_all_used(const Safetensors& weights, const Names& used,
                    const HParams& hparams) {
  for (const TensorView& tensor : weights.tensors()) {
    if (used.contains(tensor.name) || known_extra(tensor.name, hparams)) continue;
    fail(ErrorKind::format, "tensor '", tensor.name, "' ", shape_text(tensor.shape),
         " belongs to no part of the model that config.json describes; it would be lost");
  }
}

void make_jobs(ConversionSource& model, bool mistral, const Recipe& recipe, TypeRules rules) {
  const Safetensors& weights = *model.weights;
  Names used;
  for (const TensorSpec& spec : tensor_table(model.hparams)) {
    if (spec.kind == TensorKind::rope_freqs) {
      model.rope_factors = llama3_rope_freqs(model.hparams);
      model.jobs.push_back(rope_factor_job(spec, model.rope_factors));
      continue;
    }
    if (spec.kind == TensorKind::output && model.hparams.tied_output) continue;
    const std::vector<HfSource> forms = mistral ? mistral_sources(model.hparams, spec) : hf_sources(model.hparams, spec);
    const HfSource* form = find_form(forms, weights);
    if (form == nullptr)
      fail(ErrorKind::format, "tensor '", missing_name(forms, weights),
           "' is missing from the folder (for ", spec.gguf_name, ")");
    model.jobs.push_back({spec.gguf_name, &rules.format(recipe, model.hparams, spec), spec.shape,
                          source_runs(weights, *form, model.hparams, spec, used)});
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
  const bool mistral = is_mistral_folder(folder);
  const std::string source = (folder / (mistral ? "params.json" : "config.json")).string();
  const NoticeFn notice = options.notice ? options.notice : [](const std::string&) {};
  ConversionSource model;
  if (mistral) model.weights = open_consolidated(folder);
  const Json config = mistral ? config_of_params(folder, *model.weights, notice)
                              : parse_json(read_file(folder / "config.json", kMaxConfigBytes), source);
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
    if (!model.weights) model.weights = Safetensors::open(folder);
    make_jobs(model, mistral, recipe, TypeRules(options));
    model.identity = identity_of(*model.weights) + sha256_of(std::as_bytes(std::span(model.rope_factors)));
    apply_loras(options, model);
    apply_imatrix(options, model.hparams, model.jobs, model.metadata);
  }
  model.metadata.insert(model.metadata.end(), tokenizer.begin(), tokenizer.end());
  return model;
}

ConvertPlan plan_convert(const fs::path& folder, const ConvertOptions& options) {
  ConversionSource model = open_folder(folder, options);
  choose_types(options, {}, model);
  return plan_parts(model.metadata, model.jobs, options.vocab_only ? "vocabulary" : recipe_label(options), options);
}

void convert(const fs::path& folder, const fs::path& output, const ConvertOptions& options) {
  ConversionSource model = open_folder(folder, options);
  choose_types(options, {}, model);
  write_parts(output, model.metadata, model.jobs, model.identity, options);
}

}  // namespace duet
