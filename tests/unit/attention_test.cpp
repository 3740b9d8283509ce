// Attention over a KV cache: one result per position whatever the chunks, threads and neighbours.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "runtime/attention.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using test::same_bits;

namespace {

HParams attention_hparams(uint32_t window = 0) {
  HParams h = test::tiny_hparams();
  h.n_layer = 1;
  h.n_expert = h.n_expert_used = 0;  // with experts a window is ignored
  h.n_head = 6;
  h.n_head_kv = 2;
  h.head_dim = h.n_rot = 32;
  h.sliding_window = window;
  return h;
}

struct Fixture {
  GgufFile file;
  HParams hparams;
  Model model;
  explicit Fixture(const HParams& h)
      : file(GgufFile::open(test::write_model({.hparams = h, .type = [](const std::string&) { return DType::Q8_0; }}, "attention.gguf"))),
        hparams(read_hparams(file, [](const std::string&) {})),
        model(Model::bind(file, hparams)) {
    REQUIRE(hparams.sliding_window == h.sliding_window);
  }
};

constexpr size_t kContext = 5000;

// The input of position `pos` depends on it alone.
std::vector<float> inputs(size_t n, size_t n_embd) {
  std::vector<float> out(n * n_embd);
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::sin(static_cast<float>(i % 9973) * 0.37f + static_cast<float>(i / 9973));
  return out;
}

struct Chunks {
  const KernelTable* kernels;
  size_t n_batch;
  int n_threads = 1;
  KvType type = KvType::f16;
};

// Outputs of positions [0, n), evaluated in chunks; those from `repeat_from` on twice, as after a cut.
std::vector<float> outputs(const Fixture& f, size_t n, const Chunks& c, size_t repeat_from = kContext) {
  const size_t n_embd = f.hparams.n_embd;
  std::vector<float> residual = inputs(n, n_embd), panels(static_cast<size_t>(c.n_threads) * kPanelFloats);
  const std::vector<float> fresh = residual;
  Compute compute{};
  compute.kernels = c.kernels;
  compute.n_threads = c.n_threads;
  compute.panels = panels.data();
  Attention attention(f.model.hparams(), f.model.rope_factors(), compute, kContext, c.n_batch);
  Activations input(c.n_batch, n_embd);
  KvCache kv(f.hparams, kContext, c.type);
  const auto evaluate = [&](size_t begin) {
    for (size_t first = begin; first < n; first += c.n_batch) {
      const size_t n_chunk = std::min(c.n_batch, n - first);
      const KvRun run{&kv, first, n_chunk};
      attention.begin({&run, 1});
      attention.forward(f.model.layers()[0], 0, input, residual.data() + first * n_embd);
    }
  };
  evaluate(0);
  if (repeat_from < n) {
    std::copy(fresh.begin() + static_cast<ptrdiff_t>(repeat_from * n_embd), fresh.end(), residual.begin() + static_cast<ptrdiff_t>(repeat_from * n_embd));
    evaluate(repeat_from);
  }
  return residual;
}

}  // namespace

TEST_CASE("attention: the same bits in chunks of 1, 2, 7, 32, 512 and after a cut") {
  for (const uint32_t window : {0u, 300u}) {
    const Fixture f(attention_hparams(window));
    for (const KernelTable* kernels : usable_kernels()) {
      const bool scalar = std::string_view(kernels->isa) == "scalar";
      for (const KvType type : {KvType::f32, KvType::f16, KvType::q8_0}) {
        const size_t n = scalar ? 270 : 700;
        CAPTURE(kernels->isa);
        CAPTURE(window);
        const std::vector<float> one = outputs(f, n, {kernels, 1, 1, type});
        for (const size_t n_batch : {2u, 7u, 32u, 512u}) {
          CAPTURE(n_batch);
          CHECK(same_bits(outputs(f, n, {kernels, n_batch, 1, type}), one));
        }
        CHECK(same_bits(outputs(f, n, {kernels, 50, 1, type}, 261), one));
      }
    }
  }
}

TEST_CASE("attention: the same bits with 1, 2 and 3 threads, in spans shared out and not") {
  const size_t n = 4200;  // three spans
  for (const uint32_t window : {0u, 2500u}) {
    const Fixture f(attention_hparams(window));
    const KernelTable& kernels = select_kernels("");
    const std::vector<float> whole = outputs(f, n, {&kernels, 512});
    for (const int n_threads : {1, 2, 3})
      for (const size_t n_batch : {1u, 500u}) {
        CAPTURE(n_threads);
        CAPTURE(n_batch);
        CHECK(same_bits(outputs(f, n, {&kernels, n_batch, n_threads}), whole));
      }
  }
}

TEST_CASE("attention: 8-bit keys and values stay near") {
  const Fixture f(attention_hparams());
  const KernelTable& kernels = select_kernels("");
  const auto exact = outputs(f, 600, {&kernels, 512, 1, KvType::f32}), q8 = outputs(f, 600, {&kernels, 512, 1, KvType::q8_0});
  const auto before = inputs(600, f.hparams.n_embd);
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{q8[i]} - double{exact[i]}, 2);
    size += std::pow(double{exact[i]} - double{before[i]}, 2);
  }
  CHECK(error > 0);
  CHECK(std::sqrt(error / size) <= 0.02);
}

TEST_CASE("kv cache: 8-bit needs whole blocks, sizes are those of the types") {
  HParams h = attention_hparams();
  CHECK(KvCache::bytes_needed(h, 256, KvType::f16) == 256 * 2 * 2 * 32 * 2);
  CHECK(KvCache::bytes_needed(h, 256, KvType::f32) == 256 * 2 * 2 * 32 * 4);
  CHECK(KvCache::bytes_needed(h, 256, KvType::q8_0) == 256 * 2 * 2 * 34);
  CHECK(KvCache(h, 256, KvType::q8_0).size_bytes() == 256 * 2 * 2 * 34);
  CHECK(KvCache::bytes_needed(h, 257, KvType::f16) == 512 * 2 * 2 * 32 * 2);
  h.head_dim = 80;
  try {
    KvCache::bytes_needed(h, 256, KvType::q8_0);
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::unsupported);
    CHECK(std::string(e.what()).find("80") != std::string::npos);
  }
}

TEST_CASE("attention: positions near 64k are rotated exactly") {
  // Two positions apart by one, anywhere, give the same angle between query and key: with one
  // visible neighbour of equal input the weights do not depend on where they are.
  HParams h = attention_hparams(2);
  const Fixture f(h);
  const KernelTable& kernels = select_kernels("");
  std::vector<float> panels(kPanelFloats);
  Compute compute{};
  compute.kernels = &kernels;
  compute.panels = panels.data();
  constexpr size_t kFar = 65000;
  Attention attention(f.model.hparams(), f.model.rope_factors(), compute, kFar + 8, 8);
  Activations input(8, h.n_embd);
  KvCache kv(f.hparams, kFar + 8, KvType::f32);
  const auto run = [&](size_t first) {
    std::vector<float> residual = inputs(4, h.n_embd);
    const KvRun rows{&kv, first, 4};
    attention.begin({&rows, 1});
    attention.forward(f.model.layers()[0], 0, input, residual.data());
    return std::vector<float>(residual.begin() + 2 * h.n_embd, residual.end());  // those that see two of the four
  };
  const auto near = run(0), far = run(kFar);
  float worst = 0;
  for (size_t i = 0; i < near.size(); ++i) worst = std::max(worst, std::abs(near[i] - far[i]));
  CHECK(worst <= 1e-5f);
}
