// verify and compare: damage named by tensor and block, checksums, errors from the source.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

constexpr int kUsage = 2, kIo = 3, kFormat = 4;
const std::string kExact = DUET_TEST_DIR "/demo-f32.gguf", kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";
const std::string kFolder = DUET_SOURCE_DIR "/models/demo", kSample = DUET_SOURCE_DIR "/tests/golden/data/sample.txt";

std::string output(const std::vector<std::string>& arguments) {
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.out;
}

Json document(const std::vector<std::string>& arguments) { return duet::parse_json(output(arguments), "stdout"); }

// A copy of the model with 2 bytes of a tensor replaced.
void write_damaged(const std::filesystem::path& path, const std::string& tensor, uint64_t at, uint16_t value) {
  std::string bytes = duet::read_file(kModel, 1 << 28);
  const duet::GgufFile file = duet::GgufFile::parse(std::as_bytes(std::span(bytes)), "m");
  const auto offset = static_cast<size_t>(reinterpret_cast<const char*>(file.find_tensor(tensor)->data.data()) - bytes.data()) + at;
  std::memcpy(bytes.data() + offset, &value, 2);
  write_text(path, bytes);
}

}  // namespace

TEST_CASE("verify: a sound file, its checksum, and its source") {
  const std::string text = output({"verify", kModel, "--source", kFolder, "--sha256"});
  CHECK(text.find("all finite") != text.npos);
  CHECK(text.find("merged experts") != text.npos);
  CHECK(text.find("largest relative error is 0.0") != text.npos);
  const Json json = document({"verify", kModel, "--source", kExact, "--sha256", "--json"});
  CHECK(json["ok"] == true);
  CHECK(json["problems"].empty());
  CHECK(json["blocks"].get<uint64_t>() > 10000);
  CHECK(json["largest_error"]["relative"].get<double>() < 0.1);
  const std::string sum = json["parts"][0]["sha256"].get<std::string>();
  CHECK(sum.size() == 64);
  CHECK(text.find(sum) != text.npos);
  const TempFolder folder;
  const std::string small = (folder / "abc").string();
  write_tiny_model(small, {});
  const ProcessResult tool = run_process({"sha256sum", small});
  if (tool.exit_code == 0) CHECK(output({"verify", small, "--sha256"}).find(tool.out.substr(0, 64)) != std::string::npos);
}

TEST_CASE("verify: a bad scale is named by tensor and block") {
  const TempFolder folder;
  const std::string path = (folder / "bad.gguf").string();
  const duet::GgufFile file = duet::GgufFile::open(kModel);
  const duet::TensorView& tensor = *file.find_tensor("blk.2.ffn_up_exps.weight");
  REQUIRE(std::string(tensor.format->name) == "Q4_K");
  write_damaged(path, tensor.name, 7 * 144, 0x7c00);
  const auto wanted = "tensor 'blk.2.ffn_up_exps.weight': block 7 (row " + std::to_string(7 * 256 / tensor.cols()) + ")";
  CHECK(refusal(run_duet({"verify", path}), kFormat, wanted) == "");
  const ProcessResult json = run_duet({"verify", path, "--json"});
  CHECK(json.exit_code == kFormat);
  const Json report = duet::parse_json(json.out, "stdout");
  CHECK(report["ok"] == false);
  REQUIRE(report["problems"].size() == 1);
  CHECK(report["problems"][0].get<std::string>().find("1 of ") != std::string::npos);
}

TEST_CASE("verify: weights of another model are noticed, truncated and missing files refused") {
  const TempFolder folder;
  const std::string path = (folder / "other.gguf").string();
  write_damaged(path, "blk.1.attn_v.weight", 0, 0x4400);  // a scale of 4
  CHECK(refusal(run_duet({"verify", path, "--source", kExact}), kFormat, "blk.1.attn_v.weight' does not hold") == "");
  const std::string bytes = duet::read_file(kModel, 1 << 28);
  write_text(path, bytes.substr(0, bytes.size() / 2));
  CHECK(refusal(run_duet({"verify", path}), kFormat, "other.gguf") == "");
  CHECK(refusal(run_duet({"verify", "nowhere.gguf"}), kIo, "nowhere.gguf") == "");
  CHECK(refusal(run_duet({"verify", kFolder}), kIo, "duet convert") == "");
  CHECK(refusal(run_duet({"verify", kModel, "--source", "nowhere"}), kIo, "nowhere") == "");
  CHECK(refusal(run_duet({"verify"}), kUsage, "FILE") == "");
}

TEST_CASE("compare: nothing from itself, whatever the layout; types, sizes and errors else") {
  const Json own = document({"compare", kFolder, kExact, "--json"});
  for (const Json& t : own["tensors"]) CHECK_MESSAGE(t["rmse"] == 0.0, t["name"]);
  CHECK(own["only_first"].empty());
  CHECK(own["only_second"].empty());
  const Json other = document({"compare", kExact, kModel, "--json", "-f", kSample, "-c", "128", "--chunks", "2"});
  CHECK(other["bytes"][0].get<uint64_t>() > 4 * other["bytes"][1].get<uint64_t>());
  CHECK(other["divergence"]["tokens"] == 126);
  CHECK(other["divergence"]["kld"]["mean"].get<double>() > 1e-4);
  bool seen = false;
  for (const Json& t : other["tensors"]) {
    if (t["name"] != "blk.0.ffn_gate_exps.weight") continue;
    seen = true;
    CHECK(t["types"] == Json({"F32", "Q4_K"}));
    CHECK(t["relative"].get<double>() > 0.03);
    CHECK(t["relative"].get<double>() < 0.12);
    CHECK(t["max_error"].get<double>() >= t["rmse"].get<double>());
  }
  CHECK(seen);
  const std::string text = output({"compare", kExact, kModel});
  CHECK(text.find("blk.5.ffn_down_exps.weight") != text.npos);
  CHECK(text.find("relative") != text.npos);
}

TEST_CASE("compare: the old expert layout equals the merged one, other shapes are refused") {
  const TempFolder folder;
  const std::string merged = (folder / "merged.gguf").string(), split = (folder / "split.gguf").string(), wide = (folder / "wide.gguf").string();
  write_tiny_model(merged, {});
  write_tiny_model(split, {.split_experts = true});
  write_tiny_model(wide, {.n_ff = 128});
  const Json same = document({"compare", merged, split, "--json"});
  CHECK(same["only_first"].empty());
  for (const Json& t : same["tensors"]) CHECK_MESSAGE(t["rmse"] == 0.0, t["name"]);
  CHECK(refusal(run_duet({"compare", merged, wide}), kFormat, "another shape") == "");
  CHECK(refusal(run_duet({"compare", merged, "nowhere"}), kIo, "nowhere") == "");
}

TEST_CASE("compare: a text needs two files, and its options need a text") {
  CHECK(refusal(run_duet({"compare", kFolder, kExact, "-f", kSample}), kUsage, "is a folder") == "");
  CHECK(refusal(run_duet({"compare", kExact, kModel, "-c", "128"}), kUsage, "--ctx belongs to --file") == "");
  CHECK(refusal(run_duet({"compare", kExact, kModel, "--chunks", "1"}), kUsage, "--chunks belongs to --file") == "");
  CHECK(run_duet({"compare", kFolder, kExact}, {.environment = {{"DUET_FILE", kSample}, {"DUET_CTX", "128"}}}).exit_code == 0);
}

TEST_CASE("inspect and compare: a line is as long as its tensor's name") {
  const TempFolder folder;
  const std::string file = (folder / "long.gguf").string(), name(600, 'n');
  GgufBuilder builder = tiny_model({});
  builder.tensors.push_back({name, {32}, 0, std::string(128, '\0')});
  write_bytes(file, builder.build());
  CHECK(output({"inspect", file, "--tensors"}).find(name + " F32           128 B  32\n") != std::string::npos);
  const std::string text = output({"compare", file, file});
  CHECK(text.find(name + " F32 ") != std::string::npos);
  CHECK(text.find(" 0.000000\n", text.find(name)) != std::string::npos);
}
