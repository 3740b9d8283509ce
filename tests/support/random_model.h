// Small model files of random weights for tests of the runtime: any hyper-parameters, any format
// per tensor (and per expert), both expert layouts with the same values.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/schema.h"

namespace duet::test {

struct RandomModel {
  HParams hparams;
  bool split_experts = false;
  bool rope_factors = false;  // adds rope_freqs.weight
  uint64_t seed = 1;
  // Format of a matrix, by GGUF name (of the expert's own tensor in the split layout); norms and
  // the router are F32 unless `small_type` says otherwise. Merged tensors ask for the merged name.
  std::function<DType(const std::string& name)> type = [](const std::string&) { return DType::F32; };
  DType small_type = DType::F32;
  // Faults: tensors left out; shapes and formats replaced by name.
  bool keep_tensors = true;  // false: metadata only
  std::vector<std::string> omit = {};
  std::function<void(const std::string& name, std::vector<uint64_t>& shape, DType& type)> damage = {};
  std::vector<std::pair<std::string, std::vector<uint64_t>>> extra = {};  // F32 tensors of ones
};

// 4 experts, 2 used, 2 layers, hidden 64, 97 tokens.
HParams tiny_hparams();
// 8 experts, 2 used, sizes that 256-element formats divide.
HParams small_mixtral_hparams(uint32_t n_layer, uint32_t n_ff);

// Writes the file into a folder of this process under DUET_TEST_DIR, removed at its end; gives its path.
std::filesystem::path write_model(const RandomModel& model, const std::string& file_name);

}  // namespace duet::test
