// Bad input of every kind: one clear line on stderr, the documented exit code, nothing on stdout.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>

#include "tests/support/process.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;
namespace fs = std::filesystem;

namespace {

constexpr int kUsage = 2, kIo = 3, kFormat = 4, kUnsupported = 6;

using Bytes = std::vector<std::byte>;

Bytes tiny() {
  static const Bytes bytes = tiny_model_bytes({});
  return bytes;
}

// Overwrites the number at `offset`.
template <class T>
Bytes patched(Bytes bytes, size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
  return bytes;
}

Bytes cut(Bytes bytes, size_t n) {
  bytes.resize(n);
  return bytes;
}

Bytes with_architecture(const char* name) {
  GgufBuilder builder = tiny_model({});
  builder.key("general.architecture").bytes = raw_string(name);
  return builder.build();
}

std::string refused(const Bytes& bytes, int exit_code, const std::string& words,
                    std::vector<std::string> arguments = {}) {
  const TempFolder folder;
  const fs::path model = folder / "model.gguf";
  write_bytes(model, bytes);
  arguments.insert(arguments.begin(), {"run", model.string(), "-p", "the", "-n", "1"});
  return refusal(run_duet(arguments), exit_code, words);
}

struct BrokenFile {
  const char* name;
  Bytes bytes;
  int exit_code;
  const char* words;
};

// Header: magic at 0, version at 4, tensor count at 8, key count at 16.
std::vector<BrokenFile> broken_files() {
  const size_t size = tiny().size();
  Bytes shuffled = tiny();
  std::shuffle(shuffled.begin() + 24, shuffled.end(), std::mt19937(1));
  return {
      {"zero length", {}, kFormat, "model.gguf"},
      {"three bytes", cut(tiny(), 3), kFormat, "model.gguf"},
      {"cut in the header", cut(tiny(), 20), kFormat, "model.gguf"},
      {"cut in the metadata", cut(tiny(), 600), kFormat, "model.gguf"},
      {"cut in the tensor data", cut(tiny(), size - size / 3), kFormat, "model.gguf"},
      {"one byte short", cut(tiny(), size - 33), kFormat, "model.gguf"},
      {"another magic", patched(tiny(), 0, 'X'), kFormat, "model.gguf"},
      {"big-endian", patched(tiny(), 4, uint32_t{0x03000000}), kUnsupported, "big-endian"},
      {"version 1", patched(tiny(), 4, uint32_t{1}), kUnsupported, "version"},
      {"version 99", patched(tiny(), 4, uint32_t{99}), kUnsupported, "version"},
      {"2^60 tensors", patched(tiny(), 8, uint64_t{1} << 60), kFormat, "model.gguf"},
      {"2^60 keys", patched(tiny(), 16, uint64_t{1} << 60), kFormat, "model.gguf"},
      {"one key too many", patched(tiny(), 16, uint64_t{1000}), kFormat, "model.gguf"},
      {"first key of 2^40 bytes", patched(tiny(), 24, uint64_t{1} << 40), kFormat, "model.gguf"},
      {"shuffled", shuffled, kFormat, "model.gguf"},
      {"text", Bytes(5000, std::byte{'a'}), kFormat, "model.gguf"},
      {"unknown architecture", with_architecture("mamba"), kUnsupported, "mamba"},
      {"missing tensor", tiny_model_bytes({.omit_tensors = {"blk.1.attn_q.weight"}}), kFormat,
       "blk.1.attn_q.weight"},
      {"no tokenizer",
       tiny_model_bytes({.omit_keys = {"tokenizer.ggml.model", "tokenizer.ggml.tokens"}}), kFormat,
       "token"},
      {"no hyper-parameters", tiny_model_bytes({.omit_keys = {"llama.block_count"}}), kFormat,
       "block_count"},
  };
}

// A folder with links to all files of models/demo but `without`.
void link_demo(const fs::path& folder, const std::vector<std::string>& without) {
  for (const auto& entry : fs::directory_iterator(DUET_SOURCE_DIR "/models/demo")) {
    const std::string name = entry.path().filename().string();
    if (std::find(without.begin(), without.end(), name) == without.end())
      fs::create_symlink(entry.path(), folder / name);
  }
}

std::string convert_refused(const std::vector<std::string>& without, int exit_code,
                            const std::string& words) {
  const TempFolder folder;
  const fs::path source = folder / "source", output = folder / "out";
  fs::create_directory(source);
  fs::create_directory(output);
  link_demo(source, without);
  std::string wrong =
      refusal(run_duet({"convert", source.string(), "-o", (output / "out.gguf").string()}),
              exit_code, words);
  if (!fs::is_empty(output)) wrong += "something was left behind";
  return wrong;
}

}  // namespace

TEST_CASE("the unbroken tiny model runs") {
  const TempFolder folder;
  write_bytes(folder / "model.gguf", tiny());
  const ProcessResult result =
      run_duet({"run", (folder / "model.gguf").string(), "-p", "the", "-n", "1"});
  CHECK(result.exit_code == 0);
  CHECK(result.err.find("error") == std::string::npos);
}

TEST_CASE("broken model files are refused with the right code") {
  for (const BrokenFile& file : broken_files()) {
    CAPTURE(file.name);
    CHECK(refused(file.bytes, file.exit_code, file.words) == "");
  }
}

TEST_CASE("one flipped bit anywhere never crashes a command") {
  const TempFolder folder;
  const std::string model = (folder / "model.gguf").string();
  std::mt19937 rng(7);
  for (int i = 0; i < 60; ++i) {
    // Two of three in the header and metadata, where the structure is.
    Bytes bytes = tiny();
    const size_t range = i % 3 != 0 ? 24000 : bytes.size();
    const size_t at = rng() % std::min(range, bytes.size());
    bytes[at] ^= static_cast<std::byte>(1u << (rng() % 8));
    write_bytes(model, bytes);
    CAPTURE(at);
    const ProcessResult result = run_duet({"run", model, "-p", "the", "-n", "2", "--ctx", "64"});
    CHECK(std::string_view(std::to_string(result.exit_code)).find_first_not_of("02456") ==
          std::string::npos);
    if (result.exit_code != 0) CHECK(refusal(result, result.exit_code, "") == "");
  }
}

TEST_CASE("a missing file is an I/O error for every command that opens one") {
  for (const std::vector<std::string>& command : std::vector<std::vector<std::string>>{
           {"run", "nowhere.gguf", "-p", "a"},
           {"inspect", "nowhere.gguf"},
           {"tokenize", "nowhere.gguf", "--text", "a"},
           {"detokenize", "nowhere.gguf", "--ids", "1"},
           {"template", "nowhere.gguf", "--messages", "m.json"},
           {"logits", "nowhere.gguf", "--ids", "1", "-o", "out.npy"},
           {"perplexity", "nowhere.gguf", "-f", DUET_SOURCE_DIR "/tests/golden/data/sample.txt"},
           {"quantize", "nowhere.gguf", "out.gguf", "Q8_0"}}) {
    CAPTURE(command.front());
    CHECK(refusal(run_duet(command), kIo, "nowhere.gguf") == "");
  }
  CHECK(refusal(run_duet({"convert", "nowhere", "-o", "out.gguf"}), kIo, "nowhere") == "");
  CHECK(refusal(run_duet({"doctor", "--path", "nowhere"}), kIo, "nowhere") == "");
}

TEST_CASE("a folder in the place of a model file says how to convert it") {
  CHECK(refusal(run_duet({"run", DUET_SOURCE_DIR "/models/demo", "-p", "a"}), kIo,
                "duet convert") == "");
}

TEST_CASE("incomplete model folders are refused by name of what is missing") {
  CHECK(convert_refused({"model-00002-of-00002.safetensors"}, kIo,
                        "model-00002-of-00002.safetensors") == "");
  CHECK(convert_refused({"tokenizer.model"}, kFormat, "tokenizer") == "");
  CHECK(convert_refused({"config.json"}, kIo, "config.json") == "");
}

TEST_CASE("a model folder of another architecture is unsupported") {
  const TempFolder folder;
  link_demo(folder.path(), {"config.json"});
  write_text(folder / "config.json",
             R"({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})");
  CHECK(refusal(run_duet({"convert", folder.path().string(), "-o", (folder / "out.gguf").string()}),
                kUnsupported, "GPT2LMHeadModel") == "");
}

TEST_CASE("a truncated shard is a damaged file") {
  const TempFolder folder;
  const char* shard = "model-00002-of-00002.safetensors";
  link_demo(folder.path(), {shard});
  fs::copy_file(fs::path(DUET_SOURCE_DIR "/models/demo") / shard, folder / shard);
  fs::resize_file(folder / shard, fs::file_size(folder / shard) / 2);
  CHECK(refusal(run_duet({"convert", folder.path().string(), "-o", (folder / "out.gguf").string()}),
                kFormat, shard) == "");
  CHECK_FALSE(fs::exists(folder / "out.gguf"));
}

TEST_CASE("wrong options are usage errors that name the option") {
  const std::string model = DUET_TEST_DIR "/demo-q4_k_m.gguf";
  const auto wrong = [&](std::vector<std::string> arguments, const std::string& words) {
    CAPTURE(words);
    CHECK(refusal(run_duet(arguments), kUsage, words) == "");
  };
  wrong({"frobnicate", "model.gguf"}, "unknown command 'frobnicate'");
  wrong({"--json"}, "--version");
  wrong({"run"}, "MODEL");
  wrong({"run", model}, "no prompt");
  wrong({"run", model, "-p", "a", "--frob"}, "--frob");
  wrong({"run", model, "-p", "a", "--threads", "0"}, "--threads");
  wrong({"run", model, "-p", "a", "--pin", "sometimes"}, "--pin");
  wrong({"run", model, "-p", "a", "--numa", "yes"}, "--numa");
  wrong({"run", model, "-p", "a", "--threads", "two"}, "--threads");
  wrong({"run", model, "-p", "a", "--ctx", "-1"}, "--ctx");
  wrong({"run", model, "-p", "a", "--ctx", "-18446744073709551615"}, "--ctx");
  wrong({"run", model, "-p", "a", "--kv-type", "q4"}, "--kv-type");
  wrong({"run", model, "-p", "a", "-n", "-2"}, "--n-predict");
  wrong({"run", model, "-p", "a", "--temp", "warm"}, "--temp");
  wrong({"run", model, "-p", "a", "--temp", "nan"}, "temperature");
  wrong({"run", model, "-p", "a", "--template", "frob"}, "chatml");
  for (const char* seed : {"99999999999999999999", "18446744073709551616", "-1", " 1", "1.5", "0x", ""})
    wrong({"run", model, "-p", "a", "--seed", seed}, "--seed: '" + std::string(seed) + "' is not a whole number from 0 to 18446744073709551615");
  wrong({"chat", model, "--seed", "-1"}, "--seed");
  wrong({"bench", model, "--seed", "-1"}, "--seed");
  wrong({"make-synthetic", "tiny", "--seed", "-1", "-o", "x.gguf"}, "--seed");
  wrong({"quantize", model, "x.gguf", "Q8_0", "--calibrate-tokens", "-1"}, "--calibrate-tokens");
  wrong({"perplexity", model, "-f", "x", "--chunks", "99999999999999999999"}, "--chunks");
  wrong({"serve", model, "--queue", "-1"}, "--queue");
  wrong({"tokenize", model}, "--text");
  wrong({"tokenize", model, "--text", "a", "--file", "b"}, "--text");
  wrong({"detokenize", model, "--ids", "1,x"}, "'x'");
  wrong({"detokenize", model, "--ids", "1,999999"}, "999999");
  wrong({"logits", model, "--ids", "1"}, "--output");
  wrong({"logits", model, "--ids", "", "-o", "x.npy"}, "no tokens");
  wrong({"logits", model, "--ids", "999999", "-o", "x.npy"}, "999999");
  wrong({"perplexity", model, "-f", DUET_SOURCE_DIR "/LICENSE", "--ctx", "100000"}, "100000");
  wrong({"convert", DUET_SOURCE_DIR "/models/demo", "-q", "Q9_X", "-o", "x.gguf"}, "Q4_K_M");
  wrong({"convert", DUET_SOURCE_DIR "/models/demo"}, "-o");
  for (const char* option : {"--imatrix", "--lora", "--tensor", "--split-max-size", "--calibrate"})
    wrong({"convert", DUET_SOURCE_DIR "/models/demo", "--vocab-only", "-o", "x.gguf", option, "x"}, option);
}

TEST_CASE("an unknown instruction set is unsupported") {
  const std::string model = DUET_TEST_DIR "/demo-q4_k_m.gguf";
  CHECK(refusal(run_duet({"run", model, "-p", "a", "--isa", "mmx"}), kUnsupported, "scalar") == "");
  CHECK(refusal(run_duet({"run", model, "-p", "a"}, {.environment = {{"DUET_ISA", "mmx"}}}),
                kUnsupported, "scalar") == "");
}

TEST_CASE("a prompt longer than the context is refused with both counts") {
  const std::string model = DUET_TEST_DIR "/demo-q4_k_m.gguf";
  CHECK(refusal(
            run_duet({"run", model, "-p", "one two three four five six seven eight", "--ctx", "4"}),
            kUsage, "--ctx") == "");
}

TEST_CASE("a path that cannot be looked at is an I/O error with its reason") {
  const TempFolder folder;
  const std::string loop = (folder / "loop").string(), name = std::string(300, 'x'), model = DUET_TEST_DIR "/demo-q4_k_m.gguf";
  fs::create_symlink("loop", loop);
  for (const auto& [path, reason] : {std::pair(loop, "symbolic links"), std::pair(name, "too long")}) {
    CHECK(refusal(run_duet({"convert", path, "-o", "x.gguf"}), kIo, reason) == "");
    CHECK(refusal(run_duet({"convert", DUET_SOURCE_DIR "/models/demo", "-o", path}), kIo, path + ": ") == "");
    CHECK(refusal(run_duet({"quantize", model, path, "Q8_0"}), kIo, reason) == "");
    CHECK(refusal(run_duet({"plan", path}), kIo, path + ": ") == "");
    CHECK(refusal(run_duet({"doctor", "--path", path}), kIo, reason) == "");
    CHECK(refusal(run_duet({"compare", path, model}), kIo, reason) == "");
    CHECK(refusal(run_duet({"run", model, "-p", "a", "--lora", path}), kIo, path + ": ") == "");
  }
}
