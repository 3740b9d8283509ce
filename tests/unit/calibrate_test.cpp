// Calibrated conversion of every layout of a model; what it is to bring is shown in tests/e2e.
#include "calibrate/calibrate.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "runtime/engine.h"
#include "tests/support/logits.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using namespace duet::test;
namespace fs = std::filesystem;

namespace {

const fs::path kFolder = fs::path(DUET_TEST_DIR) / "calibrate_unit";

std::vector<float> logits_of(const fs::path& path) {
  const Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}});
  Session session = engine.new_session({.n_ctx = 96});
  return all_logits(session, some_tokens(96, engine.info().hparams.n_vocab));
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
  return sum;
}

// Text whose ids are spread like those that logits_of() feeds.
std::string spread_text() {
  std::string text;
  for (const Token id : some_tokens(6000, 200)) text += static_cast<char>(33 + id % 90);
  return text;
}

}  // namespace

TEST_CASE("calibrate: dense, per-expert and tied models, wide experts that see few tokens") {
  fs::create_directories(kFolder);
  TinyModelOptions dense, split, tied, many;
  dense.n_expert = dense.n_expert_used = 0;
  split.split_experts = true;
  tied.tied_output = true;
  many.n_expert = 8;
  for (const TinyModelOptions& model : {dense, split, tied, many}) {
    write_tiny_model(kFolder / "in.gguf", model);
    ConvertOptions options;
    options.recipe = "Q4_0";
    options.overwrite = true;
    options.n_threads = 2;
    quantize(kFolder / "in.gguf", kFolder / "plain.gguf", options);
    quantize_calibrated(kFolder / "in.gguf", kFolder / "fitted.gguf", options,
                        {.text = spread_text(), .n_ctx = 64});
    CHECK(fs::file_size(kFolder / "plain.gguf") == fs::file_size(kFolder / "fitted.gguf"));
    const std::vector<float> original = logits_of(kFolder / "in.gguf");
    // Random weights and tokens leave little to make use of: not worse is what counts here.
    CHECK(distance(original, logits_of(kFolder / "fitted.gguf")) <
          1.1 * distance(original, logits_of(kFolder / "plain.gguf")));
  }
}

TEST_CASE("calibrate: experts without tokens are reported, and encoded all the same") {
  fs::create_directories(kFolder);
  TinyModelOptions model;
  model.n_expert = 8;
  write_tiny_model(kFolder / "in.gguf", model);
  ConvertOptions options;
  options.recipe = "Q8_0";
  options.overwrite = true;
  std::string notices;
  options.notice = [&](const std::string& line) { notices += line + "\n"; };
  quantize_calibrated(kFolder / "in.gguf", kFolder / "out.gguf", options,
                      {.text = "the the the the", .n_ctx = 4, .max_tokens = 4});
  CHECK(notices.find("4 tokens") != std::string::npos);
  CHECK(notices.find("saw no token") != std::string::npos);
  CHECK(notices.find("fewer than") != std::string::npos);
  CHECK(std::isfinite(logits_of(kFolder / "out.gguf")[0]));
}

TEST_CASE("calibrate: types without blocks leave nothing to fit") {
  fs::create_directories(kFolder);
  write_tiny_model(kFolder / "in.gguf", {});
  ConvertOptions options;
  options.recipe = "F16";
  options.overwrite = true;
  CHECK_THROWS_WITH_AS(quantize_calibrated(kFolder / "in.gguf", kFolder / "out.gguf", options,
                                           {.text = spread_text()}),
                       doctest::Contains("nothing to fit"), Error);
}
