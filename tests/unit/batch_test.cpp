// Sequences evaluated together: each is, to the bit, what a session of its own gives.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>

#include "runtime/batch.h"
#include "tests/support/errors.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using test::some_tokens;

namespace {

std::filesystem::path quantized_model(const char* name) {
  test::RandomModel model;
  model.hparams = test::small_mixtral_hparams(2, 512);
  model.type = [](const std::string&) { return DType::Q4_K; };
  return test::write_model(model, name);
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

// Logits of the last token, alone.
std::vector<float> alone(const Engine& engine, std::span<const Token> tokens, KvType type) {
  Session session = engine.new_session({.n_ctx = 600, .kv_type = type});
  session.append(tokens);
  const auto logits = session.logits();
  return {logits.begin(), logits.end()};
}

}  // namespace

TEST_CASE("sequences in one batch have the logits of sessions of their own, to the bit") {
  const Engine engine = Engine::open(quantized_model("batch.gguf"), {.n_threads = 2, .isa = {}, .notice = {}});
  const uint32_t n_vocab = engine.info().hparams.n_vocab;
  for (const KvType type : {KvType::f16, KvType::f32, KvType::q8_0}) {
    Batch batch(engine, {.n_ctx = 600, .n_batch = 320, .n_sequences = 3, .kv_type = type});
    const auto long_one = some_tokens(300, n_vocab), short_one = some_tokens(7, n_vocab);
    const std::vector<Token> single{5};
    Sequence a = batch.new_sequence(), b = batch.new_sequence(), c = batch.new_sequence();
    const Batch::Part first[] = {{&a, {long_one.data(), 280}}, {&c, single}, {&b, {short_one.data(), 3}}};
    batch.evaluate(first);
    const Batch::Part second[] = {{&b, {short_one.data() + 3, 4}}, {&a, {long_one.data() + 280, 20}}};
    batch.evaluate(second);
    const size_t rows[] = {3, 23};
    const auto logits = batch.logits(rows);
    REQUIRE(logits.size() == 2 * n_vocab);
    CHECK(same_bits(logits.first(n_vocab), alone(engine, short_one, type)));
    CHECK(same_bits(logits.last(n_vocab), alone(engine, long_one, type)));
    CHECK(std::ranges::equal(a.tokens(), long_one));
  }
}

TEST_CASE("rows without outputs leave those with them as they are") {
  const Engine engine = Engine::open(quantized_model("batch_outputs.gguf"), {.n_threads = 2, .isa = {}, .notice = {}});
  const uint32_t n_vocab = engine.info().hparams.n_vocab;
  Batch batch(engine, {.n_ctx = 600, .n_batch = 320, .n_sequences = 3});
  const auto tokens = some_tokens(200, n_vocab);
  Sequence a = batch.new_sequence(), b = batch.new_sequence(), c = batch.new_sequence();
  const Batch::Part none[] = {{&a, {tokens.data(), 90}, 0}, {&b, {tokens.data(), 30}, 0}};
  batch.evaluate(none);
  const Batch::Part some[] = {{&b, {tokens.data() + 30, 20}, 0}, {&a, {tokens.data() + 90, 60}, 2}, {&c, {tokens.data(), 40}}};
  batch.evaluate(some);
  const size_t rows[] = {20 + 58, 20 + 59, 80, 80 + 39};
  const auto logits = batch.logits(rows);
  const size_t lengths[] = {149, 150, 1, 40};
  for (size_t i = 0; i < 4; ++i) CHECK(same_bits(logits.subspan(i * n_vocab, n_vocab), alone(engine, {tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(lengths[i])}, KvType::f16)));
  const Batch::Part rest[] = {{&b, {tokens.data() + 50, 50}, 1}};
  batch.evaluate(rest);
  const size_t last[] = {49};
  CHECK(same_bits(batch.logits(last), alone(engine, {tokens.begin(), tokens.begin() + 100}, KvType::f16)));
}

TEST_CASE("a copied or truncated prefix continues as if it had been evaluated") {
  const Engine engine = Engine::open(quantized_model("batch_prefix.gguf"), {.n_threads = 2, .isa = {}, .notice = {}});
  const uint32_t n_vocab = engine.info().hparams.n_vocab;
  Batch batch(engine, {.n_ctx = 600, .n_batch = 320, .n_sequences = 2});
  const auto tokens = some_tokens(300, n_vocab);
  Sequence a = batch.new_sequence(), b = batch.new_sequence();
  const Batch::Part all[] = {{&a, tokens}};
  batch.evaluate(all);
  b.copy_prefix(a, 270);
  a.truncate(260);
  const Batch::Part rest[] = {{&b, {tokens.data() + 270, 30}}, {&a, {tokens.data() + 260, 40}}};
  batch.evaluate(rest);
  const size_t rows[] = {29, 69};
  const auto logits = batch.logits(rows);
  const auto want = alone(engine, tokens, KvType::f16);
  CHECK(same_bits(logits.first(n_vocab), want));
  CHECK(same_bits(logits.last(n_vocab), want));
  CHECK(b.bytes() == a.bytes());
}

TEST_CASE("a batch refuses what does not fit and leaves its sequences as they were") {
  const Engine engine = Engine::open(quantized_model("batch_refuse.gguf"), {.n_threads = 1, .isa = {}, .notice = {}});
  Batch batch(engine, {.n_ctx = 8, .n_sequences = 1});
  Sequence a = batch.new_sequence();
  const auto tokens = some_tokens(9, engine.info().hparams.n_vocab);
  const auto append = [&](std::vector<Token> ids) {
    const Batch::Part part[] = {{&a, ids}};
    batch.evaluate(part);
  };
  append({tokens.begin(), tokens.begin() + 8});
  test::check_thrown(test::thrown_by([&] { append({1}); }), ErrorKind::usage, "9 tokens exceed the context of 8");
  a.truncate(2);
  test::check_thrown(test::thrown_by([&] { append({-1}); }), ErrorKind::usage, "token id -1");
  CHECK(a.tokens().size() == 2);
}
