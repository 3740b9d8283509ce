// With quantized weights the logits of a position have the same bits whatever the batch it is
// evaluated in, the number of threads, and the tokens beside it.
#include <doctest/doctest.h>

#include "runtime/engine.h"
#include "runtime/kernels/kernels.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using test::RandomModel;
using test::same_bits;
using test::some_tokens;

namespace {

constexpr size_t kTokens = 70;

std::vector<float> all_logits(const Engine& engine, std::span<const Token> tokens, uint32_t n_batch) {
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = n_batch});
  return test::all_logits(session, tokens);
}

// n_ff is no multiple of 256 where the format allows it; n_embd, n_head * head_dim are.
HParams hparams_for(DType dtype, uint32_t n_expert) {
  HParams h = test::tiny_hparams();
  h.n_embd = 256;
  h.n_head = 4;
  h.n_head_kv = 2;
  h.head_dim = h.n_rot = 64;
  h.n_ff = format_of(dtype).block_elems == 256 ? 512 : 544;
  h.n_expert = n_expert;
  h.n_expert_used = n_expert > 0 ? 2 : 0;
  return h;
}

void check(const RandomModel& model, const std::string& isa) {
  const auto path = test::write_model(model, "invariance.gguf");
  const auto tokens = some_tokens(kTokens, model.hparams.n_vocab);
  std::vector<float> want;
  for (const int n_threads : {1, 2, 3}) {
    const Engine engine = Engine::open(path, {.n_threads = n_threads, .isa = isa, .notice = {}});
    for (const uint32_t n_batch : {1u, 2u, 7u, 32u, 512u}) {
      CAPTURE(n_threads);
      CAPTURE(n_batch);
      const auto got = all_logits(engine, tokens, n_batch);
      if (want.empty()) want = got;
      CHECK(same_bits(got, want));
    }
  }
}

void check(DType dtype) {
  for (const uint32_t n_expert : {8u, 0u}) {
    CAPTURE(n_expert);
    check({.hparams = hparams_for(dtype, n_expert), .type = [=](const std::string&) { return dtype; }}, {});
  }
}

}  // namespace

TEST_CASE("invariance: Q4_K") { check(DType::Q4_K); }
TEST_CASE("invariance: Q6_K") { check(DType::Q6_K); }
TEST_CASE("invariance: Q3_K") { check(DType::Q3_K); }
TEST_CASE("invariance: Q8_0") { check(DType::Q8_0); }
TEST_CASE("invariance: Q4_0") { check(DType::Q4_0); }

TEST_CASE("invariance: formats mixed as recipes mix them, in every instruction set") {
  const auto type = [](const std::string& name) {
    if (name.find("ffn_down") != name.npos || name == "output.weight") return DType::Q6_K;
    return name.find("attn_v") != name.npos ? DType::Q8_0 : DType::Q4_K;
  };
  for (const KernelTable* table : usable_kernels()) {
    CAPTURE(table->isa);
    check({.hparams = hparams_for(DType::Q4_K, 8), .type = type}, table->isa);
  }
}

TEST_CASE("invariance: all tokens to the same experts") {
  HParams h = hparams_for(DType::Q4_K, 4);
  h.n_expert_used = 4;
  check({.hparams = h, .type = [](const std::string&) { return DType::Q4_K; }}, {});
}
