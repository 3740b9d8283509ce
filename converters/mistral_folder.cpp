#include "converters/mistral_folder.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxParamsBytes = uint64_t{1} << 20;

std::vector<fs::path> consolidated(const fs::path& folder, std::initializer_list<const char*> endings) {
  std::vector<fs::path> out;
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(folder, ec)) {
    const fs::path& path = entry.path();
    if (path.filename().string().starts_with("consolidated") && std::find(endings.begin(), endings.end(), path.extension()) != endings.end()) out.push_back(path);
  }
  std::sort(out.begin(), out.end());
  return out;
}

bool has_other_safetensors(const fs::path& folder) {
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(folder, ec))
    if (entry.path().extension() == ".safetensors" && !entry.path().filename().string().starts_with("consolidated")) return true;
  return false;
}

// Copies params[from] as config[to], unless it is null.
void take(const Json& params, const char* from, Json& config, const char* to) {
  const auto it = params.find(from);
  if (it != params.end() && !it->is_null()) config[to] = *it;
}

constexpr std::pair<const char*, const char*> kNames[] = {
    {"dim", "hidden_size"},          {"hidden_dim", "intermediate_size"}, {"n_layers", "num_hidden_layers"}, {"n_heads", "num_attention_heads"},
    {"n_kv_heads", "num_key_value_heads"}, {"norm_eps", "rms_norm_eps"},   {"max_seq_len", "max_position_embeddings"},
    // The same in both forms:
    {"head_dim", "head_dim"},        {"vocab_size", "vocab_size"},        {"rope_theta", "rope_theta"},      {"sliding_window", "sliding_window"},
    {"hidden_size", "hidden_size"},  {"intermediate_size", "intermediate_size"},
    {"num_hidden_layers", "num_hidden_layers"},     {"num_attention_heads", "num_attention_heads"},
    {"num_key_value_heads", "num_key_value_heads"}, {"rms_norm_eps", "rms_norm_eps"},
    {"max_position_embeddings", "max_position_embeddings"},
    {"num_local_experts", "num_local_experts"},     {"num_experts_per_tok", "num_experts_per_tok"},
};

void take_experts(const Json& params, Json& config, const std::string& source) {
  if (const auto moe = params.find("moe"); moe != params.end() && !moe->is_null()) {
    if (!moe->is_object()) fail(ErrorKind::format, source, ": 'moe' is no JSON object");
    take(*moe, "num_experts", config, "num_local_experts");
    take(*moe, "num_experts_per_tok", config, "num_experts_per_tok");
  }
  const bool experts = config.contains("num_local_experts");
  config["architectures"] = {experts ? "MixtralForCausalLM" : "MistralForCausalLM"};
}

// The contexts of 8x7B and 8x22B.
uint64_t published_context(const Json& config) {
  const auto large = mixtral_hparams("8x22b"), small = mixtral_hparams("8x7b");
  return config.value("hidden_size", Json(0)) == large->n_embd ? large->n_ctx_train : small->n_ctx_train;
}

}  // namespace

bool is_mistral_folder(const fs::path& folder) {
  std::error_code ec;
  if (!fs::exists(folder / "params.json", ec)) return false;
  return !fs::exists(folder / "config.json", ec) || (!has_other_safetensors(folder) && !consolidated(folder, {".safetensors"}).empty());
}

Safetensors open_consolidated(const fs::path& folder) {
  const auto files = consolidated(folder, {".safetensors"});
  if (!files.empty()) return Safetensors::open_all(files);
  const auto pickles = consolidated(folder, {".pt", ".pth", ".bin"});
  if (!pickles.empty())
    fail(ErrorKind::unsupported, folder.string(), ": only PyTorch pickles (", pickles[0].filename().string(),
         "), which can run programs when they are read: get the model's .safetensors files, or make some with torch.load(FILE, weights_only=True) "
         "and safetensors.torch.save_file, one consolidated.NN.safetensors for each");
  fail(ErrorKind::io, folder.string(), ": params.json, but no consolidated*.safetensors file there");
}

Json config_of_params(const fs::path& folder, const Safetensors& weights, const NoticeFn& notice) {
  const std::string source = (folder / "params.json").string();
  const Json params = parse_json(read_file(folder / "params.json", kMaxParamsBytes), source);
  if (!params.is_object()) fail(ErrorKind::format, source, ": no JSON object");
  for (const char* key : {"vision_encoder", "quantization", "yarn", "lora", "llama_4_scaling"})
    if (const auto it = params.find(key); it != params.end() && !it->is_null()) fail(ErrorKind::unsupported, source, ": '", key, "' is not supported");
  Json config = Json::object();
  for (const auto& [from, to] : kNames) take(params, from, config, to);
  take(params, "tied_embeddings", config, "tie_word_embeddings");
  take_experts(params, config, source);
  const TensorView* embedding = weights.find_tensor("tok_embeddings.weight");
  const auto vocab = config.find("vocab_size");
  if (embedding != nullptr && (vocab == config.end() || !vocab->is_number_unsigned())) config["vocab_size"] = embedding->shape[0];
  if (!config.contains("rms_norm_eps")) config["rms_norm_eps"] = 1e-5;
  // As Mistral's own program: the models with a window were trained with the older base.
  if (!config.contains("rope_theta") && !config.contains("sliding_window")) {
    config["rope_theta"] = 1e6;
    notice(concat(source, ": says nothing about rope_theta: using 1000000"));
  }
  if (!config.contains("max_position_embeddings")) {
    config["max_position_embeddings"] = published_context(config);
    notice(concat(source, ": says nothing about the context length: using ", config["max_position_embeddings"].get<uint64_t>()));
  }
  return config;
}

}  // namespace duet
