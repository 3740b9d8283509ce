// perplexity --save-logits and --kld, imatrix and what uses it.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/json.h"
#include "base/mapped_file.h"
#include "formats/imatrix.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

constexpr int kUsage = 2, kIo = 3, kFormat = 4;
const std::string kExact = DUET_TEST_DIR "/demo-f32.gguf", kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";
const std::string kSample = DUET_SOURCE_DIR "/tests/golden/data/sample.txt";

std::string output(const std::vector<std::string>& arguments) {
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.out;
}

Json document(const std::vector<std::string>& arguments) { return duet::parse_json(output(arguments), "stdout"); }

// A reference of the exact model, made once.
std::string reference() {
  static const TempFolder folder;
  const std::string path = (folder / "ref").string();
  if (!std::filesystem::exists(path)) output({"perplexity", kExact, "-f", kSample, "--ctx", "128", "--chunks", "2", "--save-logits", path});
  return path;
}

}  // namespace

TEST_CASE("perplexity --kld: nothing from itself, little from Q4_K_M, in text and JSON") {
  const Json own = document({"perplexity", kExact, "--kld", reference(), "--json"});
  CHECK(own["tokens"] == 126);
  CHECK(own["chunks"] == 2);
  CHECK(own["ctx"] == 128);
  CHECK(std::abs(own["kld"]["mean"].get<double>()) < 1e-6);
  CHECK(own["same_top"]["value"] == 1.0);
  const Json other = document({"perplexity", kModel, "--kld", reference(), "-f", kSample, "--json"});
  CHECK(other["kld"]["mean"].get<double>() > 1e-4);
  CHECK(other["kld"]["mean"].get<double>() < 0.1);
  CHECK(other["kld"]["stderr"].get<double>() > 0);
  CHECK(other["kld"]["median"].get<double>() <= other["kld"]["p99"].get<double>());
  CHECK(other["reference_perplexity"]["value"] == doctest::Approx(own["perplexity"]["value"].get<double>()));
  const std::string text = output({"perplexity", kModel, "--kld", reference()});
  for (const char* words : {"KLD mean", "99.9 %", "same top token", "RMS", "ratio"}) CHECK_MESSAGE(text.find(words) != text.npos, words);
}

TEST_CASE("perplexity --kld refuses what does not belong together") {
  const TempFolder folder;
  const std::string other = (folder / "other.txt").string();
  write_text(other, std::string(20000, 'a'));
  CHECK(refusal(run_duet({"perplexity", kModel, "--kld", reference(), "-f", other}), kUsage, "another text") == "");
  CHECK(refusal(run_duet({"perplexity", kModel}), kUsage, "--file") == "");
  CHECK(refusal(run_duet({"perplexity", kModel, "--kld", reference(), "--chunks", "1"}), kUsage, "--chunks") == "");
  CHECK(refusal(run_duet({"perplexity", kModel, "--kld", reference(), "-c", "512"}), kUsage, "--ctx") == "");
  CHECK(refusal(run_duet({"perplexity", kModel, "-f", kSample, "--force"}), kUsage, "--save-logits") == "");
  CHECK(refusal(run_duet({"perplexity", kModel, "--kld", kModel}), kFormat, "not a reference") == "");
  CHECK(refusal(run_duet({"perplexity", kModel, "--kld", "nowhere.ref"}), kIo, "nowhere.ref") == "");
  const std::string tiny = (folder / "tiny.gguf").string(), cut = (folder / "cut.ref").string();
  write_tiny_model(tiny, {});
  CHECK(refusal(run_duet({"perplexity", tiny, "--kld", reference()}), kFormat, "vocabulary") == "");
  const std::string bytes = duet::read_file(reference(), 1 << 28);
  write_text(cut, bytes.substr(0, bytes.size() - 100));
  CHECK(refusal(run_duet({"perplexity", kModel, "--kld", cut}), kFormat, "cut.ref") == "");
  CHECK(refusal(run_duet({"perplexity", kModel, "-f", kSample, "--save-logits", (folder / "no" / "ref").string()}), kIo, "cannot write") == "");
}

TEST_CASE("imatrix writes what convert and quantize read, resident or streamed") {
  const TempFolder folder;
  const std::string file = (folder / "i.gguf").string(), streamed = (folder / "s.gguf").string();
  const std::string text = output({"imatrix", kModel, "-f", kSample, "-o", file, "-c", "128", "--chunks", "2"});
  CHECK(text.find("2 chunks of 128") != text.npos);
  CHECK(text.find("layer 0:") != text.npos);
  const duet::Imatrix imatrix = duet::read_imatrix(file);
  CHECK(imatrix.n_chunks == 2);
  CHECK(imatrix.chunk_size == 128);
  CHECK(imatrix.datasets == std::vector<std::string>{"sample.txt"});
  CHECK(imatrix.entries.at("blk.0.ffn_gate_exps.weight").counts.size() == 8);
  CHECK(imatrix.entries.at("blk.0.attn_q.weight").counts == std::vector<float>{256});
  CHECK(!imatrix.entries.contains("output.weight"));
  CHECK(refusal(run_duet({"imatrix", kModel, "-f", kSample, "-o", file}), kIo, "--force") == "");

  const Json json = document({"imatrix", kModel, "-f", kSample, "-o", streamed, "-c", "128", "--chunks", "2", "--json", "--ram", "130M"});
  CHECK(json["chunks"] == 2);
  uint64_t n = 0;
  for (const Json& rows : json["expert_rows"][0]) n += rows.get<uint64_t>();
  CHECK(n == 512);
  CHECK(duet::read_file(file, 1 << 26) == duet::read_file(streamed, 1 << 26));

  const std::string out = (folder / "out.gguf").string();
  CHECK(output({"convert", DUET_SOURCE_DIR "/models/demo", "-q", "Q3_K_M", "--imatrix", file, "-o", out}).empty());
  const ProcessResult result = run_duet({"quantize", kExact, out, "Q3_K_M", "--imatrix", file, "--force"});
  CHECK(result.exit_code == 0);
  CHECK(result.err.find("no data for") != result.err.npos);  // token_embd and output
}

TEST_CASE("imatrix: bad input is refused in one line") {
  const TempFolder folder;
  const std::string out = (folder / "out.gguf").string(), file = (folder / "i.dat").string();
  CHECK(refusal(run_duet({"imatrix", kModel, "-f", "-", "-o", out}, {.input = "short"}), kUsage, "512") == "");
  CHECK(refusal(run_duet({"imatrix", "nowhere.gguf", "-f", kSample, "-o", out}), kIo, "nowhere.gguf") == "");
  CHECK(refusal(run_duet({"imatrix", kModel, "-f", "nowhere.txt", "-o", out}), kIo, "nowhere.txt") == "");
  CHECK(refusal(run_duet({"quantize", kExact, out, "Q4_K_M", "--imatrix", "nowhere.dat"}), kIo, "nowhere.dat") == "");
  CHECK(refusal(run_duet({"quantize", kExact, out, "Q4_K_M", "--imatrix", kModel}), kFormat, "not an importance matrix") == "");
  // Before the model is opened.
  CHECK(refusal(run_duet({"imatrix", "nowhere.gguf", "-f", kSample, "-o", (folder / "no" / "i.gguf").string()}), kIo, "cannot write") == "");
  write_text(file, "junk");
  CHECK(refusal(run_duet({"quantize", kExact, out, "Q4_K_M", "--imatrix", file}), kFormat, "i.dat") == "");
  duet::Imatrix other;
  other.entries["blk.0.attn_q.weight"] = {{1, 2, 3}, {1}};
  duet::write_imatrix(file, other);
  CHECK(refusal(run_duet({"quantize", kExact, out, "Q4_K_M", "--imatrix", file}), kFormat, "another model") == "");
  CHECK(!std::filesystem::exists(out));
}
