// Calibrated conversion of every layout of a model; what it is to bring is shown in tests/e2e.
#include "calibrate/calibrate.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "calibrate/memory.h"
#include "calibrate/moments.h"
#include "calibrate/sensitivity.h"
#include "converters/target.h"
#include "runtime/engine.h"
#include "runtime/layer_eval.h"
#include "tests/support/close.h"
#include "tests/support/errors.h"
#include "tests/support/logits.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::test;
namespace fs = std::filesystem;

namespace {

// Of one test case: cases run at the same time.
fs::path folder_of(const char* name) {
  const fs::path folder = fs::path(DUET_TEST_DIR) / "calibrate_unit" / name;
  fs::create_directories(folder);
  return folder;
}
constexpr uint32_t kSequence = 64;

// Of the first sequence of the text that the models below are calibrated with.
std::vector<float> logits_of(const fs::path& path, const std::string& text) {
  const Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
  Session session = engine.new_session({.n_ctx = kSequence});
  const Segment segment{text};
  std::vector<Token> ids = engine.tokenizer().encode({&segment, 1}, true);
  REQUIRE(ids.size() >= kSequence);
  ids.resize(kSequence);
  return all_logits(session, ids);
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
  return sum;
}

std::string spread_text() {
  std::string text;
  for (const Token id : some_tokens(4000, 200)) text += static_cast<char>(33 + id % 90);
  return text;
}

// Inputs of 64 columns that share one factor, and what rows are to make up for: the factor and noise.
struct Shared {
  static constexpr size_t kCols = 64, kRows = 4, kTokens = 1500;
  std::vector<float> x, x0, r;

  Shared(Rng& rng, float lost) : x(kTokens * kCols), x0(x.size()), r(kTokens * kRows) {
    for (size_t t = 0; t < kTokens; ++t) {
      const float factor = 2 * rng.symmetric();
      for (size_t c = 0; c < kCols; ++c) {
        x[t * kCols + c] = factor + rng.symmetric();
        x0[t * kCols + c] = x[t * kCols + c] + lost * factor;
      }
      for (size_t i = 0; i < kRows; ++i) r[t * kRows + i] = factor + 0.5f * rng.symmetric();
    }
  }

  // Of what w is to make up for, the part that is left when it is moved to `to`.
  double left(const std::vector<float>& w, const std::vector<float>& to) const {
    double before = 0, after = 0;
    for (size_t t = 0; t < kTokens; ++t)
      for (size_t i = 0; i < kRows; ++i) {
        double wanted = double{r[t * kRows + i]}, given = 0;
        for (size_t c = 0; c < kCols; ++c) {
          wanted += double{w[i * kCols + c]} * (double{x0[t * kCols + c]} - double{x[t * kCols + c]});
          given += (double{to[i * kCols + c]} - double{w[i * kCols + c]}) * double{x[t * kCols + c]};
        }
        before += wanted * wanted;
        after += (wanted - given) * (wanted - given);
      }
    return after / before;
  }
};

}  // namespace

TEST_CASE("calibrate: blocks of columns that know of the same drift do not make up for it several times") {
  const HParams hparams = tiny_hparams({});
  const std::vector<float> no_factors;
  const LayerEval eval(hparams, no_factors, 2, 16);
  for (const float lost : {0.0f, 0.05f}) {
    Rng rng(5);
    const Shared fitted(rng, lost), fresh(rng, lost);
    std::vector<float> w(Shared::kRows * Shared::kCols);
    for (float& v : w) v = 0.1f + 0.1f * rng.symmetric();
    for (const size_t n_blocks : {size_t{1}, size_t{2}, size_t{4}}) {
      CAPTURE(n_blocks);
      Moments moments(Shared::kCols, Shared::kCols / n_blocks, Shared::kRows);
      for (size_t t = 0; t < Shared::kTokens; t += 500)
        moments.add(eval, fitted.x.data() + t * Shared::kCols, fitted.x0.data() + t * Shared::kCols, fitted.r.data() + t * Shared::kRows, 500);
      std::vector<float> moved = w, alone = w;
      moments.correct(moments.metric(eval), moved, 2);
      moments.correct(moments.metric(eval), alone, 1);
      CHECK(moved == alone);
      CHECK(fresh.left(w, moved) < 0.1);
    }
  }
}

TEST_CASE("calibrate: dense, per-expert and tied models, wide experts that see few tokens") {
  const fs::path folder = folder_of("layouts");
  TinyModelOptions dense, split, tied, many;
  dense.n_expert = dense.n_expert_used = 0;
  split.split_experts = true;
  tied.tied_output = true;
  many.n_expert = 8;
  for (const TinyModelOptions& model : {dense, split, tied, many}) {
    write_tiny_model(folder / "in.gguf", model);
    ConvertOptions options;
    options.recipe = "Q4_0";
    options.overwrite = true;
    options.n_threads = 2;
    quantize(folder / "in.gguf", folder / "plain.gguf", options);
    quantize_calibrated(folder / "in.gguf", folder / "fitted.gguf", options,
                        {.text = spread_text(), .n_ctx = kSequence});
    CHECK(fs::file_size(folder / "fitted.gguf") - fs::file_size(folder / "plain.gguf") <= 64);  // says that it was fitted
    CHECK(GgufFile::open(folder / "fitted.gguf").get_uint(std::string(kCalibratedKey)) > kSequence);
    // Random weights have nothing in common from text to text: what was fitted to is looked at.
    const std::vector<float> original = logits_of(folder / "in.gguf", spread_text());
    CHECK(distance(original, logits_of(folder / "fitted.gguf", spread_text())) <
          0.8 * distance(original, logits_of(folder / "plain.gguf", spread_text())));
  }
}

TEST_CASE("calibrate: types are chosen for a size in every layout") {
  const fs::path folder = folder_of("size");
  TinyModelOptions dense, split, tied;
  dense.n_expert = dense.n_expert_used = 0;
  split.split_experts = true;
  tied.tied_output = true;
  for (const TinyModelOptions& model : {dense, split, tied}) {
    write_tiny_model(folder / "in.gguf", model);
    ConvertOptions options;
    options.n_threads = 2;
    options.target_bpw = 6.5;
    const CalibrationOptions calibration{.text = spread_text(), .n_ctx = kSequence};
    const ConvertPlan plan = plan_quantize_calibrated(folder / "in.gguf", options, calibration);
    CHECK(plan.bits_per_weight <= 6.5);
    CHECK(plan.bits_per_weight > 6.3);
    ConversionSource source = open_gguf(folder / "in.gguf", options);
    const Engine engine = Engine::open(folder / "in.gguf", {.n_threads = 1, .isa = {}, .notice = {}});
    std::vector<Token> ids = some_tokens(4 * kSequence, engine.info().hparams.n_vocab);
    const std::vector<double> sensitivity = measure_sensitivity(source, ids, kSequence, 0, options);
    const std::vector<bool> is_free = free_types(source, options);
    for (size_t i = 0; i < source.jobs.size(); ++i) CHECK((sensitivity[i] > 1e-6) == is_free[i]);
  }
}

namespace {

// Of the free tensors of a tiny model, the first being the embedding, for sequences of 64 tokens.
std::vector<double> sensitivity_of(const fs::path& path, size_t n_sequences, uint64_t ram_bytes, std::string* notices = nullptr) {
  ConvertOptions options;
  options.n_threads = 2;
  if (notices != nullptr) options.notice = [notices](const std::string& line) { *notices += line + "\n"; };
  const ConversionSource source = open_gguf(path, options);
  const std::vector<Token> ids = some_tokens(n_sequences * kSequence, source.hparams.n_vocab);
  const std::vector<double> all = measure_sensitivity(source, ids, kSequence, ram_bytes, options);
  const std::vector<bool> is_free = free_types(source, options);
  std::vector<double> out;
  for (size_t i = 0; i < all.size(); ++i)
    if (is_free[i]) out.push_back(all[i]);
  return out;
}

}  // namespace

TEST_CASE("calibrate: little memory takes several rounds to look at as many tokens") {
  const fs::path path = folder_of("rounds") / "in.gguf";
  write_tiny_model(path, {});
  std::string notices, few_notices;
  const std::vector<double> at_once = sensitivity_of(path, 8, 0, &notices), in_rounds = sensitivity_of(path, 8, 1 << 20, &few_notices);
  CHECK(notices.find("512 tokens of 8 sequences\n") != std::string::npos);
  CHECK(few_notices.find("512 tokens of 8 sequences, in 8 passes over the model") != std::string::npos);
  REQUIRE(at_once.size() == in_rounds.size());
  for (size_t i = 0; i < at_once.size(); ++i) CHECK(in_rounds[i] == doctest::Approx(at_once[i]).epsilon(1e-3));
  // The sequences of a longer text are spread over it, no more of them than needed.
  few_notices.clear();
  sensitivity_of(path, 20, 1 << 20, &few_notices);
  CHECK(few_notices.find("512 tokens of 8 sequences") != std::string::npos);
}

TEST_CASE("calibrate: tensors that are of the coarse type already are not taken for free") {
  const fs::path folder = folder_of("coarse");
  TinyModelOptions wide{.n_embd = 256, .n_ff = 256}, narrow;
  for (auto [model, type] : {std::pair(wide, DType::Q3_K), std::pair(narrow, DType::Q4_0)}) {
    write_tiny_model(folder / "exact.gguf", model);
    model.type = type;
    write_tiny_model(folder / "coarse.gguf", model);
    const std::vector<double> exact = sensitivity_of(folder / "exact.gguf", 2, 0), coarse = sensitivity_of(folder / "coarse.gguf", 2, 0);
    REQUIRE(exact.size() == coarse.size());
    for (size_t i = 0; i < exact.size(); ++i) {
      CAPTURE(i);
      CHECK(coarse[i] > 0.1 * exact[i]);
    }
  }
}

TEST_CASE("calibrate: tensors whose values every coarse type holds count as much as any") {
  const fs::path path = folder_of("grid") / "in.gguf";
  GgufBuilder builder = tiny_model({});
  for (GgufBuilder::Tensor& tensor : builder.tensors)
    if (tensor.name == "blk.0.attn_q.weight") std::fill(tensor.data.begin(), tensor.data.end(), '\0');
  write_bytes(path, builder.build());
  const std::vector<double> sensitivity = sensitivity_of(path, 2, 0);
  CHECK(std::count(sensitivity.begin(), sensitivity.end(), *std::max_element(sensitivity.begin(), sensitivity.end())) == 2);
}

TEST_CASE("calibrate: predictions that are not finite give no sensitivities") {
  const fs::path path = folder_of("overflow") / "in.gguf";
  GgufBuilder builder = tiny_model({});
  for (GgufBuilder::Tensor& tensor : builder.tensors)
    if (tensor.name == "blk.1.ffn_gate_exps.weight" || tensor.name == "blk.1.ffn_up_exps.weight") {
      std::vector<float> values(tensor.data.size() / sizeof(float), 1e30f);
      std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
    }
  write_bytes(path, builder.build());
  check_thrown(thrown_by([&] { sensitivity_of(path, 2, 0); }), ErrorKind::format, "token_embd.weight': what the model predicts");
}

TEST_CASE("calibrate: values too large for a type are refused, an importance matrix too") {
  const fs::path folder = folder_of("too large");
  GgufBuilder builder = tiny_model({});
  for (GgufBuilder::Tensor& tensor : builder.tensors)
    if (tensor.name == "blk.1.attn_q.weight") {
      const float large = 1e5f;
      std::memcpy(tensor.data.data() + 3 * 64 * sizeof large, &large, sizeof large);
    }
  write_bytes(folder / "in.gguf", builder.build());
  ConvertOptions options;
  options.recipe = "Q8_0";
  options.overwrite = true;
  options.tensor_types = {"blk.1.attn_q=F16"};
  const CalibrationOptions calibration{.text = spread_text(), .n_ctx = kSequence, .max_tokens = 4 * kSequence};
  const auto thrown = [&] { return thrown_by([&] { quantize_calibrated(folder / "in.gguf", folder / "out.gguf", options, calibration); }); };
  check_thrown(thrown(), ErrorKind::format, "blk.1.attn_q.weight', row 3: a value is too large for F16");
  options.tensor_types = {};
  options.imatrix = "i.gguf";
  check_thrown(thrown(), ErrorKind::usage, "i.gguf; give one of the two");
}

TEST_CASE("calibrate: a limit on memory makes it smaller, too small a one is refused") {
  const fs::path folder = folder_of("ram");
  TinyModelOptions model;
  model.n_embd = 256;
  model.n_ff = 1024;
  write_tiny_model(folder / "in.gguf", model);
  ConvertOptions options;
  options.overwrite = true;
  const ConversionSource source = open_gguf(folder / "in.gguf", options);
  const CalibrationSizes all = plan_calibration(source, 64, 100000, 0);
  CHECK(all.moment_cols == 4096);
  CHECK(all.chunk_tokens == 4096);
  const uint64_t most = calibration_bytes(source, {16 * 64, 4096, 4096});
  uint64_t before = UINT64_MAX;
  for (const uint64_t ram : {most + (64 << 20), most, most - (32 << 20), most - (120 << 20)}) {
    const CalibrationSizes sizes = plan_calibration(source, 64, 100000, ram);
    CHECK(calibration_bytes(source, sizes) <= ram);
    CHECK(calibration_bytes(source, sizes) < before);
    CHECK(sizes.max_tokens >= 16 * 64);
    before = calibration_bytes(source, sizes);
  }
  options.recipe = "Q3_K_S";
  const CalibrationOptions calibration{.text = spread_text(), .n_ctx = 64, .ram_bytes = most - (120 << 20)};
  quantize_calibrated(folder / "in.gguf", folder / "small.gguf", options, calibration);
  CHECK(std::isfinite(logits_of(folder / "small.gguf", spread_text())[0]));
  check_thrown(thrown_by([&] {
    quantize_calibrated(folder / "in.gguf", folder / "small.gguf", options,
                        {.text = spread_text(), .n_ctx = 64, .ram_bytes = 16 << 20});
  }), ErrorKind::memory, "at least");
}

TEST_CASE("calibrate: experts without tokens are reported, and encoded all the same") {
  const fs::path folder = folder_of("unseen");
  TinyModelOptions model;
  model.n_expert = 8;
  write_tiny_model(folder / "in.gguf", model);
  ConvertOptions options;
  options.recipe = "Q8_0";
  options.overwrite = true;
  std::string notices;
  options.notice = [&](const std::string& line) { notices += line + "\n"; };
  quantize_calibrated(folder / "in.gguf", folder / "out.gguf", options,
                      {.text = "the the the the", .n_ctx = 4, .max_tokens = 4});
  CHECK(notices.find("4 tokens") != std::string::npos);
  CHECK(notices.find("saw no token") != std::string::npos);
  CHECK(notices.find("fewer than") != std::string::npos);
  CHECK(std::isfinite(logits_of(folder / "out.gguf", spread_text())[0]));
}

TEST_CASE("calibrate: types without blocks leave nothing to fit") {
  const fs::path folder = folder_of("floats");
  write_tiny_model(folder / "in.gguf", {});
  ConvertOptions options;
  options.recipe = "F16";
  options.overwrite = true;
  CHECK_THROWS_WITH_AS(quantize_calibrated(folder / "in.gguf", folder / "out.gguf", options,
                                           {.text = spread_text()}),
                       doctest::Contains("nothing to fit"), Error);
}
