// The commands beside run: what they print, as text and as JSON.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "base/json.h"
#include "base/mapped_file.h"
#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
using duet::Json;

namespace {

const std::string kModel = DUET_TEST_DIR "/demo-q4_k_m.gguf";
const std::string kSample = DUET_SOURCE_DIR "/tests/golden/data/sample.txt";

std::string output(const std::vector<std::string>& arguments, const ProcessOptions& options = {}) {
  const ProcessResult result = run_duet(arguments, options);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.out;
}

Json document(const std::vector<std::string>& arguments, const ProcessOptions& options = {}) {
  const std::string text = output(arguments, options);
  REQUIRE(std::count(text.begin(), text.end(), '\n') == 1);
  return duet::parse_json(text, "stdout");
}

struct Npy {
  size_t rows = 0, cols = 0;
  std::vector<float> values;
};

Npy read_npy(const std::filesystem::path& path) {
  const std::string bytes = duet::read_file(path, 1 << 28);
  REQUIRE(bytes.substr(0, 8) == std::string("\x93NUMPY\x01\x00", 8));
  const size_t n_header =
      static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
  const std::string header = bytes.substr(10, n_header);
  CHECK((10 + n_header) % 64 == 0);
  CHECK(header.back() == '\n');
  Npy npy;
  REQUIRE(std::sscanf(header.c_str(),
                      "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }", &npy.rows,
                      &npy.cols) == 2);
  npy.values.resize((bytes.size() - 10 - n_header) / sizeof(float));
  std::memcpy(npy.values.data(), bytes.data() + 10 + n_header, npy.values.size() * sizeof(float));
  REQUIRE(npy.values.size() == npy.rows * npy.cols);
  return npy;
}

}  // namespace

TEST_CASE("duet alone lists its verbs and two examples, and exits 2") {
  const ProcessResult result = run_duet({});
  CHECK(result.exit_code == 2);
  CHECK(result.out.empty());
  for (const char* verb :
       {"convert", "quantize", "run", "inspect", "plan", "doctor", "tokenize", "detokenize", "template",
        "logits", "perplexity", "make-synthetic", "duet run ", "duet convert "})
    CHECK_MESSAGE(result.err.find(verb) != std::string::npos, verb);
}

TEST_CASE("--help and --version print to stdout and exit 0") {
  CHECK(output({"--help"}).find("Exit codes") != std::string::npos);
  CHECK(output({"run", "--help"}).find("--temp") != std::string::npos);
  CHECK(output({"--version"}).starts_with("duet "));
  CHECK(document({"--version", "--json"})["version"].is_string());
}

TEST_CASE("tokenize and detokenize are inverse, with BOS only when asked for") {
  CHECK(output({"tokenize", kModel, "--text", "The package manager"}) == "448 1015 597 1481\n");
  CHECK(output({"tokenize", kModel, "--text", "The package manager", "--bos"}) ==
        "1 448 1015 597 1481\n");
  CHECK(document({"tokenize", kModel, "--text", "The package manager", "--json"})["ids"] ==
        Json({448, 1015, 597, 1481}));
  CHECK(output({"detokenize", kModel, "--ids", "1,448,1015,597,1481"}) == "The package manager\n");
  CHECK(document({"detokenize", kModel, "--ids", "[448, 1015]", "--json"})["text"] ==
        "The package");
}

TEST_CASE("tokenize --file takes the whole file, --jsonl one string per line") {
  const TempFolder folder;
  const std::string file = (folder / "in").string();
  write_text(file, "a\nb\n");
  CHECK(output({"tokenize", kModel, "--file", file}) ==
        output({"tokenize", kModel, "--text", "a\nb\n"}));
  write_text(file, "\"The package\"\n\"\\u00e9\"\n\"\"\n\"The\"");
  const std::string lines = output({"tokenize", kModel, "--jsonl", file});
  CHECK(std::count(lines.begin(), lines.end(), '\n') == 4);
  CHECK(lines.starts_with("[448,1015]\n"));
  CHECK(output({"detokenize", kModel, "--jsonl", "-"}, {.input = lines}) ==
        "\"The package\"\n\"\u00e9\"\n\"\"\n\"The\"\n");
  CHECK(document({"tokenize", kModel, "--jsonl", file, "--json"}).size() == 4);
}

TEST_CASE("a broken JSON line is named by its number") {
  const ProcessResult result =
      run_duet({"tokenize", kModel, "--jsonl", "-", "--json"}, {.input = "\"a\"\n{\n"});
  CHECK(refusal(result, 4, "standard input:2") == "");
  CHECK(refusal(run_duet({"tokenize", kModel, "--jsonl", "-", "--json"}, {.input = "7\n"}), 4,
                "JSON string") == "");
}

TEST_CASE("template shows the conversation as the model's prompt") {
  const TempFolder folder;
  const std::string file = (folder / "messages.json").string();
  write_text(file, R"([{"role": "user", "content": "Hello"}])");
  const Json v1 =
      document({"template", kModel, "--messages", file, "--template", "mistral-v1", "--json"});
  CHECK(v1["text"].get<std::string>().find("[INST] Hello [/INST]") != std::string::npos);
  CHECK(v1["ids"][0] == 1);
  CHECK(v1["ids"].size() > 4);
  CHECK(output({"template", kModel, "--messages", file, "--template", "chatml"})
            .find("<|im_start|>user\nHello<|im_end|>") != std::string::npos);
  CHECK(refusal(run_duet({"template", kModel, "--messages", file, "--template", "frob"}), 2,
                "mistral-v3") == "");
  CHECK(refusal(run_duet({"template", kModel, "--messages", file}), 2, "--template") == "");
  write_text(file, R"([{"role": "user")");
  CHECK(refusal(run_duet({"template", kModel, "--messages", file, "--template", "chatml"}), 4,
                "messages.json") == "");
  write_text(file, R"({"role": "user"})");
  CHECK(refusal(run_duet({"template", kModel, "--messages", file, "--template", "chatml"}), 2,
                "messages") == "");
}

TEST_CASE("logits writes every row, or the last, as float32 .npy") {
  const TempFolder folder;
  const std::string file = (folder / "out.npy").string();
  CHECK(output({"logits", kModel, "--ids", "1,448,1015", "-o", file}).empty());
  const Npy all = read_npy(file);
  CHECK(all.rows == 3);
  CHECK(all.cols == 4096);
  output({"logits", kModel, "--text", "The package", "--last", "-o", file});
  const Npy last = read_npy(file);
  CHECK(last.rows == 1);
  double worst = 0;
  for (size_t i = 0; i < last.cols; ++i)
    worst =
        std::max(worst, std::fabs(double{last.values[i]} - double{all.values[2 * all.cols + i]}));
  CHECK(worst < 1e-4);
}

TEST_CASE("perplexity reports the value, its error and what was scored") {
  const Json json = document({"perplexity", kModel, "-f", kSample, "--chunks", "1", "--json"});
  CHECK(json["ctx"] == 512);
  CHECK(json["chunks"] == 1);
  CHECK(json["tokens"] == 255);
  CHECK(json["perplexity"].get<double>() > 5);
  CHECK(json["perplexity"].get<double>() < 40);
  CHECK(std::fabs(std::exp(json["nll"].get<double>()) / json["perplexity"].get<double>() - 1) <
        1e-9);
  CHECK(json["nll_stderr"].get<double>() > 0);
  CHECK(output({"perplexity", kModel, "-f", kSample, "--chunks", "1", "--ctx", "128"})
            .find("63 tokens scored") != std::string::npos);
  CHECK(refusal(run_duet({"perplexity", kModel, "-f", "-"}, {.input = "too short"}), 2, "512") ==
        "");
}

TEST_CASE("inspect names architecture, layout, sizes and tensors") {
  const Json json = document({"inspect", kModel, "--json"});
  CHECK(json["arch"] == "llama");
  CHECK(json["layout"] == "merged experts");
  CHECK(json["params"] == 21970176);
  CHECK(json["tensors"].size() == 63);
  CHECK(json["tensors"][0]["name"] == "token_embd.weight");
  CHECK(json["tensors"][0]["shape"] == Json({4096, 256}));
  CHECK(json["tensors"][0]["bytes"].get<uint64_t>() > 0);
  CHECK(json["metadata"]["tokenizer.ggml.tokens"]["n"] == 4096);
  const std::string text = output({"inspect", kModel, "--tensors"});
  CHECK(text.find("blk.5.ffn_down_exps.weight") != std::string::npos);
  CHECK(text.find("bits per weight") != std::string::npos);
}

TEST_CASE("inspect shows no control characters of a file, and JSON keeps them") {
  const TempFolder folder;
  const std::string file = (folder / "model.gguf").string();
  GgufBuilder builder = tiny_model({});
  builder.key("general.name").bytes = raw_string("evil\x1b[2J\nname");
  builder.text("key\x1b[31m", "del\x7f").zeros("blk\x1b[0m", {32});
  write_bytes(file, builder.build());
  const std::string text = output({"inspect", file, "--tensors"});
  CHECK(std::all_of(text.begin(), text.end(), [](char c) { return c == '\n' || (c >= 0x20 && c != 0x7f); }));
  for (const char* shown : {"name:       evil [2J name\n", "key [31m: \"del \"\n", "\nblk [0m "}) CHECK_MESSAGE(text.find(shown) != std::string::npos, shown);
  CHECK(document({"inspect", file, "--json"})["name"] == "evil\x1b[2J\nname");
}

TEST_CASE("flags that may be repeated take one value each time, and leave MODEL alone") {
  CHECK(output({"quantize", "--dry-run", "--tensor", "ffn=Q6_K", kModel, "x.gguf", "Q8_0"}) ==
        output({"quantize", kModel, "x.gguf", "Q8_0", "--dry-run", "--tensor", "ffn=Q6_K"}));
  CHECK(output({"quantize", "--dry-run", "--tensor", "ffn=Q6_K", "--tensor", "attn=Q4_0", kModel, "x.gguf", "Q8_0"}).find("Q4_0 ") != std::string::npos);
  CHECK(document({"bench", "-p", "8", "-n", "2,3", "-t", "1", "-d", "0", "-r", "1", kModel, "--json"})["results"].size() == 3);
  for (const char* flag : {"--api-key", "--alias", "--allow-host", "--cors", "--lora"}) {
    CAPTURE(flag);
    CHECK(refusal(run_duet({"serve", flag, "x", "/nowhere.gguf", "--port", "0"}), 3, "/nowhere.gguf: ") == "");
  }
}

TEST_CASE("inspect tells the layouts apart and shows files that duet cannot run") {
  const TempFolder folder;
  const std::string file = (folder / "m.gguf").string();
  const auto layout = [&](const TinyModelOptions& options) {
    write_tiny_model(file, options);
    return document({"inspect", file, "--json"})["layout"];
  };
  CHECK(layout({.n_expert = 0, .n_expert_used = 0}) == "dense");
  CHECK(layout({.split_experts = true}) == "per-expert");
  GgufBuilder other = tiny_model({});
  other.key("general.architecture").bytes = raw_string("mamba");
  write_bytes(file, other.build());
  const Json json = document({"inspect", file, "--json"});
  CHECK(json["arch"] == "mamba");
  CHECK(json["problem"].get<std::string>().find("mamba") != std::string::npos);
}

TEST_CASE("doctor reports processor, cores, memory and disk") {
  const TempFolder folder;
  const Json json = document({"doctor", "--json", "--path", folder.path().string()});
  CHECK(json["isa"]["usable"].back() == "scalar");
  CHECK(json["isa"]["chosen"] == json["isa"]["usable"][0]);
  CHECK(json["cores"]["physical"].get<int>() >= 1);
  CHECK(json["cores"]["logical"] >= json["cores"]["physical"]);
  CHECK(json["memory"]["total_bytes"].get<uint64_t>() > 0);
  CHECK(json["memory"]["read_bytes_per_s"].get<double>() > 1e8);
  CHECK(json["disk"]["read_bytes_per_s"].is_number());
  for (const Json& warning : json["warnings"])
    CHECK_FALSE(warning["fix"].get<std::string>().empty());
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK(output({"doctor", "--path", kModel, "--isa", "scalar"}).find("kernels:       scalar") !=
        std::string::npos);
}

TEST_CASE("threads are placed as asked, with the same text") {
  const Json cores = document({"doctor", "--json", "-t", "1", "--pin", "on", "--numa", "off"})["cores"];
  CHECK(cores["performance"].get<int>() >= 1);
  CHECK(cores["performance"] <= cores["physical"]);
  CHECK(cores["nodes"].size() >= 1);
  CHECK(cores["pinned"].size() == 1);
  CHECK(cores["pinned"][0].size() == 1);
  CHECK(cores["interleave"].empty());
  const auto text = [](const std::vector<std::string>& more) {
    std::vector<std::string> args = {"run", kModel, "-p", "The", "-n", "8", "--temp", "0"};
    args.insert(args.end(), more.begin(), more.end());
    return output(args);
  };
  const std::string one = text({"-t", "1"});
  for (const std::string pin : {"auto", "on", "off"}) CHECK(text({"-t", "2", "--pin", pin, "--numa", "off"}) == one);
}

TEST_CASE("a vocabulary is enough to tokenize") {
  const TempFolder folder;
  const std::string file = (folder / "vocab.gguf").string();
  output({"convert", DUET_SOURCE_DIR "/models/demo", "--vocab-only", "-o", file});
  CHECK(output({"tokenize", file, "--text", "The package manager"}) == "448 1015 597 1481\n");
  CHECK(document({"inspect", file, "--json"})["layout"] == "vocabulary only");
  CHECK(refusal(run_duet({"run", file, "-p", "a"}), 4, "vocab.gguf") == "");
}
