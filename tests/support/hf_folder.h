// Hugging Face model folders made by hand for tests of the converter: any tensors, any JSON,
// written without the project's own readers or writers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace duet::test {

struct HfTensor {
  std::string name;
  std::vector<uint64_t> shape;
  std::vector<float> values;  // each exact in bfloat16
  // Stored instead of the values when not empty: "F8_E4M3", and bytes.
  std::string dtype = {}, bytes = {};
};

// One safetensors file of these tensors in BF16, or in F32 when `as_f32`.
std::string safetensors_bytes(const std::vector<HfTensor>& tensors, bool as_f32 = false);

// A SentencePiece model as protobuf bytes.
struct SpModelBuilder {
  struct Piece {
    std::string text;
    float score;
    int type;
  };
  std::vector<Piece> pieces;
  int model_type = 2;  // BPE
  bool add_dummy_prefix = true;
  int unk_id = 0, bos_id = 1, eos_id = 2, pad_id = -1;
  std::string build() const;
};

// <unk> <s> </s>, 256 bytes, then these pieces with falling scores.
SpModelBuilder small_sp_model(const std::vector<std::string>& pieces = {"a", "b", "ab"});

struct HfFolder {
  Json config;
  std::vector<HfTensor> tensors;
  bool f32 = false;             // stored as F32 instead of BF16
  size_t n_shards = 1;          // > 1: with model.safetensors.index.json
  std::string weights_name = "model.safetensors";  // of a single file
  std::string config_name = "config.json";
  std::string tokenizer_model;  // empty: no such file
  std::vector<std::pair<std::string, std::string>> files = {};  // further files: name, content

  HfTensor& tensor(std::string_view name);  // must exist
  void remove(std::string_view name);
  void write(const std::filesystem::path& folder) const;
};

// Names of the expert (or feed-forward) tensors.
enum class HfForm { per_expert, fused, dense };

// 2 layers, hidden 32, 4 heads of 8, 2 KV heads, 2 experts used of 4, expert width 64, 264 tokens.
// Values are random and equal for equal names (fused tensors hold the per-expert ones).
HfFolder tiny_hf_folder(HfForm form = HfForm::per_expert);

}  // namespace duet::test
