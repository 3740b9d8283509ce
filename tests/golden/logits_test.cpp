// The converted demo model against what transformers computes in float32 from the same weights:
// logits, hidden states, routing, greedy continuations. Data: tests/golden/data (made once with
// transformers 5.23, see the notes in the JSON files). Float weights and float keys and values.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/json.h"
#include "base/mapped_file.h"
#include "runtime/decoder.h"
#include "runtime/engine.h"
#include "runtime/perplexity.h"
#include "tests/support/npy.h"
#include "tests/support/reference_device.h"
#include "tests/support/skip.h"

using namespace duet;

namespace {

constexpr double kTolerance = 2e-3;    // of a logit
constexpr double kTieMargin = 1e-3;    // a lead below this may flip with the order of summation
constexpr const char* kTestedIsas[] = {"scalar", "avx2", "avxvnni", "avx512vnni256", "avx512", "neon"};

std::filesystem::path data_path(const char* name) { return std::filesystem::path(DUET_SOURCE_DIR "/tests/golden/data") / name; }
std::filesystem::path model_path(const char* type) { return std::filesystem::path(DUET_TEST_DIR) / (std::string("demo-") + type + ".gguf"); }

Json read_data(const char* name) { return parse_json(read_file(data_path(name), 64 << 20), name); }

std::vector<std::vector<Token>> golden_sequences() {
  return read_data("sequences.json")["sequences"].get<std::vector<std::vector<Token>>>();
}

bool usable(const std::string& isa) {
  const auto tables = usable_kernels();
  return std::any_of(tables.begin(), tables.end(), [&](const KernelTable* t) { return t->isa == isa; });
}

size_t argmax(std::span<const float> x) { return static_cast<size_t>(std::max_element(x.begin(), x.end()) - x.begin()); }

struct Difference {
  double max = 0;
  size_t flips = 0, rows = 0;
  void add(std::span<const float> got, std::span<const float> want) {
    for (size_t i = 0; i < got.size(); ++i) {
      const double d = std::abs(double{got[i]} - double{want[i]});
      max = d <= max ? max : d;  // NaN counts as larger
    }
    flips += argmax(got) != argmax(want);
    ++rows;
  }
};

// Every logit of every golden sequence.
Difference compare_logits(const Engine& engine, uint32_t n_batch, KvType kv_type) {
  const test::NpyArray golden = test::read_npy(data_path("logits.npy"));
  Difference difference;
  Session session = engine.new_session({.n_ctx = 128, .n_batch = n_batch, .kv_type = kv_type});
  size_t start = 0;
  for (const auto& ids : golden_sequences()) {
    session.truncate(0);
    session.append_all_logits(ids, [&](size_t first, size_t n_rows, std::span<const float> logits) {
      for (size_t i = 0; i < n_rows; ++i)
        difference.add(logits.subspan(i * golden.shape[1], golden.shape[1]), golden[start + first + i]);
    });
    start += ids.size();
  }
  CHECK(difference.rows == golden.shape[0]);
  return difference;
}

void check_logits(const char* type, const char* isa) {
  if (!usable(isa)) DUET_SKIP(std::string(isa) + " kernels cannot run on this processor");
  for (const int n_threads : {1, 2}) {
    const Engine engine = Engine::open(model_path(type), {.n_threads = n_threads, .isa = isa, .notice = {}});
    REQUIRE(engine.info().isa == isa);
    for (const uint32_t n_batch : {1u, 512u}) {
      CAPTURE(n_threads);
      CAPTURE(n_batch);
      const Difference difference = compare_logits(engine, n_batch, KvType::f32);
      MESSAGE(std::string(type) << " " << std::string(isa) << ", " << n_threads << " threads, batch " << n_batch << ": max |difference| " << difference.max);
      CHECK(difference.max <= kTolerance);
      CHECK(difference.flips == 0);
    }
  }
}

// Greedy tokens after a prompt; from an excused flip on, the golden token is fed and the step must
// agree again wherever the lead is clear.
void check_greedy_case(Session& session, const Json& golden) {
  session.sync(golden["prompt_ids"].get<std::vector<Token>>());
  const auto want = golden["ids"].get<std::vector<Token>>();
  const auto margins = golden["margins"].get<std::vector<double>>();
  for (size_t i = 0; i < want.size(); ++i) {
    const Token got = static_cast<Token>(argmax(session.logits()));
    CAPTURE(i);
    if (margins[i] >= kTieMargin) REQUIRE(got == want[i]);
    session.append({&want[i], 1});
  }
}

void check_greedy(const char* type, const char* isa) {
  if (!usable(isa)) DUET_SKIP(std::string(isa) + " kernels cannot run on this processor");
  const Json golden = read_data("greedy.json");
  const Engine engine = Engine::open(model_path(type), {.n_threads = 1, .isa = isa, .notice = {}});
  Session session = engine.new_session({.n_ctx = 128, .kv_type = KvType::f32});
  for (const Json& one : golden["cases"]) {
    CAPTURE(one["prompt"].get<std::string>());
    check_greedy_case(session, one);
  }
}

// The same on a card, with the experts of so many layers on it.
EngineOptions on_card(test::AnyCard& card, uint32_t n_layers) {
  return {.n_threads = 1, .isa = {}, .notice = {}, .memory = {.n_ctx = 128, .n_batch = 64, .kv_type = KvType::f32},
          .gpu = {.mode = GpuOptions::Mode::layers, .n_layers = n_layers, .device = card.get()}};
}

void check_card(uint32_t n_layers) {
  const Json golden = read_data("greedy.json");
  for (const char* type : {"f32", "bf16"}) {
    test::AnyCard card;
    const Engine engine = Engine::open(model_path(type), on_card(card, n_layers));
    REQUIRE(engine.card_plan() != nullptr);
    {
      const Difference difference = compare_logits(engine, 64, KvType::f32);
      MESSAGE(std::string(type) << " on " << engine.info().gpu << ", " << n_layers << " layers of experts: max |difference| " << difference.max);
      CHECK(difference.max <= kTolerance);
      CHECK(difference.flips == 0);
    }
    Session session = engine.new_session({.n_ctx = 128, .kv_type = KvType::f32});
    for (const Json& one : golden["cases"]) check_greedy_case(session, one);
  }
}

// Negative log-likelihood of each token of the first two windows of the golden perplexity text.
void check_windows(const char* isa, uint32_t n_batch, size_t n_windows) {
  if (!usable(isa)) DUET_SKIP(std::string(isa) + " kernels cannot run on this processor");
  const Json golden = read_data("perplexity.json");
  const Engine engine = Engine::open(model_path("f32"), {.n_threads = n_batch == 1 ? 1 : 2, .isa = isa, .notice = {}});
  Session session = engine.new_session({.n_ctx = 512, .n_batch = n_batch, .kv_type = KvType::f32});
  for (size_t w = 0; w < n_windows; ++w) {
    const auto ids = golden["windows"][w]["ids"].get<std::vector<Token>>();
    const auto want = golden["windows"][w]["nll"].get<std::vector<double>>();
    double worst = 0;
    session.truncate(0);
    session.append_all_logits(std::span(ids).first(want.size()), [&](size_t first, size_t n_rows, std::span<const float> logits) {
      const size_t n_vocab = logits.size() / n_rows;
      for (size_t i = 0; i < n_rows; ++i)
        worst = std::max(worst, std::abs(negative_log_likelihood(logits.subspan(i * n_vocab, n_vocab), ids[first + i + 1]) - want[first + i]));
    });
    MESSAGE("window " << w << ", " << std::string(isa) << ", batch " << n_batch << ": max |nll difference| " << worst);
    CHECK(worst <= kTolerance);
  }
}

}  // namespace

TEST_CASE("golden tests cover every instruction set that is compiled in") {
  for (const std::string& isa : compiled_isas())
    CHECK(std::find(std::begin(kTestedIsas), std::end(kTestedIsas), isa) != std::end(kTestedIsas));
}

TEST_CASE("F32 logits equal transformers', scalar") { check_logits("f32", "scalar"); }
TEST_CASE("F32 logits equal transformers', avx2") { check_logits("f32", "avx2"); }
TEST_CASE("F32 logits equal transformers', avxvnni") { check_logits("f32", "avxvnni"); }
TEST_CASE("F32 logits equal transformers', avx512vnni256") { check_logits("f32", "avx512vnni256"); }
TEST_CASE("F32 logits equal transformers', avx512") { check_logits("f32", "avx512"); }
TEST_CASE("logits and greedy continuations on a card equal transformers', all experts on it") { check_card(Engine::open(model_path("f32"), {.isa = {}, .notice = {}}).info().hparams.n_layer); }
TEST_CASE("logits and greedy continuations on a card equal transformers', some experts on it") { check_card(1); }
TEST_CASE("logits and greedy continuations on a card equal transformers', no experts on it") { check_card(0); }
TEST_CASE("BF16 logits equal transformers', scalar") { check_logits("bf16", "scalar"); }
TEST_CASE("BF16 logits equal transformers', avx2") { check_logits("bf16", "avx2"); }
TEST_CASE("BF16 logits equal transformers', avxvnni") { check_logits("bf16", "avxvnni"); }
TEST_CASE("BF16 logits equal transformers', avx512vnni256") { check_logits("bf16", "avx512vnni256"); }
TEST_CASE("BF16 logits equal transformers', avx512") { check_logits("bf16", "avx512"); }

TEST_CASE("greedy continuations equal transformers', scalar") { check_greedy("f32", "scalar"); }
TEST_CASE("greedy continuations equal transformers', avx2") { check_greedy("f32", "avx2"); }
TEST_CASE("greedy continuations equal transformers', avxvnni") { check_greedy("f32", "avxvnni"); }
TEST_CASE("greedy continuations equal transformers', avx512vnni256") { check_greedy("f32", "avx512vnni256"); }
TEST_CASE("greedy continuations equal transformers', avx512") { check_greedy("bf16", "avx512"); }

TEST_CASE("512-token windows score as transformers', scalar, batch 512") { check_windows("scalar", 512, 1); }
TEST_CASE("512-token windows score as transformers', avx2, batch 512") { check_windows("avx2", 512, 2); }
TEST_CASE("512-token windows score as transformers', avx512, batch 512") { check_windows("avx512", 512, 2); }
TEST_CASE("512-token windows score as transformers', avx2, batch 1") { check_windows("avx2", 1, 1); }
TEST_CASE("512-token windows score as transformers', avx512, batch 1") { check_windows("avx512", 1, 1); }

#if defined(__aarch64__)
TEST_CASE("F32 logits equal transformers', neon") { check_logits("f32", "neon"); }
TEST_CASE("BF16 logits equal transformers', neon") { check_logits("bf16", "neon"); }
TEST_CASE("greedy continuations equal transformers', neon") { check_greedy("bf16", "neon"); }
TEST_CASE("512-token windows score as transformers', neon, batch 512") { check_windows("neon", 512, 2); }
TEST_CASE("512-token windows score as transformers', neon, batch 1") { check_windows("neon", 1, 1); }
#endif

TEST_CASE("perplexity of the golden text is within 0.1 % of transformers'") {
  const Json golden = read_data("perplexity.json");
  const std::string text = read_file(data_path("sample.txt"), 1 << 20);
  const Engine engine = Engine::open(model_path("f32"), {});
  const PerplexityResult result = perplexity(engine, text, {});
  MESSAGE("perplexity " << result.perplexity << ", transformers " << golden["perplexity"].get<double>());
  CHECK(result.n_chunks == golden["chunks"].get<size_t>());
  CHECK(result.n_tokens == golden["tokens"].get<size_t>());
  CHECK(result.perplexity == doctest::Approx(golden["perplexity"].get<double>()).epsilon(1e-3));
  CHECK(result.nll_stderr == doctest::Approx(golden["standard_error_nll"].get<double>()).epsilon(1e-3));
}

TEST_CASE("hidden states and routing equal transformers' layer by layer") {
  const test::NpyArray golden = test::read_npy(data_path("hidden.npy"));  // [1 + n_layer, 8, n_embd]
  const Json routing = read_data("sequences.json")["routing"];
  const GgufFile file = GgufFile::open(model_path("f32"));
  const HParams hparams = read_hparams(file, [](const std::string&) {});
  const Model model = Model::bind(file, hparams);
  Decoder decoder(model, {&select_kernels(""), 2}, 128, 128);
  KvCache kv(hparams, 128, KvType::f32);
  double worst = 0;
  size_t n_layers_seen = 0, seq = 0, n_routes = 0;
  DecoderProbe probe;
  probe.hidden = [&](int layer, std::span<const float> hidden) {
    if (seq != 0 || layer + 1 == static_cast<int>(hparams.n_layer)) return;  // golden: last one after the final norm
    const auto want = golden[static_cast<size_t>(layer + 1)];
    for (size_t i = 0; i < want.size(); ++i) worst = std::max(worst, std::abs(double{hidden[i]} - double{want[i]}));
    ++n_layers_seen;
  };
  probe.routing = [&](int layer, std::span<const int32_t> experts, std::span<const float> weights) {
    const Json& want = routing[seq][static_cast<size_t>(layer)];
    REQUIRE(experts.size() == 2 * want.size());
    for (size_t t = 0; t < want.size(); ++t, n_routes += 2) {
      CHECK(experts[2 * t] == want[t][0].get<int>());
      CHECK(experts[2 * t + 1] == want[t][1].get<int>());
      CHECK(weights[2 * t] + weights[2 * t + 1] == doctest::Approx(1.0f));
    }
  };
  decoder.set_probe(probe);
  const auto sequences = golden_sequences();
  for (; seq < sequences.size(); ++seq) decoder.forward(sequences[seq], 0, kv);
  MESSAGE("max |hidden difference| " << worst << ", " << n_routes << " routes compared");
  CHECK(n_layers_seen == hparams.n_layer);
  CHECK(worst <= kTolerance);
}

TEST_CASE("half-precision keys and values change little") {
  const Engine engine = Engine::open(model_path("f32"), {});
  const Difference difference = compare_logits(engine, 512, KvType::f16);
  MESSAGE("f16 keys and values: max |difference| " << difference.max << ", argmax flips " << difference.flips << " of " << difference.rows);
  CHECK(difference.max <= 0.05);
  CHECK(difference.flips <= difference.rows / 100);
}

TEST_CASE("8-bit keys and values change little") {
  const Engine engine = Engine::open(model_path("f32"), {});
  const Difference difference = compare_logits(engine, 512, KvType::q8_0);
  MESSAGE("q8_0 keys and values: max |difference| " << difference.max << ", argmax flips " << difference.flips << " of " << difference.rows);
  // A token near the edge between two experts may go to the other one, so the largest difference
  // only shows that nothing is broken; the choice of tokens must hold.
  CHECK(difference.max <= 5.0);
  CHECK(difference.flips <= difference.rows / 50);
}
