#include "formats/lora.h"

#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <regex>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/safetensors.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxConfigBytes = uint64_t{4} << 20;
constexpr size_t kMaxPattern = 256;
constexpr size_t kMaxRank = 1024;

struct Config {
  double alpha = 0;
  bool square_root = false;
  std::vector<std::pair<std::string, double>> alpha_patterns;

  static Config read(const fs::path& path);
  double scale(const std::string& module, size_t rank) const;
};

Config Config::read(const fs::path& path) {
  const std::string source = path.string();
  const Json json = parse_json(read_file(path, kMaxConfigBytes), source);
  if (!json.is_object()) fail(ErrorKind::format, source, ": no JSON object");
  if (const auto type = json_get_or<std::string>(json, "peft_type", "LORA", source); type != "LORA")
    fail(ErrorKind::unsupported, source, ": peft_type ", quote(type), " is not supported (LORA)");
  for (const char* key : {"use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"})
    if (json_get_or<bool>(json, key, false, source)) fail(ErrorKind::unsupported, source, ": '", key, "' is not supported");
  if (const auto bias = json_get_or<std::string>(json, "bias", "none", source); bias != "none")
    fail(ErrorKind::unsupported, source, ": 'bias' ", quote(bias), " is not supported (none)");
  // Those change the base model's own weights, this one its layers.
  if (const auto init = json.find("init_lora_weights"); init != json.end() && init->is_string())
    for (const char* method : {"pissa", "olora", "corda", "loftq"})
      if (init->get<std::string>().starts_with(method))
        fail(ErrorKind::unsupported, source, ": 'init_lora_weights' ", quote(init->get<std::string>()), " is not supported; save the adapter converted to a plain one (PEFT: path_initial_model_for_weight_conversion)");
  if (const auto layers = json.find("layer_replication"); layers != json.end() && !layers->is_null())
    fail(ErrorKind::unsupported, source, ": 'layer_replication' is not supported");
  Config out;
  out.alpha = json_get<double>(json, "lora_alpha", source);
  out.square_root = json_get_or<bool>(json, "use_rslora", false, source);
  const auto patterns = json.find("alpha_pattern");
  if (patterns == json.end() || patterns->is_null()) return out;
  if (!patterns->is_object()) fail(ErrorKind::format, source, ": 'alpha_pattern' is no JSON object");
  for (const auto& [pattern, alpha] : patterns->items()) {
    if (!alpha.is_number() || pattern.size() > kMaxPattern) fail(ErrorKind::format, source, ": 'alpha_pattern' ", quote(pattern), " is no pattern with a number");
    out.alpha_patterns.emplace_back(pattern, alpha.get<double>());
  }
  return out;
}

double Config::scale(const std::string& module, size_t rank) const {
  double value = alpha;
  for (const auto& [pattern, special] : alpha_patterns) {
    try {
      if (!std::regex_match(module, std::regex("(.*\\.)?(" + pattern + ")"))) continue;
    } catch (const std::regex_error&) {
      fail(ErrorKind::unsupported, "adapter_config.json: 'alpha_pattern' ", quote(pattern), " is no expression that duet knows");
    }
    value = special;
    break;
  }
  return value / (square_root ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
}

// Which matrix a module of the Hugging Face model is.
struct Target {
  TensorSpec spec;
  int expert = -1;
};

std::map<std::string, Target> targets_of(const HParams& hparams) {
  std::map<std::string, Target> out;
  for (const TensorSpec& spec : tensor_table(hparams)) {
    if (spec.shape.size() < 2 || spec.kind == TensorKind::token_embd) continue;
    for (const HfSource& form : hf_sources(hparams, spec)) {
      if (spec.shape.size() == 3 && form.names.size() == 1 && hparams.n_expert > 1) continue;  // fused: by shape
      for (size_t i = 0; i < form.names.size(); ++i)
        out[form.names[i].substr(0, form.names[i].rfind(".weight"))] = {spec, spec.shape.size() == 3 ? static_cast<int>(i) : -1};
    }
  }
  return out;
}

std::vector<float> floats(const TensorView& view) {
  std::vector<float> out(view.n_elems());
  view.format->decode_row(view.data.data(), out.data(), out.size());
  for (const float v : out)
    if (!std::isfinite(v)) fail(ErrorKind::format, "adapter tensor '", view.name, "': a value is not finite (NaN or infinity)");
  return out;
}

std::string text_of(const std::vector<uint64_t>& shape) {
  std::string out;
  for (const uint64_t d : shape) out += concat(out.empty() ? "[" : ", ", d);
  return out + "]";
}

// A module's pair of matrices.
struct Pair {
  const TensorView* a = nullptr;
  const TensorView* b = nullptr;
};

class AdapterReader {
 public:
  AdapterReader(const HParams& hparams, Config config, double strength)
      : hparams_(hparams), config_(std::move(config)), strength_(strength), targets_(targets_of(hparams)) {}

  std::vector<LoraPart> read(const Safetensors& file) {
    for (const TensorView& tensor : file.tensors()) place(tensor);
    for (const auto& [module, pair] : pairs_) {
      if (pair.a == nullptr || pair.b == nullptr)
        fail(ErrorKind::format, "adapter: '", module, "' has only one of lora_A and lora_B");
      add(module, pair);
    }
    return std::move(parts_);
  }

 private:
  void place(const TensorView& tensor) {
    std::string name = tensor.name;
    constexpr std::string_view kPrefix = "base_model.model.";
    if (name.starts_with(kPrefix)) name.erase(0, kPrefix.size());
    for (const char* ending : {".lora_A.weight", ".lora_B.weight"}) {
      if (!name.ends_with(ending)) continue;
      if (tensor.shape.size() != 2) fail(ErrorKind::format, "adapter tensor '", tensor.name, "' has ", tensor.shape.size(), " dimensions, expected 2");
      Pair& pair = pairs_[name.substr(0, name.size() - std::string_view(ending).size())];
      (ending[6] == 'A' ? pair.a : pair.b) = &tensor;
      return;
    }
    fail(ErrorKind::unsupported, "adapter tensor '", tensor.name, "' has no place here: duet applies lora_A and lora_B of matrices; merge it by peft's merge_and_unload()");
  }

  void add(const std::string& module, const Pair& pair) {
    std::string stem = module;
    while (stem.ends_with(".base_layer")) stem.resize(stem.size() - std::string_view(".base_layer").size());
    if (const auto it = targets_.find(stem); it != targets_.end()) return add_matrix(module, pair, it->second);
    if (const auto layer = fused_layer(stem)) return add_fused(stem, pair, *layer);
    if (stem == "lm_head" && hparams_.tied_output)
      fail(ErrorKind::unsupported, "adapter: 'lm_head' of a model whose output is its embedding; merge it by peft's merge_and_unload()");
    fail(ErrorKind::unsupported, "adapter: '", module, "' is no matrix of this model that an adapter can change (", hparams_.n_layer, " layers, ", hparams_.n_expert, " experts)");
  }

  void add_matrix(const std::string& module, const Pair& pair, const Target& target) {
    const uint64_t cols = target.spec.shape.back(), rows = target.spec.shape[target.spec.shape.size() - 2], rank = pair.a->shape[0];
    check_shapes(module, pair, cols, rows, rank);
    check_rank(module, rank);
    LoraPart part{target.spec.kind, target.spec.layer, target.expert, rank, floats(*pair.a), floats(*pair.b)};
    const auto scale = static_cast<float>(config_.scale(module, rank) * strength_);
    for (float& v : part.b) v *= scale;
    if (part.kind == TensorKind::attn_q) interleave(part, hparams_.n_head);
    if (part.kind == TensorKind::attn_k) interleave(part, hparams_.n_head_kv);
    parts_.push_back(std::move(part));
  }

  void check_rank(const std::string& module, uint64_t rank) const {
    if (rank > kMaxRank) fail(ErrorKind::unsupported, "adapter: '", module, "' is of rank ", rank, "; at most ", kMaxRank);
  }

  void check_shapes(const std::string& module, const Pair& pair, uint64_t cols, uint64_t rows, uint64_t rank) const {
    if (rank == 0 || pair.a->shape != std::vector<uint64_t>{rank, cols} || pair.b->shape != std::vector<uint64_t>{rows, rank})
      fail(ErrorKind::format, "adapter: '", module, "': lora_A ", text_of(pair.a->shape), " and lora_B ", text_of(pair.b->shape), " do not fit a matrix ",
           text_of({rows, cols}), "; it was made for another model");
  }

  // Rows of half-split pairs -> rows of interleaved pairs.
  void interleave(LoraPart& part, uint32_t n_heads) const {
    const size_t n_rows = part.b.size() / part.rank, head_dim = n_rows / n_heads, half = head_dim / 2;
    std::vector<float> out;
    out.reserve(part.b.size());
    for (size_t row = 0; row < n_rows; ++row) {
      const size_t i = row % head_dim;
      const auto from = part.b.begin() + static_cast<ptrdiff_t>((row - i + i % 2 * half + i / 2) * part.rank);
      out.insert(out.end(), from, from + static_cast<ptrdiff_t>(part.rank));
    }
    part.b = std::move(out);
  }

  std::optional<int> fused_layer(const std::string& stem) const {
    for (int layer = 0; hparams_.n_expert > 0 && layer < static_cast<int>(hparams_.n_layer); ++layer)
      if (stem == concat("model.layers.", layer, ".mlp.experts")) return layer;
    return std::nullopt;
  }

  // Experts of a fused parameter [E, rows, cols]: row e * rank + r of A, column r * E + e of B.
  void add_fused(const std::string& stem, const Pair& pair, int layer) {
    const uint64_t n_expert = hparams_.n_expert, n_ff = hparams_.n_ff, n_embd = hparams_.n_embd, rank = pair.a->shape[0] / n_expert;
    const bool gate_up = pair.a->shape[1] == n_embd && pair.b->shape[0] == 2 * n_ff;
    check_shapes(stem, pair, gate_up ? n_embd : n_ff, gate_up ? 2 * n_ff : n_embd, rank * n_expert);
    check_rank(stem, rank);
    const auto scale = static_cast<float>(config_.scale(stem + (gate_up ? ".gate_up_proj" : ".down_proj"), rank) * strength_);
    const std::vector<float> a = floats(*pair.a), b = floats(*pair.b);
    for (uint64_t e = 0; e < n_expert; ++e) {
      const auto first = a.begin() + static_cast<ptrdiff_t>(e * rank * pair.a->shape[1]);
      const std::vector<float> own_a(first, first + static_cast<ptrdiff_t>(rank * pair.a->shape[1]));
      const auto part = [&](TensorKind kind, uint64_t first_row, uint64_t n_rows) {
        LoraPart out{kind, layer, static_cast<int>(e), rank, own_a, {}};
        for (uint64_t row = first_row; row < first_row + n_rows; ++row)
          for (uint64_t r = 0; r < rank; ++r) out.b.push_back(scale * b[row * rank * n_expert + r * n_expert + e]);
        parts_.push_back(std::move(out));
      };
      if (gate_up) {
        part(TensorKind::ffn_gate_exps, 0, n_ff);
        part(TensorKind::ffn_up_exps, n_ff, n_ff);
      } else {
        part(TensorKind::ffn_down_exps, 0, n_embd);
      }
    }
  }

  const HParams& hparams_;
  Config config_;
  double strength_;
  std::map<std::string, Target> targets_;
  std::map<std::string, Pair> pairs_;
  std::vector<LoraPart> parts_;
};

Safetensors open_weights(const fs::path& folder) {
  if (!fs::is_directory(folder)) fail(ErrorKind::io, folder.string(), ": no such folder; an adapter is a folder with adapter_config.json and adapter_model.safetensors");
  if (!fs::exists(folder / "adapter_config.json")) fail(ErrorKind::io, folder.string(), ": no adapter_config.json there; not a PEFT adapter");
  if (!fs::exists(folder / "adapter_model.safetensors") && fs::exists(folder / "adapter_model.bin"))
    fail(ErrorKind::unsupported, folder.string(), ": adapter_model.bin is a PyTorch pickle, which can run programs when it is read: have peft save it again with "
                                                  "safe_serialization=True");
  return Safetensors::open(folder / "adapter_model.safetensors");
}

}  // namespace

LoraChoice parse_lora(const std::string& text) {
  const size_t at = text.rfind('=');
  std::error_code ec;
  if (at == std::string::npos || fs::exists(text, ec)) return {text, 1};
  LoraChoice out{text.substr(0, at), 0};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data() + at + 1, end, out.strength);
  if (error != std::errc() || stop != end || !std::isfinite(out.strength)) fail(ErrorKind::usage, "--lora ", quote(text), ": expected FOLDER or FOLDER=NUMBER");
  return out;
}

LoraAdapter read_lora(const LoraChoice& choice, const HParams& hparams) {
  const Safetensors weights = open_weights(choice.folder);
  LoraAdapter out;
  out.identity = concat("adapter ", choice.strength, " ", read_file(choice.folder / "adapter_config.json", kMaxConfigBytes), "\n", identity_of(weights));
  out.parts = AdapterReader(hparams, Config::read(choice.folder / "adapter_config.json"), choice.strength).read(weights);
  if (out.parts.empty()) fail(ErrorKind::format, choice.folder.string(), ": the adapter is empty");
  return out;
}

}  // namespace duet
