// Finished sequences and their beginnings, within the memory there is.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "server/sequence_pool.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"
#include "tests/support/reference_device.h"

using namespace duet;
using namespace duet::server;

namespace {

constexpr uint32_t kContext = 256;

Engine open_on(gpu::Device* device) {
  test::RandomModel random;
  random.hparams = test::small_mixtral_hparams(2, 512);
  random.type = [](const std::string&) { return DType::Q8_0; };
  EngineOptions options{.n_threads = 1, .isa = {}, .notice = {}};
  options.memory.n_ctx = kContext;
  if (device != nullptr) options.gpu = {.mode = GpuOptions::Mode::attention, .device = device};
  return Engine::open(test::write_model(random, "pool.gguf"), options);
}

std::vector<Token> changed_at(size_t i, std::vector<Token> prompt) {
  prompt[i] = prompt[i] == 7 ? 8 : 7;
  return prompt;
}

// Evaluates what the pool does not have of a prompt. How much it had.
size_t serve(SequencePool& pool, Batch& batch, std::span<const Token> prompt) {
  SequencePool::Entry& entry = pool.acquire(prompt, true);
  const size_t held = entry.sequence.tokens().size();
  CHECK(std::ranges::equal(entry.sequence.tokens(), prompt.first(held)));
  const Batch::Part part{&entry.sequence, prompt.subspan(held)};
  batch.evaluate({&part, 1});
  pool.release(entry, true);
  return held;
}

}  // namespace

TEST_CASE("pool: a prompt that shares little with the only sequence there is room for takes its place, beginning kept") {
  test::ReferenceDevice device;
  for (gpu::Device* const card : {static_cast<gpu::Device*>(nullptr), static_cast<gpu::Device*>(&device)}) {
    CAPTURE(card != nullptr);
    const Engine engine = open_on(card);
    Batch batch(engine, {.n_ctx = kContext, .n_batch = 128, .n_sequences = 1});
    SequencePool pool(batch, batch.sequence_bytes(), nullptr);
    const auto first = test::some_tokens(100, engine.info().hparams.n_vocab);
    const auto second = changed_at(30, first);
    CHECK(serve(pool, batch, first) == 0);
    CHECK(serve(pool, batch, second) == 30);
    CHECK(pool.size() == 1);
    CHECK(pool.bytes() <= batch.sequence_bytes());
    CHECK(serve(pool, batch, second) == 99);
  }
}

TEST_CASE("pool: with room for two, both stay, and the beginning of one is copied") {
  const Engine engine = open_on(nullptr);
  Batch batch(engine, {.n_ctx = kContext, .n_batch = 128, .n_sequences = 2});
  SequencePool pool(batch, 2 * batch.sequence_bytes(), nullptr);
  const auto first = test::some_tokens(100, engine.info().hparams.n_vocab);
  const auto second = changed_at(30, first);
  CHECK(serve(pool, batch, first) == 0);
  CHECK(serve(pool, batch, second) == 30);
  CHECK(pool.size() == 2);
  CHECK(serve(pool, batch, first) == 99);
  CHECK(serve(pool, batch, second) == 99);
  const auto third = changed_at(0, first);
  CHECK(serve(pool, batch, third) == 0);  // in place of the oldest
  CHECK(pool.size() == 2);
  CHECK(serve(pool, batch, second) == 99);
}
