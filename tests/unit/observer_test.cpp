// What a product observer is told, against the rows of the naive reference model.
#include "runtime/observer.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.h"
#include "runtime/engine.h"
#include "runtime/memory_plan.h"
#include "tests/support/errors.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"
#include "tests/support/reference_model.h"

using namespace duet;
using test::RandomModel;

namespace {

constexpr size_t kTokens = 45;

struct Row {
  std::vector<double> values;
  double weight;
};
using Rows = std::map<std::pair<std::string, int>, std::vector<Row>>;  // by tensor and expert

// In any order: batches and reference visit tokens alike, experts and layers not.
void sort(Rows& rows) {
  for (auto& [key, list] : rows)
    std::sort(list.begin(), list.end(), [](const Row& a, const Row& b) { return a.values[0] < b.values[0]; });
}

Rows reference_rows(const std::filesystem::path& path, std::span<const Token> tokens) {
  const GgufFile file = GgufFile::open(path);
  Rows rows;
  test::reference_logits(file, read_hparams(file, [](const std::string&) {}), tokens,
                         [&](const std::string& tensor, int expert, const std::vector<double>& row, double weight) {
                           rows[{tensor, expert}].push_back({row, weight});
                         });
  sort(rows);
  return rows;
}

ProductObserver collect(Rows& rows) {
  return [&rows](const ProductInput& in) {
    CHECK((in.router_weights.empty() ? in.expert < 0 : in.router_weights.size() == in.n_rows));
    CHECK(tensor_name(in.kind, in.layer) == in.tensor);
    for (size_t i = 0; i < in.n_rows; ++i) {
      const float* row = in.rows + i * in.cols;
      rows[{std::string(in.tensor), in.expert}].push_back({{row, row + in.cols}, in.router_weights.empty() ? 1.0 : double{in.router_weights[i]}});
    }
  };
}

Rows observed_rows(const Engine& engine, std::span<const Token> tokens, uint32_t n_batch) {
  Rows rows;
  Session session = engine.new_session({.n_ctx = 64, .n_batch = n_batch, .kv_type = KvType::f32, .products = collect(rows)});
  test::all_logits(session, tokens);
  sort(rows);
  return rows;
}

void check_close(const Rows& got, const Rows& want) {
  REQUIRE(got.size() == want.size());
  for (const auto& [key, list] : want) {
    CAPTURE(key.first);
    CAPTURE(key.second);
    REQUIRE(got.contains(key));
    const auto& mine = got.at(key);
    REQUIRE(mine.size() == list.size());
    double worst = 0, largest = 0;
    for (size_t i = 0; i < list.size(); ++i) {
      REQUIRE(mine[i].values.size() == list[i].values.size());
      CHECK(std::abs(mine[i].weight - list[i].weight) < 1e-3);
      for (size_t c = 0; c < list[i].values.size(); ++c) {
        worst = std::max(worst, std::abs(mine[i].values[c] - list[i].values[c]));
        largest = std::max(largest, std::abs(list[i].values[c]));
      }
    }
    CHECK(worst < 1e-3 * largest);
  }
}

void check(const RandomModel& model) {
  const auto path = test::write_model(model, "observer.gguf");
  const auto tokens = test::some_tokens(kTokens, model.hparams.n_vocab);
  const Rows want = reference_rows(path, tokens);
  const Engine engine = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}});
  for (const uint32_t n_batch : {64u, 7u, 1u}) {
    CAPTURE(n_batch);
    check_close(observed_rows(engine, tokens, n_batch), want);
  }
}

}  // namespace

TEST_CASE("observer: every product's rows, experts and router weights, as computed naively") {
  check({.hparams = test::tiny_hparams()});
}

TEST_CASE("observer: old layout and dense models") {
  check({.hparams = test::tiny_hparams(), .split_experts = true});
  HParams dense = test::tiny_hparams();
  dense.n_expert = dense.n_expert_used = 0;
  check({.hparams = dense});
}

TEST_CASE("observer: streamed experts are seen as resident ones, floats before 8-bit quantization") {
  const RandomModel model{.hparams = test::small_mixtral_hparams(2, 512), .type = [](const std::string&) { return DType::Q4_K; }};
  const auto path = test::write_model(model, "observer-streamed.gguf");
  const auto tokens = test::some_tokens(kTokens, model.hparams.n_vocab);
  MemoryOptions memory{.n_ctx = 64, .n_batch = 64, .kv_type = KvType::f32};
  const Engine resident = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}});
  memory.slots = 2;
  const Engine streamed = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}, .memory = memory});
  REQUIRE(streamed.plan().streamed);
  for (const uint32_t n_batch : {64u, 20u}) {
    const Rows a = observed_rows(resident, tokens, n_batch), b = observed_rows(streamed, tokens, n_batch);
    REQUIRE(a.size() == b.size());
    for (const auto& [key, list] : a) {
      CAPTURE(key.first);
      const auto& other = b.at(key);
      REQUIRE(other.size() == list.size());
      for (size_t i = 0; i < list.size(); ++i) CHECK((list[i].values == other[i].values && list[i].weight == other[i].weight));
    }
  }
}

TEST_CASE("observer: logits keep their bits, and what it throws ends the evaluation") {
  const RandomModel model{.hparams = test::small_mixtral_hparams(2, 512), .type = [](const std::string&) { return DType::Q4_K; }};
  const auto path = test::write_model(model, "observer-bits.gguf");
  const auto tokens = test::some_tokens(kTokens, model.hparams.n_vocab);
  const Engine engine = Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}});
  Session plain = engine.new_session({.n_ctx = 64, .n_batch = 32});
  size_t n_calls = 0;
  Session watched = engine.new_session({.n_ctx = 64, .n_batch = 32, .products = [&](const ProductInput&) { ++n_calls; }});
  CHECK(test::same_bits(test::all_logits(plain, tokens), test::all_logits(watched, tokens)));
  CHECK(n_calls > 0);
  Session failing = engine.new_session({.n_ctx = 64, .products = [](const ProductInput& in) {
                                          if (in.layer == 1) fail(ErrorKind::usage, "enough");
                                        }});
  test::check_thrown(test::thrown_by([&] { failing.append(tokens); }), ErrorKind::usage, "enough");
  CHECK(failing.tokens().empty());
}
