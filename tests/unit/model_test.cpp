#include "runtime/model.h"

#include <doctest/doctest.h>

#include "base/error.h"
#include "runtime/engine.h"
#include "tests/support/errors.h"
#include "tests/support/random_model.h"
#include "tests/support/tiny_model.h"

using namespace duet;
using test::RandomModel;
using test::tiny_hparams;

namespace {

Model bind_file(const RandomModel& model, const std::string& name) {
  const GgufFile file = GgufFile::open(test::write_model(model, name));
  return Model::bind(file, read_hparams(file, [](const std::string&) {}));
}

// The error of binding such a file: one line that says all of `parts`.
void check_error(const RandomModel& model, const std::string& name, ErrorKind kind, const std::vector<std::string>& parts) {
  try {
    bind_file(model, name);
    FAIL("no error");
  } catch (const Error& e) {
    const std::string text = e.what();
    CAPTURE(text);
    CHECK(e.kind() == kind);
    CHECK(text.find('\n') == text.npos);
    for (const std::string& part : parts) CHECK_MESSAGE(text.find(part) != text.npos, "missing: ", part);
  }
}

}  // namespace

TEST_CASE("model: merged and per-expert layouts bind to the same fields in place") {
  const Model merged = bind_file({.hparams = tiny_hparams()}, "model-merged.gguf");
  const Model split = bind_file({.hparams = tiny_hparams(), .split_experts = true}, "model-split.gguf");
  CHECK(merged.layout() == "merged experts");
  CHECK(split.layout() == "per-expert");
  CHECK(merged.n_params() == split.n_params());
  REQUIRE(merged.layers().size() == 2);
  for (size_t e = 0; e < 4; ++e) {
    const Weight& a = merged.layers()[1].experts[e].down;
    const Weight& b = split.layers()[1].experts[e].down;
    REQUIRE((a.rows == 64 && a.cols == 96 && b.rows == 64 && b.cols == 96));
    CHECK(std::equal(a.data, a.data + a.rows * a.row_bytes, b.data));
  }
}

TEST_CASE("model: types lists experts first, by size") {
  const auto type = [](const std::string& name) {
    return name.find("_exps") != name.npos ? DType::Q8_0 : name == "output.weight" ? DType::F16 : DType::BF16;
  };
  const Model model = bind_file({.hparams = tiny_hparams(), .type = type}, "model-types.gguf");
  CHECK(model.types() == "Q8_0 (experts), BF16, F16, F32");
}

TEST_CASE("model: tied output uses the embedding") {
  HParams h = tiny_hparams();
  h.tied_output = true;
  const Model model = bind_file({.hparams = h}, "model-tied.gguf");
  CHECK(model.output().data == model.token_embd().data);
}

TEST_CASE("model: a missing tensor is named") {
  check_error({.hparams = tiny_hparams(), .omit = {"blk.1.attn_k.weight"}}, "model-missing.gguf", ErrorKind::format,
              {"model-missing.gguf", "'blk.1.attn_k.weight' is missing"});
}

TEST_CASE("model: a vocabulary without tensors says so") {
  check_error({.hparams = tiny_hparams(), .keep_tensors = false}, "model-vocab.gguf", ErrorKind::format, {"no tensors, only a vocabulary"});
}

TEST_CASE("model: a missing expert of either layout is named") {
  check_error({.hparams = tiny_hparams(), .omit = {"blk.0.ffn_up_exps.weight"}}, "model-missing-exps.gguf",
              ErrorKind::format, {"'blk.0.ffn_up_exps.weight' is missing"});
  check_error({.hparams = tiny_hparams(), .split_experts = true, .omit = {"blk.0.ffn_up.3.weight"}},
              "model-missing-expert.gguf", ErrorKind::format, {"'blk.0.ffn_up.3.weight' is missing"});
}

TEST_CASE("model: a wrong shape is reported with both shapes") {
  const auto damage = [](const std::string& name, std::vector<uint64_t>& shape, DType&) {
    if (name == "blk.0.attn_q.weight") shape = {32, 64};
  };
  check_error({.hparams = tiny_hparams(), .damage = damage}, "model-shape.gguf", ErrorKind::format,
              {"'blk.0.attn_q.weight'", "[32, 64]", "expected [64, 64]"});
}

TEST_CASE("model: experts that are too few for the metadata are a wrong shape") {
  const auto damage = [](const std::string& name, std::vector<uint64_t>& shape, DType&) {
    if (name == "blk.1.ffn_down_exps.weight") shape[0] = 3;
  };
  check_error({.hparams = tiny_hparams(), .damage = damage}, "model-experts.gguf", ErrorKind::format,
              {"'blk.1.ffn_down_exps.weight'", "[3, 64, 96]", "expected [4, 64, 96]"});
}

TEST_CASE("model: a quantized norm is a wrong type") {
  const auto damage = [](const std::string& name, std::vector<uint64_t>&, DType& type) {
    if (name == "blk.1.ffn_norm.weight") type = DType::Q8_0;
  };
  check_error({.hparams = tiny_hparams(), .damage = damage}, "model-dtype.gguf", ErrorKind::format,
              {"'blk.1.ffn_norm.weight' is Q8_0", "expected F32, F16 or BF16"});
}

TEST_CASE("model: a tensor without a place is refused, not ignored") {
  check_error({.hparams = tiny_hparams(), .extra = {{"blk.0.attn_q_norm.weight", {16}}}}, "model-extra.gguf",
              ErrorKind::unsupported, {"'blk.0.attn_q_norm.weight'", "not supported"});
}

TEST_CASE("model: a file without tokenizer opens; the tokenizer is an error when asked for") {
  const Engine engine = Engine::open(test::write_model({.hparams = tiny_hparams()}, "model-ids.gguf"), {});
  CHECK(engine.info().layout == "merged experts");
  CHECK(engine.info().n_threads >= 1);
  try {
    engine.tokenizer();
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::format);
  }
}

TEST_CASE("model: tokens without a row are refused, rows without a token are not") {
  const auto open = [](uint32_t n_rows, uint32_t n_tokens) {
    const test::TempFolder folder;
    test::write_bytes(folder / "model.gguf", test::tiny_model({.n_vocab = n_tokens, .n_rows = n_rows}).build());
    return Engine::open(folder / "model.gguf", {.n_threads = 1, .isa = {}, .notice = {}}).tokenizer().n_vocab();
  };
  const test::Thrown refused = test::thrown_by([&] { open(400, 401); });
  CHECK(refused.message.find("has 401 tokens, token_embd.weight only 400 rows") != std::string::npos);
  CHECK(open(400, 400) == 400);
  CHECK(open(401, 400) == 400);
}
