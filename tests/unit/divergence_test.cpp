#include "runtime/divergence.h"

#include <doctest/doctest.h>

#include <cmath>

#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;

namespace {

Engine engine_of(DType type, const std::string& name, HParams hparams = test::small_mixtral_hparams(2, 512)) {
  const test::RandomModel model{.hparams = std::move(hparams), .type = [=](const std::string&) { return type; }};
  return Engine::open(test::write_model(model, name), {.n_threads = 2, .isa = {}, .notice = {}});
}

constexpr uint32_t kCtx = 16;

void save(const Engine& engine, const std::vector<Token>& ids, const std::filesystem::path& path) {
  const auto n_chunks = static_cast<uint32_t>(ids.size() / kCtx);
  LogitsReferenceWriter writer(path, {"m", engine.info().hparams.n_vocab, kCtx, n_chunks, ids});
  PerplexityOptions options{.n_ctx = kCtx, .n_batch = 5};
  options.rows = [&](std::span<const float> logits, std::span<const Token> targets) { writer.add(logits, targets, 1); };
  perplexity(engine, ids, std::nullopt, options);
  writer.finish();
}

}  // namespace

TEST_CASE("divergence: a model from itself is zero, from a coarser one what the definition says") {
  const test::TempFolder folder;
  const Engine exact = engine_of(DType::F32, "divergence-f32.gguf"), coarse = engine_of(DType::Q2_K, "divergence-q2k.gguf");
  const auto ids = test::some_tokens(6 * kCtx, exact.info().hparams.n_vocab);
  save(exact, ids, folder / "ref");
  LogitsReferenceReader own = LogitsReferenceReader::open(folder / "ref");
  const DivergenceResult same = divergence(exact, own, {});
  CHECK(same.n_tokens == 42);
  CHECK(same.n_chunks == 6);
  CHECK(std::abs(same.kld.value) < 1e-6);
  CHECK(same.same_top.value == 1.0);
  CHECK(same.ratio.value == doctest::Approx(1).epsilon(1e-5));

  LogitsReferenceReader reference = LogitsReferenceReader::open(folder / "ref");
  const DivergenceResult got = divergence(coarse, reference, {.n_batch = 7});
  double kld = 0, squares = 0, difference = 0;
  size_t n_same = 0, n = 0;
  for (size_t chunk = 0; chunk < 6; ++chunk) {
    Session a = exact.new_session({.n_ctx = kCtx, .kv_type = KvType::f32}), b = coarse.new_session({.n_ctx = kCtx, .kv_type = KvType::f32});
    for (size_t i = 0; i + 1 < kCtx; ++i) {
      const Token token = ids[chunk * kCtx + i], next = ids[chunk * kCtx + i + 1];
      a.append({&token, 1});
      b.append({&token, 1});
      if (i < kCtx / 2) continue;
      double sum = 0;
      const auto n_vocab = static_cast<Token>(a.logits().size());
      for (Token t = 0; t < n_vocab; ++t) {
        const double log_p = -negative_log_likelihood(a.logits(), t);
        sum += std::exp(log_p) * (log_p + negative_log_likelihood(b.logits(), t));
      }
      kld += sum;
      squares += sum * sum;
      const auto top = [](std::span<const float> l) { return std::max_element(l.begin(), l.end()) - l.begin(); };
      n_same += top(a.logits()) == top(b.logits());
      const double d = std::exp(-negative_log_likelihood(b.logits(), next)) - std::exp(-negative_log_likelihood(a.logits(), next));
      difference += d * d;
      ++n;
    }
  }
  const double count = static_cast<double>(n), mean = kld / count;
  CHECK(mean > 1e-4);
  CHECK(got.kld.value == doctest::Approx(mean).epsilon(2e-3));
  CHECK(got.kld.error == doctest::Approx(std::sqrt((squares / count - mean * mean) / (count - 1))).epsilon(1e-2));
  CHECK(got.same_top.value == doctest::Approx(static_cast<double>(n_same) / count));
  CHECK(got.rms_difference.value == doctest::Approx(std::sqrt(difference / count)).epsilon(1e-2));
  CHECK(got.kld_median <= got.kld_90);
  CHECK(got.kld_90 <= got.kld_99);
  CHECK(got.kld_99 <= got.kld_max);
  CHECK(got.perplexity.value / got.reference_perplexity.value == doctest::Approx(got.ratio.value));
}

TEST_CASE("divergence: another vocabulary is refused") {
  const test::TempFolder folder;
  const Engine a = engine_of(DType::F32, "divergence-a.gguf"), b = engine_of(DType::F32, "divergence-b.gguf", [] {
    HParams h = test::tiny_hparams();
    h.n_vocab = 98;
    return h;
  }());
  REQUIRE(a.info().hparams.n_vocab != b.info().hparams.n_vocab);
  save(a, test::some_tokens(kCtx, a.info().hparams.n_vocab), folder / "ref");
  LogitsReferenceReader reference = LogitsReferenceReader::open(folder / "ref");
  test::check_thrown(test::thrown_by([&] { divergence(b, reference, {}); }), ErrorKind::format, "vocabulary");
}
