// Bytes and multiply-adds of a token, against figures worked out by hand.
#include "runtime/model_cost.h"

#include <doctest/doctest.h>

#include <numeric>

#include "tests/support/random_model.h"

using namespace duet;

namespace {

Weight matrix(DType type, size_t rows, size_t cols) {
  const Format& format = format_of(type);
  return {.format = &format, .rows = rows, .cols = cols, .data = nullptr, .row_bytes = row_bytes(format, cols)};
}

// Mixtral 8x7B with n layers; all matrices of one type.
struct Mixtral {
  HParams hparams;
  Weight table;
  std::vector<Layer> layers;

  Mixtral(size_t n_layer, DType type) : table(matrix(type, 32000, 4096)) {
    hparams.n_layer = static_cast<uint32_t>(n_layer);
    hparams.n_embd = 4096;
    hparams.n_head = 32;
    hparams.n_head_kv = 8;
    hparams.head_dim = 128;
    hparams.n_expert = 8;
    hparams.n_expert_used = 2;
    Layer layer;
    layer.attn_norm.resize(4096);
    layer.ffn_norm.resize(4096);
    layer.attn_q = layer.attn_output = matrix(type, 4096, 4096);
    layer.attn_k = layer.attn_v = matrix(type, 1024, 4096);
    layer.router.resize(8 * 4096);
    layer.experts.resize(8, {matrix(type, 14336, 4096), matrix(type, 14336, 4096), matrix(type, 4096, 14336)});
    layers.assign(n_layer, layer);
  }
  ModelCost cost() const { return model_cost(hparams, table, table, layers); }
};

}  // namespace

TEST_CASE("model cost: 8x7B of four layers in Q4_K") {
  const ModelCost cost = Mixtral(4, DType::Q4_K).cost();
  // 4.5 bits per weight: attention 2 * 4096 * 4096 + 2 * 1024 * 4096 = 41943040 weights,
  // an expert 3 * 14336 * 4096 = 176160768.
  constexpr uint64_t kAttention = 41943040, kExpert = 176160768;
  CHECK(cost.layers.int8_macs == 4 * (kAttention + 2 * kExpert));
  CHECK(cost.layers.f32_macs == 4 * 8 * 4096);
  const uint64_t floats = 4 * (2 * 4096 + 8 * 4096) * 4, row = 2304;
  CHECK(cost.layers.bytes == 4 * (kAttention + 2 * kExpert) * 9 / 16 + floats + row);
  CHECK(cost.unused_expert_bytes == 4 * 6 * kExpert * 9 / 16);
  constexpr uint64_t kLast = 2 * kExpert + 2 * 4096 * 4096;  // but for keys and values
  CHECK(cost.last_layer.int8_macs == kLast);
  CHECK(cost.last_layer.f32_macs == 8 * 4096);
  CHECK(cost.last_layer.bytes == kLast * 9 / 16);
  CHECK(cost.last_unused_expert_bytes == 6 * kExpert * 9 / 16);
  CHECK(cost.output.int8_macs == 32000 * 4096);
  CHECK(cost.output.bytes == 32000 * 2304 + 4096 * 4);
  CHECK(cost.layers.bytes + cost.output.bytes == 961497344);  // 0.96 GB per token
}

TEST_CASE("model cost: float weights multiply floats; formats may differ by expert") {
  const ModelCost floats = Mixtral(1, DType::F16).cost();
  CHECK(floats.layers.int8_macs == 0);
  CHECK(floats.layers.f32_macs == 41943040 + 2 * 176160768 + 8 * 4096);
  Mixtral mixed(1, DType::Q4_K);
  const ModelCost uniform = mixed.cost();
  const size_t n = 14336u * 4096u;
  mixed.layers[0].experts[3].up = matrix(DType::Q8_0, 14336, 4096);
  CHECK(mixed.cost().layers.bytes - uniform.layers.bytes == n * (34 * 8 - 18 * 8) / 256 * 2 / 8);
  mixed.layers[0].experts[3].up = matrix(DType::F32, 14336, 4096);
  CHECK(mixed.cost().layers.f32_macs - uniform.layers.f32_macs == n * 2 / 8);
}

TEST_CASE("model cost: a dense layer is one expert") {
  Mixtral dense(2, DType::Q8_0);
  dense.hparams.n_expert = dense.hparams.n_expert_used = 0;
  for (Layer& layer : dense.layers) {
    layer.router.clear();
    layer.experts.resize(1);
  }
  const ModelCost cost = dense.cost();
  CHECK(cost.unused_expert_bytes == 0);
  CHECK(cost.layers.f32_macs == 0);
  CHECK(cost.layers.int8_macs == 2 * (41943040 + 176160768));
}

TEST_CASE("attention: products with every visible key and value") {
  Mixtral model(4, DType::Q4_K);
  CHECK(attention_macs(model.hparams, 8192) == uint64_t{4} * 32 * 128 * 2 * 8192);
  model.hparams.sliding_window = 4096;
  CHECK(attention_macs(model.hparams, 8192) == uint64_t{4} * 32 * 128 * 2 * 4096);
}

TEST_CASE("session: expert uses count every choice of every layer, in the last those of tokens with logits") {
  const auto path = test::write_model({.hparams = test::tiny_hparams()}, "expert-uses.gguf");
  const Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
  Session session = engine.new_session({.n_ctx = 64, .n_batch = 16});
  std::vector<Token> tokens(40);
  std::iota(tokens.begin(), tokens.end(), 3);
  session.append(tokens);
  session.append({tokens.data(), 1});
  session.append_all_logits({tokens.data(), 20}, [](size_t, size_t, std::span<const float>) {}, 3);
  const auto uses = session.expert_uses();
  REQUIRE(uses.size() == 2 * 4);
  for (size_t layer = 0; layer < 2; ++layer) {
    uint64_t sum = 0;
    for (size_t e = 0; e < 4; ++e) sum += uses[layer * 4 + e];
    CHECK(sum == (layer == 0 ? 61 : 2 + 17) * 2);
  }
}
