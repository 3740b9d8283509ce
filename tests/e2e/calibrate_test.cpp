// convert and quantize with --calibrate, and types by tensor.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <span>

#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "tests/support/npy.h"
#include "tests/support/process.h"

using namespace duet::test;

namespace {

const std::string kFolder = DUET_TEST_DIR "/calibrate/";
const std::string kDemo = DUET_SOURCE_DIR "/models/demo";
const std::string kF32 = DUET_TEST_DIR "/demo-f32.gguf";

void duet_ok(const std::vector<std::string>& arguments) {
  std::filesystem::create_directories(kFolder);
  const ProcessResult result = run_duet(arguments, {.timeout_s = 600});
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
}

std::string text_file(const std::string& name, size_t begin, size_t end) {
  std::filesystem::create_directories(kFolder);
  const std::string text =
      duet::read_file(DUET_SOURCE_DIR "/tests/golden/data/sample.txt", 1 << 20);
  REQUIRE(text.size() > begin);
  std::ofstream(kFolder + name) << text.substr(begin, end - begin);
  return kFolder + name;
}

NpyArray logits(const std::string& model, const std::string& text) {
  duet_ok({"logits", model, "--file", text, "-o", kFolder + "logits.npy"});
  return read_npy(kFolder + "logits.npy");
}

double log_sum(std::span<const float> row) {
  const double max = double{*std::max_element(row.begin(), row.end())};
  double sum = 0;
  for (const float v : row) sum += std::exp(double{v} - max);
  return max + std::log(sum);
}

// Mean Kullback-Leibler divergence of b from a.
double divergence(const NpyArray& a, const NpyArray& b) {
  REQUIRE(a.shape == b.shape);
  double sum = 0;
  for (size_t t = 0; t < a.shape[0]; ++t) {
    const double za = log_sum(a[t]), zb = log_sum(b[t]);
    for (size_t i = 0; i < a.shape[1]; ++i) {
      const double log_p = double{a[t][i]} - za;
      sum += std::exp(log_p) * (log_p - (double{b[t][i]} - zb));
    }
  }
  return sum / static_cast<double>(a.shape[0]);
}

// A copy of fitted.gguf with some bytes changed.
void damage(const std::string& name, const std::function<void(std::string&, const duet::GgufFile&)>& change) {
  std::string bytes = duet::read_file(kFolder + "fitted.gguf", 1 << 28);
  change(bytes, duet::GgufFile::parse(std::as_bytes(std::span(bytes)), "fitted"));
  std::ofstream(kFolder + name, std::ios::binary) << bytes;
}

duet::Json plan_of(const std::vector<std::string>& options) {
  std::vector<std::string> arguments = {"convert", kDemo, "-q", "Q3_K_M", "--dry-run", "--json"};
  arguments.insert(arguments.end(), options.begin(), options.end());
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return duet::parse_json(result.out, "stdout");
}

std::string type_of(const duet::Json& plan, const std::string& name) {
  for (const duet::Json& tensor : plan["tensors"])
    if (tensor["name"] == name) return tensor["type"].get<std::string>();
  return "";
}

}  // namespace

TEST_CASE("calibrate: a file of the same types, nearer to the original than a plain one") {
  const std::string train = text_file("train.txt", 0, 14000),
                    test = text_file("test.txt", 14000, 20000);
  duet_ok({"convert", kDemo, "-q", "Q3_K_S", "-o", kFolder + "plain.gguf", "--force"});
  duet_ok({"convert", kDemo, "-q", "Q3_K_S", "--calibrate", train, "-o", kFolder + "fitted.gguf",
           "--force"});
  CHECK(std::filesystem::file_size(kFolder + "fitted.gguf") - std::filesystem::file_size(kFolder + "plain.gguf") <= 64);
  const NpyArray original = logits(kF32, test);
  const double plain = divergence(original, logits(kFolder + "plain.gguf", test));
  const double fitted = divergence(original, logits(kFolder + "fitted.gguf", test));
  CAPTURE(plain);
  CAPTURE(fitted);
  CHECK(fitted < 0.75 * plain);
  CHECK(!std::filesystem::exists(kFolder + "fitted.gguf.vocabulary.part"));
  const ProcessResult planned = run_duet({"convert", kDemo, "-q", "Q3_K_S", "--calibrate", train, "--dry-run", "--json"});
  CHECK(duet::parse_json(planned.out, "stdout")["file_bytes"] == std::filesystem::file_size(kFolder + "fitted.gguf"));
  duet_ok({"verify", kFolder + "fitted.gguf", "--source", kDemo});
  // Where it says nothing of a text, weights are as near as their types allow.
  damage("silent.gguf", [](std::string& bytes, const duet::GgufFile&) {
    const size_t at = bytes.find("quantize.calibration.tokens_count");
    REQUIRE(at != std::string::npos);
    bytes[at] = 'Q';
  });
  CHECK(refusal(run_duet({"verify", kFolder + "silent.gguf", "--source", kDemo}), 4, "blk.0.attn_k.weight' does not hold") == "");
  // Another tensor, rows in another order.
  const auto bytes_of = [](std::string& bytes, const duet::GgufFile& file, const char* name) {
    const std::span<const std::byte> data = file.find_tensor(name)->data;
    return std::span(bytes).subspan(static_cast<size_t>(reinterpret_cast<const char*>(data.data()) - bytes.data()), data.size());
  };
  damage("swapped.gguf", [&](std::string& bytes, const duet::GgufFile& file) {
    const auto a = bytes_of(bytes, file, "blk.2.attn_k.weight"), b = bytes_of(bytes, file, "blk.3.attn_k.weight");
    REQUIRE(a.size() == b.size());
    std::swap_ranges(a.begin(), a.end(), b.begin());
  });
  CHECK(refusal(run_duet({"verify", kFolder + "swapped.gguf", "--source", kDemo}), 4, "blk.2.attn_k.weight' does not hold") == "");
  damage("rows.gguf", [&](std::string& bytes, const duet::GgufFile& file) {
    const auto rows = bytes_of(bytes, file, "blk.1.ffn_gate_exps.weight");
    const size_t row = rows.size() / file.find_tensor("blk.1.ffn_gate_exps.weight")->rows();
    std::rotate(rows.begin(), rows.begin() + static_cast<ptrdiff_t>(row), rows.end());
  });
  CHECK(refusal(run_duet({"verify", kFolder + "rows.gguf", "--source", kDemo}), 4, "of a calibrated file allows") == "");
}

TEST_CASE("calibrate: the same bytes from a folder, from GGUF, and with any number of threads") {
  const std::string train = text_file("short.txt", 0, 4000);
  const std::vector<std::string> common = {"--calibrate", train, "--calibrate-tokens", "512",
                                           "--force"};
  const auto with = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), common.begin(), common.end());
    duet_ok(arguments);
  };
  with({"convert", kDemo, "-q", "Q4_0", "-o", kFolder + "a.gguf", "-t", "1"});
  with({"convert", kDemo, "-q", "Q4_0", "-o", kFolder + "b.gguf", "-t", "3"});
  with({"quantize", DUET_TEST_DIR "/demo-bf16.gguf", kFolder + "c.gguf", "Q4_0"});
  with({"quantize", kF32, kFolder + "d.gguf", "Q4_0"});
  const std::string a = duet::read_file(kFolder + "a.gguf", 1 << 28);
  CHECK(a == duet::read_file(kFolder + "b.gguf", 1 << 28));
  CHECK(duet::read_file(kFolder + "c.gguf", 1 << 28) ==
        duet::read_file(kFolder + "d.gguf", 1 << 28));
}

TEST_CASE("calibrate: too short a text and a missing one are refused") {
  std::filesystem::create_directories(kFolder);
  std::ofstream(kFolder + "few.txt") << "Not many words.";
  CHECK(refusal(run_duet({"convert", kDemo, "--calibrate", kFolder + "few.txt", "-o",
                          kFolder + "x.gguf"}),
                2, "longer text") == "");
  CHECK(refusal(run_duet({"convert", kDemo, "--calibrate", kFolder + "none.txt", "-o",
                          kFolder + "x.gguf"}),
                3, "none.txt") == "");
  // A dry run needs no text for these types, but finds that there is none.
  CHECK(refusal(run_duet({"convert", kDemo, "--dry-run", "--calibrate", kFolder + "none.txt"}), 3, "none.txt") == "");
  CHECK(run_duet({"convert", kDemo, "--dry-run", "--calibrate", kFolder + "few.txt"}).exit_code == 0);
  const std::string text = text_file("short.txt", 0, 4000);
  CHECK(refusal(run_duet(
                    {"convert", kDemo, "-q", "F16", "--calibrate", text, "-o", kFolder + "x.gguf"}),
                2, "nothing to fit") == "");
  CHECK(!std::filesystem::exists(kFolder + "x.gguf"));
}

TEST_CASE("calibrate: measures inputs itself, so an importance matrix does not go with it") {
  const std::string text = text_file("matrix.txt", 0, 4000);
  const auto convert = [](std::vector<std::string> arguments, const Environment& settings) {
    arguments.insert(arguments.begin(), {"convert", kDemo, "--dry-run"});
    return run_duet(arguments, {.environment = settings});
  };
  CHECK(refusal(convert({"--imatrix", "x.gguf", "--calibrate", text}, {}), 2, "excludes") == "");
  // A setting that does not go with a flag is ignored.
  CHECK(convert({"--calibrate", text}, {{"DUET_IMATRIX", "nowhere.gguf"}}).exit_code == 0);
  CHECK(refusal(convert({"--imatrix", "nowhere.gguf"}, {{"DUET_CALIBRATE", "nowhere.txt"}}), 3, "nowhere.gguf") == "");
}

TEST_CASE("convert: types by tensor") {
  const duet::Json plan =
      plan_of({"--token-embedding-type", "q8_0", "--output-tensor-type", "F16", "--tensor",
               "blk\\.[01]\\.ffn_down=Q5_K", "--tensor", "ffn_=Q2_K"});
  CHECK(type_of(plan, "token_embd.weight") == "Q8_0");
  CHECK(type_of(plan, "output.weight") == "F16");
  CHECK(type_of(plan, "blk.1.ffn_down_exps.weight") == "Q5_K");
  CHECK(type_of(plan, "blk.2.ffn_down_exps.weight") == "Q2_K");
  CHECK(type_of(plan, "blk.0.ffn_gate_inp.weight") == "F32");
  CHECK(type_of(plan, "blk.0.ffn_norm.weight") == "F32");
  CHECK(type_of(plan, "blk.0.attn_q.weight") == "Q3_K");
  const auto refused = [](const std::string& rule, const std::string& words) {
    return refusal(run_duet({"convert", kDemo, "--dry-run", "--tensor", rule}), 2, words);
  };
  CHECK(refused("ffn_down", "REGEX=TYPE") == "");
  CHECK(refused("ffn_down=Q9_K", "Q9_K") == "");
  CHECK(refused("ffn_dwon=Q4_K", "fits no tensor") == "");
  CHECK(refused("(=Q4_K", "regular expression") == "");
}

// ---- files of a given size
// -----------------------------------------------------------------------------------

TEST_CASE("target: the file has the size that was asked for") {
  std::filesystem::create_directories(kFolder);
  const auto check_size = [](std::vector<std::string> arguments, const std::string& path, double size) {
    arguments.push_back("--force");
    duet_ok(arguments);
    const auto got = static_cast<double>(std::filesystem::file_size(path));
    CHECK(got <= size);
    CHECK(got > 0.995 * size);
  };
  const std::string a = kFolder + "size.gguf", b = kFolder + "size-q.gguf";
  check_size({"convert", kDemo, "--target-size", "11060160", "-o", a}, a, 11060160);  // that of Q3_K_M
  check_size({"quantize", kF32, b, "--target-size", "10.5MiB"}, b, 10.5 * 1024 * 1024);
}

TEST_CASE("target: the plan is that of the file, the same for any number of threads, and says what was chosen") {
  const std::string train = text_file("target.txt", 0, 3000);
  const auto plan = [&](const std::string& threads) {
    const ProcessResult result = run_duet({"convert", kDemo, "--target-bpw", "4", "--calibrate", train, "--calibrate-tokens", "512", "--dry-run",
                                           "--json", "-t", threads}, {.timeout_s = 600});
    CAPTURE(result.err);
    REQUIRE(result.exit_code == 0);
    CHECK(result.err.find("ffn_down_exps.weight: ") != std::string::npos);
    CHECK(result.err.find("chosen types make a file of") != std::string::npos);
    return duet::parse_json(result.out, "stdout");
  };
  const duet::Json one = plan("1");
  CHECK(one["bits_per_weight"].get<double>() <= 4);
  CHECK(one["bits_per_weight"].get<double>() > 3.98);
  CHECK(one == plan("3"));
  duet_ok({"convert", kDemo, "--target-bpw", "4", "--calibrate", train, "--calibrate-tokens", "512", "-o", kFolder + "bpw.gguf", "--force"});
  const ProcessResult inspected = run_duet({"inspect", kFolder + "bpw.gguf", "--tensors", "--json"});
  CAPTURE(inspected.err);
  REQUIRE(inspected.exit_code == 0);
  const duet::Json file = duet::parse_json(inspected.out, "stdout");
  for (const duet::Json& tensor : file["tensors"]) CHECK(tensor["type"] == type_of(one, tensor["name"]));
}

TEST_CASE("target: what does not go together is refused") {
  const auto refused = [](std::vector<std::string> arguments, const std::string& words) {
    return refusal(run_duet(std::move(arguments)), 2, words);
  };
  CHECK(refused({"convert", kDemo, "--dry-run", "--target-bpw", "4", "-q", "Q4_K_M"}, "--type") == "");
  CHECK(refused({"convert", kDemo, "--dry-run", "--target-bpw", "4", "--target-size", "10M"}, "--target") == "");
  CHECK(refused({"convert", kDemo, "--dry-run", "--target-size", "1M"}, "smallest is") == "");
  CHECK(refused({"convert", kDemo, "--dry-run", "--target-bpw", "4", "--split-max-size", "5M"}, "--split-max-size") == "");
  CHECK(refused({"quantize", kF32, kFolder + "x.gguf"}, "no type given") == "");
}
