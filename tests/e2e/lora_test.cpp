// --lora of convert, run and logits.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "tests/support/close.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/hf_folder.h"
#include "tests/support/npy.h"
#include "tests/support/process.h"

using namespace duet::test;

namespace {

constexpr int kUsage = 2, kIo = 3;
const std::string kDemo = DUET_SOURCE_DIR "/models/demo";
const std::string kF32 = DUET_TEST_DIR "/demo-f32.gguf";
constexpr uint64_t kRank = 4;

std::string output(const std::vector<std::string>& arguments) {
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.out;
}

// Of the query and value projections of all layers.
void write_adapter(const std::filesystem::path& folder) {
  const duet::Json config = duet::parse_json(duet::read_file(kDemo + "/config.json", 1 << 16), "config.json");
  const auto number = [&](const char* key) { return config[key].get<uint64_t>(); };
  const uint64_t n_embd = number("hidden_size"), head_dim = config.value("head_dim", n_embd / number("num_attention_heads"));
  std::vector<HfTensor> tensors;
  Rng rng(4);
  const auto add = [&](const std::string& name, uint64_t rows, uint64_t cols, float size) {
    HfTensor tensor{name, {rows, cols}, {}};
    for (uint64_t i = 0; i < rows * cols; ++i) tensor.values.push_back(size * rng.symmetric());
    tensors.push_back(std::move(tensor));
  };
  for (uint64_t layer = 0; layer < number("num_hidden_layers"); ++layer)
    for (const char* matrix : {"q_proj", "v_proj"}) {
      const std::string module = duet::concat("base_model.model.model.layers.", layer, ".self_attn.", matrix);
      const uint64_t n_heads = number(matrix[0] == 'q' ? "num_attention_heads" : "num_key_value_heads");
      add(module + ".lora_A.weight", kRank, n_embd, 0.1f);
      add(module + ".lora_B.weight", n_heads * head_dim, kRank, 0.3f);
    }
  write_text(folder / "adapter_config.json", R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]})");
  write_text(folder / "adapter_model.safetensors", safetensors_bytes(tensors, true));
}

// Largest difference of logits.
double difference(const NpyArray& a, const NpyArray& b) {
  REQUIRE(a.shape == b.shape);
  double most = 0;
  for (size_t t = 0; t < a.shape[0]; ++t)
    for (size_t i = 0; i < a.shape[1]; ++i) most = std::max(most, std::fabs(double{a[t][i]} - double{b[t][i]}));
  return most;
}

}  // namespace

TEST_CASE("lora: run and logits with an adapter give what the merged file gives") {
  const TempFolder folder;
  const std::string adapter = (folder / "adapter").string(), merged = (folder / "merged.gguf").string();
  write_adapter(adapter);
  output({"convert", kDemo, "-q", "F32", "--lora", adapter + "=0.5", "-o", merged});
  const auto logits = [&](std::vector<std::string> arguments) {
    const std::string file = (folder / "logits.npy").string();
    arguments.insert(arguments.begin(), "logits");
    arguments.insert(arguments.end(), {"--text", "Once upon a time there was a little", "-o", file});
    output(arguments);
    return read_npy(file);
  };
  const NpyArray expected = logits({merged}), plain = logits({kF32}), applied = logits({kF32, "--lora", adapter + "=0.5"});
  CHECK(difference(expected, plain) > 0.1);
  CHECK(difference(expected, applied) < 1e-3);
  const std::vector<std::string> run = {"-p", "Once upon a time", "-n", "16", "--temp", "0", "--raw"};
  const auto text = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "run");
    arguments.insert(arguments.end(), run.begin(), run.end());
    return output(arguments);
  };
  CHECK(text({merged}) == text({kF32, "--lora", adapter + "=0.5"}));
  CHECK(text({merged}) == text({kF32, "--lora", adapter + "=0.5", "--slots", "2"}));
  CHECK(refusal(run_duet({"run", kF32, "-p", "x", "--lora", "nowhere"}), kIo, "nowhere: no such folder") == "");
  CHECK(refusal(run_duet({"run", kF32, "-p", "x", "--lora", adapter + "=much"}), kUsage, "FOLDER=NUMBER") == "");
}

TEST_CASE("lora: plan and bench count an adapter's memory; a type to be converted to takes none") {
  const TempFolder folder;
  const std::string adapter = (folder / "adapter").string();
  write_adapter(adapter);
  const auto dense_bytes = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"plan", kF32, "--json", "--path", kF32});
    return duet::parse_json(output(arguments), "plan")["plans"][0]["plan"]["dense_bytes"].get<uint64_t>();
  };
  const uint64_t n_bytes = std::filesystem::file_size(folder / "adapter" / "adapter_model.safetensors");
  const uint64_t added = dense_bytes({"--lora", adapter}) - dense_bytes({});
  CHECK(added > n_bytes * 9 / 10 - 4096);
  CHECK(added < n_bytes);
  CHECK(refusal(run_duet({"plan", kDemo, "--lora", adapter}), kUsage, "--lora: adapters are applied to a GGUF file") == "");
  CHECK(refusal(run_duet({"plan", "mixtral-8x7b", "--lora", adapter}), kUsage, "--lora") == "");
  CHECK(refusal(run_duet({"plan", kF32, "--lora", "nowhere"}), kIo, "nowhere: no such folder") == "");
  CHECK(refusal(run_duet({"bench", kF32, "--lora", "nowhere"}), kIo, "nowhere: no such folder") == "");
}

TEST_CASE("lora: a card is left alone, and refused where it was asked for") {
  const TempFolder folder;
  const std::string adapter = (folder / "adapter").string();
  write_adapter(adapter);
  const ProcessOptions card{.environment = {{"DUET_GPU_MODULE", DUET_GPU_EMULATED}}};
  const ProcessResult run = run_duet({"run", kF32, "-p", "x", "-n", "1", "--raw", "--lora", adapter}, card);
  CHECK(run.exit_code == 0);
  CHECK(run.err.find("adapters are applied on the CPU only: no card is used") != std::string::npos);
  const ProcessOptions no_module{.environment = {{"DUET_GPU_MODULE", "/nowhere/module.so"}}};
  CHECK(run_duet({"run", kF32, "-p", "x", "-n", "1", "--raw", "--lora", adapter}, no_module).err.find("card") == std::string::npos);
  for (const char* command : {"run", "plan", "bench"}) {
    std::vector<std::string> arguments{command, kF32, "--gpu", "1", "--lora", adapter};
    if (command == std::string("run")) arguments.insert(arguments.end(), {"-p", "x"});
    CHECK(refusal(run_duet(arguments, card), 6, "adapters are applied on the CPU only") == "");
  }
}
