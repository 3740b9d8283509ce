#include "runtime/perplexity.h"

#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "tests/support/errors.h"
#include "tests/support/random_model.h"

using namespace duet;

namespace {

Engine tiny_engine() {
  return Engine::open(test::write_model({.hparams = test::tiny_hparams()}, "perplexity.gguf"), {.n_threads = 1, .isa = {}, .notice = {}});
}

std::vector<Token> some_ids(size_t n) {
  std::vector<Token> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = static_cast<Token>((i * i + 5 * i + 3) % 97);
  return out;
}

}  // namespace

TEST_CASE("perplexity: log-likelihood is stable for large and small logits") {
  const std::vector<float> even(8, 3.0e4f);
  CHECK(negative_log_likelihood(even, 5) == doctest::Approx(std::log(8.0)));
  const std::vector<float> apart{-1.0e4f, 0.0f, 1.0e4f};
  CHECK(negative_log_likelihood(apart, 2) == doctest::Approx(0.0));
  CHECK(negative_log_likelihood(apart, 0) == doctest::Approx(2.0e4));
}

TEST_CASE("perplexity: scores the second half of each chunk, BOS first") {
  const Engine engine = tiny_engine();
  const auto ids = some_ids(55);
  const PerplexityResult result = perplexity(engine, ids, Token{1}, {.n_ctx = 16, .n_batch = 5});
  CHECK(result.n_chunks == 3);
  CHECK(result.n_tokens == 21);  // 16/2 .. 14 predict their next
  CHECK(result.n_ctx == 16);

  double sum = 0, squares = 0;
  for (size_t c = 0; c < 3; ++c) {
    std::vector<Token> chunk(ids.begin() + static_cast<long>(16 * c), ids.begin() + static_cast<long>(16 * c + 16));
    chunk[0] = 1;
    Session session = engine.new_session({.n_ctx = 16, .kv_type = KvType::f32});
    for (size_t i = 0; i < 15; ++i) {
      session.append({&chunk[i], 1});
      if (i < 8) continue;
      const double nll = negative_log_likelihood(session.logits(), chunk[i + 1]);
      CHECK(double{result.token_nll[7 * c + i - 8]} == doctest::Approx(nll).epsilon(1e-4));
      sum += nll;
      squares += nll * nll;
    }
  }
  const double mean = sum / 21, variance = squares / 21 - mean * mean;
  CHECK(result.nll == doctest::Approx(mean).epsilon(1e-4));
  CHECK(result.nll_stderr == doctest::Approx(std::sqrt(variance / 20)).epsilon(1e-3));
  CHECK(result.perplexity == doctest::Approx(std::exp(mean)).epsilon(1e-3));
}

TEST_CASE("perplexity: chunks can be limited and are reported as they come") {
  const Engine engine = tiny_engine();
  size_t calls = 0;
  const auto progress = [&](const PerplexityResult& so_far, size_t n_chunks) {
    ++calls;
    CHECK(n_chunks == 2);
    CHECK(so_far.n_chunks == calls);
  };
  CHECK(perplexity(engine, some_ids(64), std::nullopt, {.n_ctx = 16, .max_chunks = 2, .progress = progress}).n_chunks == 2);
  CHECK(calls == 2);
}

TEST_CASE("perplexity: a text shorter than a chunk is refused with the numbers") {
  const Engine engine = tiny_engine();
  try {
    perplexity(engine, some_ids(15), std::nullopt, {.n_ctx = 16});
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::usage);
    CHECK(std::string(e.what()).find("15 tokens") != std::string::npos);
  }
  CHECK_THROWS_AS(perplexity(engine, some_ids(64), std::nullopt, {.n_ctx = 3}), Error);
}

TEST_CASE("perplexity: a model whose weights are not finite is refused") {
  const std::filesystem::path path = test::write_model({.hparams = test::tiny_hparams()}, "perplexity_nan.gguf");
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-4096, std::ios::end);  // weights
  file << std::string(4096, '\xff');
  file.close();
  const Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
  test::check_thrown(test::thrown_by([&] { perplexity(engine, some_ids(64), std::nullopt, {.n_ctx = 16}); }), ErrorKind::format, "without a finite probability");
}
