// repack, merge and --split-max-size: bits stay, layouts and files change.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <map>

#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "tests/support/process.h"
#include "tests/support/random_model.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::GgufFile;

namespace {

constexpr int kUsage = 2, kIo = 3, kFormat = 4, kUnsupported = 6;

std::string output(const std::vector<std::string>& arguments) {
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.out;
}

std::string part(size_t index, size_t n) {
  char name[64];
  std::snprintf(name, sizeof name, "cut-%05zu-of-%05zu.gguf", index, n);
  return name;
}

// Tensors of both files have the same names, types, shapes and bytes.
void check_same(const GgufFile& a, const GgufFile& b) {
  REQUIRE(a.tensors().size() == b.tensors().size());
  for (const duet::TensorView& x : a.tensors()) {
    CAPTURE(x.name);
    const duet::TensorView* y = b.find_tensor(x.name);
    REQUIRE(y != nullptr);
    CHECK(x.format == y->format);
    CHECK(x.shape == y->shape);
    CHECK(std::equal(x.data.begin(), x.data.end(), y->data.begin(), y->data.end()));
  }
}

void check_same_keys(const GgufFile& a, const GgufFile& b) {
  for (const duet::GgufKeyValue& kv : a.metadata()) {
    CAPTURE(kv.key);
    const duet::GgufValue* other = b.find(kv.key);
    REQUIRE(other != nullptr);
    CHECK(other->type == kv.value.type);
    CHECK(other->data == kv.value.data);
  }
}

}  // namespace

TEST_CASE("repack: experts of their own become merged ones, bit for bit, and the answers stay") {
  const TempFolder folder;
  const std::string split = (folder / "split.gguf").string(), merged = (folder / "merged.gguf").string(), out = (folder / "out.gguf").string();
  TinyModelOptions options{.n_embd = 256, .n_ff = 256, .type = duet::DType::Q4_K};
  write_tiny_model(merged, options);
  options.split_experts = true;
  write_tiny_model(split, options);
  CHECK(output({"repack", split, out}).empty());
  check_same(GgufFile::open(merged), GgufFile::open(out));
  check_same_keys(GgufFile::open(split), GgufFile::open(out));
  CHECK(output({"run", split, "-p", "the", "-n", "8", "--temp", "0"}) == output({"run", out, "-p", "the", "-n", "8", "--temp", "0"}));
  CHECK(refusal(run_duet({"repack", split, out}), kIo, "--force") == "");
  CHECK(output({"repack", merged, out, "--force"}).empty());
  check_same(GgufFile::open(merged), GgufFile::open(out));
}

TEST_CASE("repack: experts of different types cannot share a tensor") {
  const TempFolder folder;
  const RandomModel model{.hparams = small_mixtral_hparams(1, 512), .split_experts = true, .type = [](const std::string& name) {
                            return name == "blk.0.ffn_up.3.weight" ? duet::DType::Q6_K : duet::DType::Q4_K;
                          }};
  const std::string path = write_model(model, "mixed-experts.gguf").string(), out = (folder / "out.gguf").string();
  CHECK(refusal(run_duet({"repack", path, out}), kUnsupported, "blk.0.ffn_up_exps.weight") == "");
  CHECK(!std::filesystem::exists(out));
}

TEST_CASE("split-max-size cuts between tensors, any part opens the whole, merge joins") {
  const TempFolder folder;
  const std::string model = (folder / "model.gguf").string(), out = (folder / "cut.gguf").string(), back = (folder / "back.gguf").string();
  write_tiny_model(model, {.n_embd = 256, .n_ff = 256});
  CHECK(output({"repack", model, out, "--split-max-size", "1M"}).empty());
  CHECK(!std::filesystem::exists(out));
  size_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) n += entry.path().filename().string().starts_with("cut-0");
  REQUIRE(n > 2);
  const std::string name = part(n, n), last = (folder / name).string();
  const GgufFile cut = GgufFile::open(last);
  CHECK(cut.n_parts() == n);
  check_same(GgufFile::open(model), cut);
  CHECK(output({"merge", last, back}).empty());
  check_same(GgufFile::open(model), GgufFile::open(back));
  check_same_keys(GgufFile::open(model), GgufFile::open(back));
  CHECK(GgufFile::open(back).find("split.count") == nullptr);
  CHECK(refusal(run_duet({"repack", model, out, "--split-max-size", "1M"}), kIo, "cut-00001-of") == "");
  std::filesystem::remove(last);
  CHECK(refusal(run_duet({"merge", (folder / part(1, n)).string(), back, "--force"}), kIo, name) == "");
  CHECK(refusal(run_duet({"repack", model, out, "--split-max-size", "large"}), kUsage, "large") == "");
  CHECK(refusal(run_duet({"merge", "nowhere.gguf", back}), kIo, "nowhere.gguf") == "");
  write_text(out, "junk");
  CHECK(refusal(run_duet({"repack", out, back, "--force"}), kFormat, "cut.gguf") == "");
}

TEST_CASE("quantize --force: a run that fails leaves the old set") {
  const TempFolder folder;
  const std::string good = (folder / "good.gguf").string(), bad = (folder / "bad.gguf").string(), cut = (folder / "cut.gguf").string();
  GgufBuilder model = tiny_model({.n_embd = 256, .n_ff = 256});
  write_bytes(good, model.build());
  const auto late = std::ranges::find(model.tensors, "blk.1.ffn_down_exps.weight", &GgufBuilder::Tensor::name);
  REQUIRE(late != model.tensors.end());
  late->data.replace(0, 4, raw(std::numeric_limits<float>::quiet_NaN()));
  write_bytes(bad, model.build());
  const auto set = [&] {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path()))
      if (entry.path().filename().string().starts_with("cut")) files[entry.path().filename().string()] = duet::read_file(entry.path(), 1 << 26);
    return files;
  };
  CHECK(output({"quantize", good, cut, "Q8_0", "--split-max-size", "500K"}).empty());
  const auto old = set();
  REQUIRE(old.size() > 2);
  CHECK(refusal(run_duet({"quantize", bad, cut, "Q8_0", "--split-max-size", "500K", "--force"}), kFormat, "not finite") == "");
  CHECK(set() == old);
}

TEST_CASE("one file is not named as a part of a set") {
  const TempFolder folder;
  const std::string model = (folder / "model.gguf").string(), out = (folder / "o-00001-of-00003.gguf").string();
  write_tiny_model(model, {.n_embd = 256, .n_ff = 256});
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"quantize", model, out, "Q4_0"}, {"repack", model, out}, {"merge", model, out}, {"make-synthetic", "tiny", "-o", out}, {"imatrix", model, "-f", DUET_SOURCE_DIR "/README.md", "-o", out}})
    CHECK(refusal(run_duet(arguments), kUsage, "named part 1 of 3 of a set") == "");
  CHECK(!std::filesystem::exists(out));
}

TEST_CASE("quantize and convert write parts too") {
  const TempFolder folder;
  const std::string whole = (folder / "whole.gguf").string(), cut = (folder / "cut.gguf").string();
  const std::string source = DUET_SOURCE_DIR "/models/demo";
  CHECK(output({"convert", source, "-q", "Q8_0", "-o", whole}).empty());
  CHECK(output({"convert", source, "-q", "Q8_0", "-o", cut, "--split-max-size", "10MB"}).empty());
  CHECK(std::filesystem::exists(folder / "cut-00001-of-00003.gguf"));
  check_same(GgufFile::open(whole), GgufFile::open(folder / "cut-00001-of-00003.gguf"));
}
