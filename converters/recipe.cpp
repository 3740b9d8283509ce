#include "converters/recipe.h"

#include <algorithm>

#include "base/error.h"
#include "converters/convert.h"

namespace duet {
namespace {

constexpr Recipe kRecipes[] = {
    {"F32", FileType::F32, DType::F32},        {"F16", FileType::F16, DType::F16},
    {"BF16", FileType::BF16, DType::BF16},     {"Q8_0", FileType::Q8_0, DType::Q8_0},
    {"Q6_K", FileType::Q6_K, DType::Q6_K},     {"Q5_K_M", FileType::Q5_K_M, DType::Q5_K},
    {"Q5_K_S", FileType::Q5_K_S, DType::Q5_K}, {"Q4_K_M", FileType::Q4_K_M, DType::Q4_K},
    {"Q4_K_S", FileType::Q4_K_S, DType::Q4_K}, {"Q4_0", FileType::Q4_0, DType::Q4_0},
    {"Q3_K_L", FileType::Q3_K_L, DType::Q3_K}, {"Q3_K_M", FileType::Q3_K_M, DType::Q3_K},
    {"Q3_K_S", FileType::Q3_K_S, DType::Q3_K}, {"Q2_K", FileType::Q2_K, DType::Q2_K},
    {"IQ4_NL", FileType::IQ4_NL, DType::IQ4_NL}, {"IQ4_XS", FileType::IQ4_XS, DType::IQ4_XS},
};

// The first and the last eighth of the layers, and every third one between.
bool use_more_bits(uint32_t layer, uint32_t n_layer) {
  return layer < n_layer / 8 || layer >= 7 * n_layer / 8 || (layer - n_layer / 8) % 3 == 2;
}

// Eight-expert models: attention is a small part of the file, so it is kept better than elsewhere.
bool eight_experts(const HParams& hparams) { return hparams.n_expert == 8; }

DType attn_v_type(const Recipe& recipe, const HParams& hparams, uint32_t layer) {
  if (eight_experts(hparams)) return DType::Q8_0;
  DType type = recipe.base;
  switch (recipe.file_type) {
    case FileType::Q2_K:
      type = hparams.n_head / hparams.n_head_kv >= 4 ? DType::Q4_K : DType::Q3_K;
      break;
    case FileType::Q3_K_M:
      type = layer < 2 ? DType::Q5_K : DType::Q4_K;
      break;
    case FileType::Q3_K_L:
      type = DType::Q5_K;
      break;
    case FileType::Q4_K_S:
      if (layer < 4) type = DType::Q5_K;
      break;
    case FileType::Q4_K_M:
    case FileType::Q5_K_M:
      if (use_more_bits(layer, hparams.n_layer)) type = DType::Q6_K;
      break;
    case FileType::IQ4_NL:
    case FileType::IQ4_XS:
      if (hparams.n_head / hparams.n_head_kv >= 4) type = DType::Q5_K;
      break;
    default:
      break;
  }
  // The 80-layer Llama with grouped heads ("70B"): attn_v is small there and serves eight heads.
  const bool is_70b =
      hparams.n_expert != 8 && hparams.n_layer == 80 && hparams.n_head != hparams.n_head_kv;
  if (is_70b && (type == DType::Q3_K || type == DType::Q4_K)) type = DType::Q5_K;
  return type;
}

DType attn_output_type(const Recipe& recipe, const HParams& hparams) {
  const bool eight = eight_experts(hparams);
  switch (recipe.file_type) {
    case FileType::Q2_K:
      return eight ? DType::Q5_K : DType::Q3_K;
    case FileType::Q3_K_M:
      return eight ? DType::Q5_K : DType::Q4_K;
    case FileType::Q3_K_L:
      return eight ? recipe.base : DType::Q5_K;
    case FileType::Q3_K_S:
    case FileType::Q4_K_S:
    case FileType::Q4_K_M:
    case FileType::IQ4_NL:
    case FileType::IQ4_XS:
      return eight ? DType::Q5_K : recipe.base;
    default:
      return recipe.base;
  }
}

// With an importance matrix the first layers' stay IQ4 types, and Q4_0 gets an offset there.
DType ffn_down_type(const Recipe& recipe, uint32_t layer, uint32_t n_layer, bool has_imatrix) {
  switch (recipe.file_type) {
    case FileType::Q2_K:
      return DType::Q3_K;
    case FileType::Q3_K_M:
      return layer < n_layer / 16 ? DType::Q5_K : DType::Q4_K;
    case FileType::Q3_K_L:
      return DType::Q5_K;
    case FileType::Q4_K_S:
      return layer < n_layer / 8 ? DType::Q5_K : DType::Q4_K;
    case FileType::IQ4_NL:
    case FileType::IQ4_XS:
      return layer < n_layer / 8 && !has_imatrix ? DType::Q5_K : recipe.base;
    case FileType::Q4_0:
      return layer < n_layer / 8 && has_imatrix ? DType::Q4_1 : recipe.base;
    case FileType::Q4_K_M:
    case FileType::Q5_K_M:
      return use_more_bits(layer, n_layer) ? DType::Q6_K : recipe.base;
    default:
      return recipe.base;
  }
}

// The matrix that gives the logits: Q6_K, or Q8_0 where that is the recipe or rows do not fit.
DType output_type(const Recipe& recipe, uint64_t cols) {
  if (recipe.base == DType::Q8_0 || cols % format_of(recipe.base).block_elems != 0)
    return DType::Q8_0;
  return DType::Q6_K;
}

DType quantized_type(const Recipe& recipe, const HParams& hparams, const TensorSpec& spec, bool has_imatrix) {
  const auto layer = static_cast<uint32_t>(spec.layer);
  switch (spec.kind) {
    case TensorKind::output:
      return output_type(recipe, spec.shape.back());
    case TensorKind::token_embd:
      return hparams.tied_output ? output_type(recipe, spec.shape.back()) : recipe.base;
    case TensorKind::attn_k:
      return eight_experts(hparams) ? DType::Q8_0 : recipe.base;
    case TensorKind::attn_v:
      return attn_v_type(recipe, hparams, layer);
    case TensorKind::attn_output:
      return attn_output_type(recipe, hparams);
    case TensorKind::ffn_down:
    case TensorKind::ffn_down_exps:
      return ffn_down_type(recipe, layer, hparams.n_layer, has_imatrix);
    default:
      return recipe.base;
  }
}

// The format for rows that `type` does not divide.
DType fitting_type(DType type, uint64_t cols) {
  const auto fits = [cols](DType t) { return cols % format_of(t).block_elems == 0; };
  if (fits(type)) return type;
  DType smaller = type;
  switch (type) {
    case DType::Q2_K:
    case DType::Q3_K:
      smaller = DType::Q4_0;
      break;
    case DType::Q4_K:
      smaller = DType::Q5_0;
      break;
    case DType::Q5_K:
      smaller = DType::Q5_1;
      break;
    case DType::Q6_K:
      smaller = DType::Q8_0;
      break;
    case DType::IQ4_XS:
      smaller = DType::IQ4_NL;
      break;
    default:
      break;
  }
  return fits(smaller) ? smaller : DType::F16;
}

bool always_float(const TensorSpec& spec) {
  return spec.shape.size() < 2 || spec.kind == TensorKind::ffn_gate_inp;
}

}  // namespace

std::span<const Recipe> all_recipes() { return kRecipes; }

std::vector<std::string> recipe_names() {
  std::vector<std::string> names;
  for (const Recipe& recipe : kRecipes) names.emplace_back(recipe.name);
  return names;
}

const Recipe& find_recipe(std::string_view name) {
  std::string choices;
  for (const Recipe& recipe : kRecipes) {
    if (name == recipe.name) return recipe;
    choices += concat(choices.empty() ? "" : " ", recipe.name);
  }
  fail(ErrorKind::usage, "unknown type '", name, "'; choose one of: ", choices);
}

const Format& recipe_format(const Recipe& recipe, const HParams& hparams, const TensorSpec& spec, bool has_imatrix) {
  if (always_float(spec)) return format_of(DType::F32);
  const bool quantized = format_of(recipe.base).block_elems > 1;
  if (!quantized) return format_of(recipe.base);
  return format_of(fitting_type(quantized_type(recipe, hparams, spec, has_imatrix), spec.shape.back()));
}

const Format& writable_format(std::string_view name) {
  std::string upper(name);
  for (char& c : upper) c = static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
  const Format* format = find_format(std::string_view(upper));
  if (format != nullptr && format->encode_row != nullptr) return *format;
  std::string choices;
  for (const Format& f : all_formats())
    if (f.encode_row != nullptr) choices += concat(choices.empty() ? "" : " ", f.name);
  fail(ErrorKind::usage, "unknown tensor type '", name, "'; choose one of: ", choices);
}

TypeRules::TypeRules(const ConvertOptions& options) : has_imatrix_(!options.imatrix.empty()) {
  const auto add = [this](const std::string& text, const std::string& pattern, std::string_view type) {
    try {
      rules_.push_back({text, std::regex(pattern), &writable_format(type)});
    } catch (const std::regex_error&) {
      fail(ErrorKind::usage, "tensor rule '", text, "': '", pattern, "' is not a regular expression");
    }
  };
  for (const std::string& rule : options.tensor_types) {
    const size_t at = rule.rfind('=');
    if (at == std::string::npos || at == 0)
      fail(ErrorKind::usage, "tensor rule '", rule, "': expected REGEX=TYPE, such as ffn_down=Q4_K");
    add(rule, rule.substr(0, at), std::string_view(rule).substr(at + 1));
  }
  if (!options.token_embedding_type.empty())
    add("token embedding type", "^token_embd\\.weight$", options.token_embedding_type);
  if (!options.output_tensor_type.empty())
    add("output tensor type", "^output\\.weight$", options.output_tensor_type);
}

const Format& TypeRules::format(const Recipe& recipe, const HParams& hparams, const TensorSpec& spec) {
  if (always_float(spec)) return format_of(DType::F32);
  for (Rule& rule : rules_) {
    if (!std::regex_search(spec.gguf_name, rule.pattern)) continue;
    rule.used = true;
    if (spec.shape.back() % rule.format->block_elems == 0) return *rule.format;
    fail(ErrorKind::usage, "tensor '", spec.gguf_name, "' cannot be ", rule.format->name, ": rows of ",
         spec.shape.back(), " are no multiple of its blocks of ", rule.format->block_elems);
  }
  return recipe_format(recipe, hparams, spec, has_imatrix_);
}

bool TypeRules::name(const std::string& tensor) const {
  return std::any_of(rules_.begin(), rules_.end(), [&](const Rule& rule) { return std::regex_search(tensor, rule.pattern); });
}

void TypeRules::check_used() const {
  for (const Rule& rule : rules_)
    if (!rule.used)
      fail(ErrorKind::usage, "tensor rule '", rule.text, "' fits no tensor of this model that the rules before it leave; give narrower rules first");
}

}  // namespace duet
