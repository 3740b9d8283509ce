#include "formats/schema.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/safetensors.h"
#include "tests/support/errors.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr auto kFormat = ErrorKind::format;
constexpr auto kUnsupported = ErrorKind::unsupported;

struct Read {
  HParams hparams;
  std::vector<std::string> notices;
};

Read read_file_of(const GgufBuilder& b) {
  const std::vector<std::byte> bytes = b.build();
  Read out;
  out.hparams = read_hparams(GgufFile::parse(bytes, "m.gguf"),
                             [&](const std::string& s) { out.notices.push_back(s); });
  return out;
}

Read read_config(const Json& config) {
  Read out;
  out.hparams = read_hf_config(config, "config.json",
                               [&](const std::string& s) { out.notices.push_back(s); });
  return out;
}

Json mixtral_config() {
  return {{"architectures", {"MixtralForCausalLM"}},
          {"hidden_size", 4096},
          {"intermediate_size", 14336},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 8},
          {"vocab_size", 32000},
          {"max_position_embeddings", 32768},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 1e6},
          {"hidden_act", "silu"},
          {"num_local_experts", 8},
          {"num_experts_per_tok", 2},
          {"sliding_window", nullptr}};
}

Json llama_config() {
  Json config = mixtral_config();
  config["architectures"] = {"LlamaForCausalLM"};
  config.erase("num_local_experts");
  config.erase("num_experts_per_tok");
  return config;
}

struct BadFile {
  const char* name;
  std::function<void(GgufBuilder&)> mutate;
  ErrorKind kind;
  const char* message;
};

void set_u32(GgufBuilder& b, const char* key, uint32_t value) { b.key(key).bytes = raw(value); }
void set_f32(GgufBuilder& b, const char* key, float value) { b.key(key).bytes = raw(value); }
void drop_key(GgufBuilder& b, const char* key) {
  std::erase_if(b.keys, [&](const auto& k) { return k.name == key; });
}

const std::vector<BadFile> kBadFiles = {
    {"no architecture", [](GgufBuilder& b) { drop_key(b, "general.architecture"); }, kFormat,
     "'general.architecture' is missing"},
    {"unknown architecture",
     [](GgufBuilder& b) { b.key("general.architecture").bytes = raw_string("qwen3moe"); },
     kUnsupported, "architecture 'qwen3moe' is not supported; duet runs 'llama'"},
    {"architecture a number",
     [](GgufBuilder& b) {
       drop_key(b, "general.architecture");
       b.u32("general.architecture", 1);
     },
     kFormat, "expected a string"},
    {"no layers key", [](GgufBuilder& b) { drop_key(b, "llama.block_count"); }, kFormat,
     "'llama.block_count' is missing"},
    {"no eps key", [](GgufBuilder& b) { drop_key(b, "llama.attention.layer_norm_rms_epsilon"); },
     kFormat, "rms_epsilon' is missing"},
    {"0 layers", [](GgufBuilder& b) { set_u32(b, "llama.block_count", 0); }, kFormat,
     "number of layers is 0, expected 1 to 1024"},
    {"2^32 - 1 layers", [](GgufBuilder& b) { set_u32(b, "llama.block_count", UINT32_MAX); },
     kFormat, "number of layers is 4294967295"},
    {"layers over 32 bits",
     [](GgufBuilder& b) {
       drop_key(b, "llama.block_count");
       b.keys.push_back({"llama.block_count", 10, raw(uint64_t{1} << 32)});
     },
     kFormat, "which is too large"},
    {"heads a list",
     [](GgufBuilder& b) {
       drop_key(b, "llama.attention.head_count");
       b.ints("llama.attention.head_count", {1, 2});
     },
     kFormat, "expected an integer"},
    {"0 heads", [](GgufBuilder& b) { set_u32(b, "llama.attention.head_count", 0); }, kFormat,
     "number of heads is 0"},
    {"KV heads do not divide",
     [](GgufBuilder& b) { set_u32(b, "llama.attention.head_count_kv", 3); }, kFormat,
     "4 heads are no multiple of 3 KV heads"},
    {"more KV heads", [](GgufBuilder& b) { set_u32(b, "llama.attention.head_count_kv", 8); },
     kFormat, "number of KV heads is 8"},
    {"0 KV heads", [](GgufBuilder& b) { set_u32(b, "llama.attention.head_count_kv", 0); }, kFormat,
     "number of KV heads is 0"},
    {"odd head size",
     [](GgufBuilder& b) {
       set_u32(b, "llama.attention.key_length", 15);
       set_u32(b, "llama.attention.value_length", 15);
       set_u32(b, "llama.rope.dimension_count", 14);
     },
     kFormat, "must be even"},
    {"huge head size",
     [](GgufBuilder& b) {
       set_u32(b, "llama.attention.key_length", 2048);
       set_u32(b, "llama.attention.value_length", 2048);
     },
     kFormat, "head size is 2048, expected 2 to 1024"},
    {"keys and values differ",
     [](GgufBuilder& b) { set_u32(b, "llama.attention.value_length", 8); }, kUnsupported,
     "keys of 16 and values of 8"},
    {"heads do not divide width",
     [](GgufBuilder& b) {
       drop_key(b, "llama.attention.key_length");
       set_u32(b, "llama.embedding_length", 63);
     },
     kFormat, "embedding size 63 is no multiple of 4 heads"},
    {"rotation over the head", [](GgufBuilder& b) { set_u32(b, "llama.rope.dimension_count", 18); },
     kFormat, "rotated dimensions is 18"},
    {"257 experts", [](GgufBuilder& b) { set_u32(b, "llama.expert_count", 257); }, kFormat,
     "number of experts is 257"},
    {"0 experts used", [](GgufBuilder& b) { set_u32(b, "llama.expert_used_count", 0); }, kFormat,
     "experts used per token is 0, expected 1 to 4"},
    {"5 of 4 experts used", [](GgufBuilder& b) { set_u32(b, "llama.expert_used_count", 5); },
     kFormat, "experts used per token is 5"},
    {"experts used missing", [](GgufBuilder& b) { drop_key(b, "llama.expert_used_count"); },
     kFormat, "expert_used_count' is missing"},
    {"eps 0", [](GgufBuilder& b) { set_f32(b, "llama.attention.layer_norm_rms_epsilon", 0.0f); },
     kFormat, "RMS norm epsilon is 0"},
    {"eps NaN", [](GgufBuilder& b) { set_f32(b, "llama.attention.layer_norm_rms_epsilon", NAN); },
     kFormat, "RMS norm epsilon is nan"},
    {"eps 1", [](GgufBuilder& b) { set_f32(b, "llama.attention.layer_norm_rms_epsilon", 1.0f); },
     kFormat, "RMS norm epsilon is 1"},
    {"rope base NaN", [](GgufBuilder& b) { set_f32(b, "llama.rope.freq_base", NAN); }, kFormat,
     "rope base is nan"},
    {"rope base infinite", [](GgufBuilder& b) { set_f32(b, "llama.rope.freq_base", INFINITY); },
     kFormat, "rope base is inf"},
    {"rope base negative", [](GgufBuilder& b) { set_f32(b, "llama.rope.freq_base", -1.0f); },
     kFormat, "rope base is -1"},
    {"rope scaling unknown", [](GgufBuilder& b) { b.text("llama.rope.scaling.type", "yarn"); },
     kUnsupported, "rope scaling 'yarn' is not supported"},
    {"rope factor NaN", [](GgufBuilder& b) { b.f32("llama.rope.scaling.factor", NAN); }, kFormat,
     "rope scale is nan"},
    {"rope factor negative", [](GgufBuilder& b) { b.f32("llama.rope.scaling.factor", -4.0f); },
     kFormat, "rope scale is -0.25"},
    {"context 0", [](GgufBuilder& b) { set_u32(b, "llama.context_length", 0); }, kFormat,
     "context length is 0"},
    {"biases", [](GgufBuilder& b) { b.zeros("blk.0.attn_q.bias", {64}); }, kUnsupported,
     "'blk.0.attn_q.bias': biases are not supported"},
    {"no vocabulary",
     [](GgufBuilder& b) {
       drop_key(b, "llama.vocab_size");
       drop_key(b, "tokenizer.ggml.tokens");
       b.tensors.clear();
     },
     kFormat, "no vocabulary size"},
};

struct BadConfig {
  const char* name;
  std::function<void(Json&)> mutate;
  ErrorKind kind;
  const char* message;
};

const std::vector<BadConfig> kBadConfigs = {
    {"unknown architecture", [](Json& c) { c["architectures"] = {"Qwen3MoeForCausalLM"}; },
     kUnsupported, "'Qwen3MoeForCausalLM' is not supported; duet converts"},
    {"unknown model_type",
     [](Json& c) {
       c.erase("architectures");
       c["model_type"] = "gpt2";
     },
     kUnsupported, "'gpt2' is not supported"},
    {"no architecture", [](Json& c) { c.erase("architectures"); }, kFormat,
     "'model_type' is missing"},
    {"no hidden_size", [](Json& c) { c.erase("hidden_size"); }, kFormat,
     "'hidden_size' is missing"},
    {"hidden_size a string", [](Json& c) { c["hidden_size"] = "4096"; }, kFormat,
     "'hidden_size' is '4096', expected a non-negative integer"},
    {"negative layers", [](Json& c) { c["num_hidden_layers"] = -1; }, kFormat,
     "'num_hidden_layers' is -1"},
    {"huge layers", [](Json& c) { c["num_hidden_layers"] = uint64_t{1} << 40; }, kFormat,
     "which is too large"},
    {"0 experts", [](Json& c) { c["num_local_experts"] = 0; }, kFormat,
     "number of experts is 0, expected 1 to 256"},
    {"gelu", [](Json& c) { c["hidden_act"] = "gelu"; }, kUnsupported,
     "hidden_act 'gelu' is not supported"},
    {"attention bias", [](Json& c) { c["attention_bias"] = true; }, kUnsupported,
     "'attention_bias' is true"},
    {"mlp bias", [](Json& c) { c["mlp_bias"] = true; }, kUnsupported, "'mlp_bias' is true"},
    {"quantized",
     [](Json& c) {
       c["quantization_config"] = {{"quant_method", "gptq"}};
     },
     kUnsupported, "the weights are quantized"},
    {"partial rotation", [](Json& c) { c["partial_rotary_factor"] = 0.5; }, kUnsupported,
     "partial_rotary_factor"},
    {"yarn",
     [](Json& c) {
       c["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}};
     },
     kUnsupported, "rope scaling 'yarn'"},
    {"rope_parameters a list", [](Json& c) { c["rope_parameters"] = Json::array(); }, kFormat,
     "'rope_parameters' is no JSON object"},
    {"linear without factor",
     [](Json& c) {
       c["rope_scaling"] = {{"type", "linear"}};
     },
     kFormat, "'factor' is missing"},
    {"linear factor 0",
     [](Json& c) {
       c["rope_scaling"] = {{"type", "linear"}, {"factor", 0.0}};
     },
     kFormat, "rope scale is inf"},
    {"llama3 factor 0",
     [](Json& c) {
       c["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 0.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
     },
     kFormat, "rope scaling factor is 0"},
    {"llama3 factors equal",
     [](Json& c) {
       c["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 4.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
     },
     kFormat, "rope high_freq_factor is 4"},
    {"heads do not divide", [](Json& c) { c["num_attention_heads"] = 30; }, kFormat,
     "embedding size 4096 is no multiple of 30 heads"},
    {"no object", [](Json& c) { c = Json::array(); }, kFormat, "no JSON object"},
};

}  // namespace

TEST_CASE("schema: bad hyper-parameters of GGUF files are refused") {
  for (const BadFile& bad : kBadFiles) {
    CAPTURE(bad.name);
    GgufBuilder b = tiny_model({.n_layer = 1});
    bad.mutate(b);
    check_thrown(thrown_by([&] { (void)read_file_of(b); }), bad.kind, bad.message);
  }
}

TEST_CASE("schema: bad config.json files are refused") {
  for (const BadConfig& bad : kBadConfigs) {
    CAPTURE(bad.name);
    Json config = mixtral_config();
    bad.mutate(config);
    check_thrown(thrown_by([&] { (void)read_config(config); }), bad.kind, bad.message);
  }
}

TEST_CASE("schema: GGUF metadata survive a round trip") {
  for (const uint32_t n_expert : {0u, 4u}) {
    const TinyModelOptions options{.n_expert = n_expert,
                                   .sliding_window = n_expert == 0 ? 100u : 0u,
                                   .rope_freq_base = 12345.0f};
    const HParams expected = tiny_hparams(options);
    const Read read = read_file_of(tiny_model(options));
    const HParams& h = read.hparams;
    CHECK(read.notices.empty());
    CHECK(h.name == "tiny");
    CHECK(h.n_layer == expected.n_layer);
    CHECK(h.n_embd == expected.n_embd);
    CHECK(h.n_ff == expected.n_ff);
    CHECK(h.n_vocab == expected.n_vocab);
    CHECK(h.n_ctx_train == expected.n_ctx_train);
    CHECK(h.n_head == 4);
    CHECK(h.n_head_kv == 2);
    CHECK(h.head_dim == 16);
    CHECK(h.n_rot == 16);
    CHECK(h.n_expert == n_expert);
    CHECK(h.n_expert_used == expected.n_expert_used);
    CHECK(h.rope_freq_base == 12345.0f);
    CHECK(h.rope_scale == 1.0f);
    CHECK(h.rms_eps == 1e-5f);
    CHECK(h.sliding_window == expected.sliding_window);
    CHECK_FALSE(h.tied_output);
  }
}

TEST_CASE("3f-2 rope base: a missing one of an 8-expert file becomes 1e6 with a notice") {
  const TinyModelOptions eight{.n_layer = 1, .n_expert = 8, .omit_keys = {"llama.rope.freq_base"}};
  const Read read = read_file_of(tiny_model(eight));
  CHECK(read.hparams.rope_freq_base == 1e6f);
  REQUIRE(read.notices.size() == 1);
  CHECK(read.notices[0].find("llama.rope.freq_base is missing: using Mixtral's 1000000") !=
        std::string::npos);
  const TinyModelOptions dense{.n_layer = 1, .n_expert = 0, .omit_keys = {"llama.rope.freq_base"}};
  CHECK(read_file_of(tiny_model(dense)).hparams.rope_freq_base == 10000.0f);
}

TEST_CASE("3f-6 sliding window: one with experts is ignored with a notice") {
  const Read experts = read_file_of(tiny_model({.n_layer = 1, .sliding_window = 4096}));
  CHECK(experts.hparams.sliding_window == 0);
  REQUIRE(experts.notices.size() == 1);
  CHECK(experts.notices[0].find("sliding window 4096 ignored") != std::string::npos);
  const Read dense =
      read_file_of(tiny_model({.n_layer = 1, .n_expert = 0, .sliding_window = 4096}));
  CHECK(dense.hparams.sliding_window == 4096);
  CHECK(dense.notices.empty());
}

TEST_CASE("schema: the vocabulary size comes from the matrix, the key or the tokens") {
  const uint32_t n = static_cast<uint32_t>(tiny_vocabulary().tokens.size());
  GgufBuilder b = tiny_model({.n_layer = 1});
  set_u32(b, "llama.vocab_size", 7);
  const Read other = read_file_of(b);
  CHECK(other.hparams.n_vocab == n);
  REQUIRE(other.notices.size() == 1);
  CHECK(other.notices[0].find("llama.vocab_size says 7") != std::string::npos);
  b.tensors.clear();  // vocabulary only
  CHECK(read_file_of(b).hparams.n_vocab == 7);
  drop_key(b, "llama.vocab_size");
  const Read only_tokens = read_file_of(b);
  CHECK(only_tokens.hparams.n_vocab == n);
  CHECK_FALSE(only_tokens.hparams.tied_output);
}

TEST_CASE("schema: rope scaling and optional keys of GGUF files") {
  GgufBuilder b = tiny_model({.n_layer = 1, .tied_output = true});
  for (const char* key : {"llama.attention.key_length", "llama.attention.value_length",
                          "llama.rope.dimension_count", "llama.attention.head_count_kv"})
    drop_key(b, key);
  b.f32("llama.rope.scale_linear", 4.0f);
  const HParams h = read_file_of(b).hparams;
  CHECK(h.head_dim == 16);
  CHECK(h.n_rot == 16);
  CHECK(h.n_head_kv == 4);
  CHECK(h.rope_scale == 0.25f);
  CHECK(h.tied_output);
  b.text("llama.rope.scaling.type", "none");
  CHECK(read_file_of(b).hparams.rope_scale == 1.0f);
  b.key("llama.rope.scaling.type").bytes = raw_string("linear");
  b.f32("llama.rope.scaling.factor", 2.0f);
  CHECK(read_file_of(b).hparams.rope_scale == 0.5f);
}

TEST_CASE("schema: config.json of Mixtral 8x7B") {
  const HParams h = read_config(mixtral_config()).hparams;
  CHECK(h.n_layer == 32);
  CHECK(h.n_ff == 14336);
  CHECK(h.head_dim == 128);
  CHECK(h.n_head_kv == 8);
  CHECK(h.n_expert == 8);
  CHECK(h.n_expert_used == 2);
  CHECK(h.rope_freq_base == 1e6f);
  CHECK(h.rms_eps == 1e-5f);
  CHECK_FALSE(h.tied_output);
  CHECK(tensor_table(h).size() == 323);  // compatibility.md 3d
}

TEST_CASE("schema: both places of the rope base, and of rope scaling") {
  Json config = llama_config();
  config["rope_theta"] = 5e5;
  CHECK(read_config(config).hparams.rope_freq_base == 5e5f);
  config.erase("rope_theta");
  CHECK(read_config(config).hparams.rope_freq_base == 10000.0f);
  config["rope_parameters"] = {{"rope_theta", 2e6}, {"rope_type", "linear"}, {"factor", 4.0}};
  CHECK(read_config(config).hparams.rope_freq_base == 2e6f);
  CHECK(read_config(config).hparams.rope_scale == 0.25f);
  config.erase("rope_parameters");
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  CHECK(read_config(config).hparams.rope_scale == 0.5f);
  config["rope_scaling"] = nullptr;
  CHECK(read_config(config).hparams.rope_scale == 1.0f);
}

TEST_CASE("schema: sliding windows of config.json") {
  Json mistral = llama_config();
  mistral["sliding_window"] = 4096;
  CHECK(read_config(mistral).hparams.sliding_window == 0);  // Llama has none
  mistral["architectures"] = {"MistralForCausalLM"};
  CHECK(read_config(mistral).hparams.sliding_window == 4096);
  Json mixtral = mixtral_config();
  mixtral["sliding_window"] = 4096;
  const Read read = read_config(mixtral);
  CHECK(read.hparams.sliding_window == 0);
  REQUIRE(read.notices.size() == 1);
  CHECK(read.notices[0].find("sliding window 4096 ignored") != std::string::npos);
}

TEST_CASE("schema: head_dim null, tied embeddings, model_type alone") {
  Json config = llama_config();
  config["head_dim"] = nullptr;
  config["tie_word_embeddings"] = true;
  config.erase("architectures");
  config["model_type"] = "llama";
  const HParams h = read_config(config).hparams;
  CHECK(h.head_dim == 128);
  CHECK(h.tied_output);
  const auto table = tensor_table(h);
  CHECK(std::none_of(table.begin(), table.end(),
                     [](const TensorSpec& s) { return s.kind == TensorKind::output; }));
  config["head_dim"] = 64;
  CHECK(read_config(config).hparams.head_dim == 64);
  CHECK(tensor_table(read_config(config).hparams)[2].shape == std::vector<uint64_t>{2048, 4096});
}

// Expected values: transformers' llama3 formula in double precision (Llama-3.1: factor 8, 1, 4,
// 8192, base 500000, head size 128), by an independent script.
TEST_CASE("schema: llama3 rope scaling gives the rope_freqs tensor") {
  Json config = llama_config();
  config["rope_theta"] = 500000.0;
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
  const HParams h = read_config(config).hparams;
  CHECK(h.rope_freqs);
  const std::vector<float> freqs = llama3_rope_freqs(h);
  REQUIRE(freqs.size() == 64);
  CHECK(freqs[0] == 1.0f);
  CHECK(freqs[28] == 1.0f);
  CHECK(freqs[29] == doctest::Approx(1.207483871283662));
  CHECK(freqs[32] == doctest::Approx(2.694529687894733));
  CHECK(freqs[34] == doctest::Approx(5.257326588708467));
  CHECK(freqs[35] == 8.0f);
  CHECK(freqs[63] == 8.0f);
  const auto table = tensor_table(h);
  CHECK(table[1].gguf_name == "rope_freqs.weight");
  CHECK(table[1].shape == std::vector<uint64_t>{64});
  CHECK(table[1].optional);
  CHECK(hf_sources(h, table[1]).empty());
}

TEST_CASE("schema: a rope_freqs tensor of a GGUF file is part of the table") {
  GgufBuilder b = tiny_model({.n_layer = 1});
  CHECK(tensor_table(read_file_of(b).hparams).size() == b.tensors.size());
  b.zeros("rope_freqs.weight", {8});
  CHECK(tensor_table(read_file_of(b).hparams).size() == b.tensors.size());
}

TEST_CASE("schema: names and shapes of a Mixtral layer") {
  const HParams h = tiny_hparams({});
  std::set<std::string> names;
  for (const TensorSpec& spec : tensor_table(h)) {
    names.insert(spec.gguf_name);
    if (spec.gguf_name == "blk.1.ffn_down_exps.weight")
      CHECK(spec.shape == std::vector<uint64_t>{4, 64, 96});
    if (spec.gguf_name == "blk.1.ffn_up_exps.weight")
      CHECK(spec.shape == std::vector<uint64_t>{4, 96, 64});
    if (spec.gguf_name == "blk.1.ffn_gate_inp.weight")
      CHECK(spec.shape == std::vector<uint64_t>{4, 64});
    if (spec.gguf_name == "blk.1.attn_k.weight") CHECK(spec.shape == std::vector<uint64_t>{32, 64});
    CHECK(spec.layer == (spec.gguf_name.starts_with("blk.") ? spec.gguf_name[4] - '0' : -1));
  }
  CHECK(names.size() == 3 + 2 * 10);
  for (const char* name : {"token_embd.weight", "output_norm.weight", "output.weight",
                           "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"})
    CHECK(names.contains(name));
  CHECK_FALSE(names.contains("blk.0.ffn_gate.weight"));
  CHECK(split_expert_name(TensorKind::ffn_gate_exps, 3, 7) == "blk.3.ffn_gate.7.weight");
  CHECK(split_expert_name(TensorKind::ffn_down_exps, 0, 0) == "blk.0.ffn_down.0.weight");
  CHECK(thrown_by([&] { (void)split_expert_name(TensorKind::attn_q, 0, 0); }).kind ==
        ErrorKind::internal);
}

TEST_CASE("3f-11 expert order: w1 is gate, w2 down, w3 up") {
  const HParams h = tiny_hparams({.n_layer = 1});
  for (const TensorSpec& spec : tensor_table(h)) {
    const std::vector<HfSource> sources = hf_sources(h, spec);
    REQUIRE_FALSE(sources.empty());
    CHECK(sources[0].permute_rope ==
          (spec.kind == TensorKind::attn_q || spec.kind == TensorKind::attn_k));
    const auto expert_source = [&](const char* letter, const char* fused, HfSource::Rows rows) {
      REQUIRE(sources.size() == 2);
      REQUIRE(sources[0].names.size() == 4);
      CHECK(sources[0].names[3] ==
            concat("model.layers.0.block_sparse_moe.experts.3.", letter, ".weight"));
      CHECK(sources[1].names ==
            std::vector<std::string>{concat("model.layers.0.mlp.experts.", fused)});
      CHECK(sources[1].rows == rows);
    };
    if (spec.kind == TensorKind::ffn_gate_exps)
      expert_source("w1", "gate_up_proj", HfSource::Rows::first_half);
    if (spec.kind == TensorKind::ffn_up_exps)
      expert_source("w3", "gate_up_proj", HfSource::Rows::second_half);
    if (spec.kind == TensorKind::ffn_down_exps)
      expert_source("w2", "down_proj", HfSource::Rows::all);
    if (spec.kind == TensorKind::ffn_gate_inp)
      CHECK(sources[1].names[0] == "model.layers.0.mlp.gate.weight");
  }
}

TEST_CASE("schema: the demo folder has every tensor with its shape") {
  const std::filesystem::path folder = std::filesystem::path(DUET_SOURCE_DIR) / "models/demo";
  const Json config = parse_json(read_file(folder / "config.json", 1 << 20), "config.json");
  const HParams h = read_config(config).hparams;
  CHECK(h.rope_freq_base == 1e6f);
  CHECK(h.head_dim == 32);
  const Safetensors tensors = Safetensors::open(folder);
  size_t n_names = 0;
  for (const TensorSpec& spec : tensor_table(h)) {
    const HfSource source = hf_sources(h, spec)[0];
    std::vector<uint64_t> shape = spec.shape;
    if (shape.size() == 3) shape.erase(shape.begin());
    for (const std::string& name : source.names) {
      CAPTURE(name);
      REQUIRE(tensors.find_tensor(name) != nullptr);
      CHECK(tensors.find_tensor(name)->shape == shape);
      ++n_names;
    }
  }
  CHECK(n_names == tensors.tensors().size());
}
