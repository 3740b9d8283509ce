#include "tests/support/hf_folder.h"

#include <bit>
#include <functional>
#include <stdexcept>

#include "base/error.h"
#include "base/json.h"
#include "quant/f16.h"
#include "tests/support/close.h"
#include "tests/support/gguf_builder.h"

namespace duet::test {
namespace {

constexpr uint64_t kLayers = 2, kEmbd = 32, kHeads = 4, kHeadsKv = 2, kHeadDim = 8, kExperts = 4,
                   kFf = 64, kVocab = 264;

std::vector<float> random_values(const std::string& name, uint64_t n) {
  Rng rng(std::hash<std::string>()(name));
  std::vector<float> values(n);
  for (float& v : values) v = bf16_to_f32(f32_to_bf16(rng.symmetric()));
  return values;
}

HfTensor make(const std::string& name, std::vector<uint64_t> shape) {
  uint64_t n = 1;
  for (const uint64_t d : shape) n *= d;
  return {name, std::move(shape), random_values(name, n)};
}

std::string expert_name(uint64_t layer, uint64_t expert, const char* matrix) {
  return concat("model.layers.", layer, ".block_sparse_moe.experts.", expert, ".", matrix,
                ".weight");
}

HfTensor expert_matrix(uint64_t layer, uint64_t expert, const std::string& matrix) {
  return make(expert_name(layer, expert, matrix.c_str()), matrix == "w2"
                                                              ? std::vector<uint64_t>{kEmbd, kFf}
                                                              : std::vector<uint64_t>{kFf, kEmbd});
}

void append(std::vector<float>& to, const HfTensor& from) {
  to.insert(to.end(), from.values.begin(), from.values.end());
}

void add_experts(std::vector<HfTensor>& out, uint64_t layer, HfForm form) {
  const std::string prefix = concat("model.layers.", layer, ".");
  if (form == HfForm::dense) {
    out.push_back(make(prefix + "mlp.gate_proj.weight", {kFf, kEmbd}));
    out.push_back(make(prefix + "mlp.up_proj.weight", {kFf, kEmbd}));
    out.push_back(make(prefix + "mlp.down_proj.weight", {kEmbd, kFf}));
    return;
  }
  HfTensor router = make(prefix + "block_sparse_moe.gate.weight", {kExperts, kEmbd});
  if (form == HfForm::fused) router.name = prefix + "mlp.gate.weight";
  out.push_back(std::move(router));
  HfTensor gate_up{prefix + "mlp.experts.gate_up_proj", {kExperts, 2 * kFf, kEmbd}, {}};
  HfTensor down{prefix + "mlp.experts.down_proj", {kExperts, kEmbd, kFf}, {}};
  for (uint64_t e = 0; e < kExperts; ++e) {
    for (const char* matrix : {"w1", "w2", "w3"})
      if (form == HfForm::per_expert) out.push_back(expert_matrix(layer, e, matrix));
    append(gate_up.values, expert_matrix(layer, e, "w1"));
    append(gate_up.values, expert_matrix(layer, e, "w3"));
    append(down.values, expert_matrix(layer, e, "w2"));
  }
  if (form != HfForm::fused) return;
  out.push_back(std::move(gate_up));
  out.push_back(std::move(down));
}

Json tiny_config(HfForm form) {
  Json config = {{"architectures", {"MixtralForCausalLM"}},
                 {"model_type", "mixtral"},
                 {"hidden_size", kEmbd},
                 {"intermediate_size", kFf},
                 {"num_hidden_layers", kLayers},
                 {"num_attention_heads", kHeads},
                 {"num_key_value_heads", kHeadsKv},
                 {"vocab_size", kVocab},
                 {"max_position_embeddings", 512},
                 {"rope_theta", 1e6},
                 {"rms_norm_eps", 1e-5},
                 {"num_local_experts", kExperts},
                 {"num_experts_per_tok", 2},
                 {"tie_word_embeddings", false},
                 {"bos_token_id", 1},
                 {"eos_token_id", 2},
                 {"hidden_act", "silu"}};
  if (form != HfForm::dense) return config;
  config["architectures"] = {"MistralForCausalLM"};
  config["model_type"] = "mistral";
  config.erase("num_local_experts");
  config.erase("num_experts_per_tok");
  return config;
}

// ---- protobuf
// ------------------------------------------------------------------------------------

std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7f) | 0x80);
  return out + static_cast<char>(value);
}
std::string number_field(unsigned field, int64_t value) {
  return varint(field << 3) + varint(static_cast<uint64_t>(value));
}
std::string bytes_field(unsigned field, const std::string& bytes) {
  return varint(field << 3 | 2) + varint(bytes.size()) + bytes;
}

}  // namespace

std::string safetensors_bytes(const std::vector<HfTensor>& tensors, bool as_f32) {
  Json header = Json::object();
  std::string data;
  for (const HfTensor& tensor : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    for (const float v : tensor.values)
      if (tensor.bytes.empty()) data += as_f32 ? raw(v) : raw(f32_to_bf16(v));
    header[tensor.name] = {{"dtype", !tensor.dtype.empty() ? tensor.dtype : as_f32 ? "F32" : "BF16"},
                           {"shape", tensor.shape},
                           {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // as the safetensors library aligns the data
  return raw(uint64_t{text.size()}) + text + data;
}

std::string SpModelBuilder::build() const {
  std::string out;
  for (const Piece& piece : pieces) {
    const std::string score = varint(2 << 3 | 5) + raw(piece.score);
    out += bytes_field(1, bytes_field(1, piece.text) + score + number_field(3, piece.type));
  }
  out += bytes_field(2, number_field(3, model_type) + number_field(40, unk_id) +
                            number_field(41, bos_id) + number_field(42, eos_id) +
                            number_field(43, pad_id));
  out += bytes_field(
      3, bytes_field(1, "identity") + number_field(3, add_dummy_prefix) + number_field(4, 0));
  return out;
}

SpModelBuilder small_sp_model(const std::vector<std::string>& pieces) {
  SpModelBuilder model;
  model.pieces = {{"<unk>", 0, 2}, {"<s>", 0, 3}, {"</s>", 0, 3}};
  constexpr const char* kHex = "0123456789ABCDEF";
  for (size_t b = 0; b < 256; ++b)
    model.pieces.push_back({std::string("<0x") + kHex[b / 16] + kHex[b % 16] + ">", 0, 6});
  float score = 0;
  for (const std::string& piece : pieces) model.pieces.push_back({piece, score -= 1, 1});
  return model;
}

HfTensor& HfFolder::tensor(std::string_view name) {
  for (HfTensor& t : tensors)
    if (t.name == name) return t;
  throw std::logic_error("no tensor " + std::string(name));
}

void HfFolder::remove(std::string_view name) {
  std::erase_if(tensors, [&](const HfTensor& t) { return t.name == name; });
}

void HfFolder::write(const std::filesystem::path& folder) const {
  write_text(folder / config_name, config.dump(1));
  if (!tokenizer_model.empty()) write_text(folder / "tokenizer.model", tokenizer_model);
  for (const auto& [name, content] : files) write_text(folder / name, content);
  if (n_shards == 1)
    return write_text(folder / weights_name, safetensors_bytes(tensors, f32));
  Json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", Json::object()}};
  for (size_t shard = 0; shard < n_shards; ++shard) {
    const std::string name = concat("model-0000", shard + 1, "-of-0000", n_shards, ".safetensors");
    std::vector<HfTensor> part;
    for (size_t i = shard; i < tensors.size(); i += n_shards) part.push_back(tensors[i]);
    for (const HfTensor& t : part) index["weight_map"][t.name] = name;
    write_text(folder / name, safetensors_bytes(part, f32));
  }
  write_text(folder / "model.safetensors.index.json", index.dump(1));
}

HfFolder tiny_hf_folder(HfForm form) {
  HfFolder folder;
  folder.config = tiny_config(form);
  folder.tokenizer_model = small_sp_model().build();
  std::vector<HfTensor>& out = folder.tensors;
  out.push_back(make("model.embed_tokens.weight", {kVocab, kEmbd}));
  for (uint64_t layer = 0; layer < kLayers; ++layer) {
    const std::string prefix = concat("model.layers.", layer, ".");
    out.push_back(make(prefix + "input_layernorm.weight", {kEmbd}));
    out.push_back(make(prefix + "self_attn.q_proj.weight", {kHeads * kHeadDim, kEmbd}));
    out.push_back(make(prefix + "self_attn.k_proj.weight", {kHeadsKv * kHeadDim, kEmbd}));
    out.push_back(make(prefix + "self_attn.v_proj.weight", {kHeadsKv * kHeadDim, kEmbd}));
    out.push_back(make(prefix + "self_attn.o_proj.weight", {kEmbd, kHeads * kHeadDim}));
    out.push_back(make(prefix + "post_attention_layernorm.weight", {kEmbd}));
    add_experts(out, layer, form);
  }
  out.push_back(make("model.norm.weight", {kEmbd}));
  out.push_back(make("lm_head.weight", {kVocab, kEmbd}));
  return folder;
}

}  // namespace duet::test
