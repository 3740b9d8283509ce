// PEFT's LoRA adapters: a folder with adapter_config.json and adapter_model.safetensors. W becomes W + B A.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "formats/schema.h"

namespace duet {

// An adapter, and how strongly it is applied (1: as it was trained).
struct LoraChoice {
  std::filesystem::path folder;
  double strength = 1;
};
// "DIR" or "DIR=0.5". Error(usage): not a number.
LoraChoice parse_lora(const std::string& text);

// What it adds to one matrix of a model, rows in GGUF's order (those of q and k interleaved).
struct LoraPart {
  TensorKind kind;
  int layer = -1;
  int expert = -1;       // -1: of a tensor without experts
  size_t rank = 0;
  std::vector<float> a;  // [rank, cols]
  std::vector<float> b;  // [rows, rank], alpha / rank (or its square root) and strength included
};

struct LoraAdapter {
  std::string identity;  // names, sizes and dates of its files, and the strength
  std::vector<LoraPart> parts;
};

// Names of both generations: self_attn.q_proj, block_sparse_moe.experts.N.w1, or mlp.experts (both fused
// parameters of transformers 5, told apart by their shapes). Error: io; format (of another model, incomplete);
// unsupported (naming the piece or the option that has no place here; only a pickle).
LoraAdapter read_lora(const LoraChoice& choice, const HParams& hparams);

}  // namespace duet
