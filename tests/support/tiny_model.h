// A model of random weights small enough for unit tests, with a vocabulary that encodes any text.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/schema.h"
#include "tests/support/gguf_builder.h"

namespace duet::test {

struct TinyModelOptions {
  uint32_t n_layer = 2, n_expert = 4, n_expert_used = 2;  // n_expert 0: dense
  // Rows must be whole blocks: use 256 for n_embd and n_ff with the K formats and IQ4_XS.
  uint32_t n_embd = 64, n_ff = 96, n_head = 4, n_head_kv = 2;
  uint32_t n_ctx_train = 512;
  uint32_t n_vocab = 0;        // 0: the vocabulary's own size; more is filled with unused tokens
  uint32_t n_rows = 0;         // of the embedding and the head; 0: a row for each token
  DType type = DType::F32;     // of every matrix but the router; norms and router are F32
  bool split_experts = false;  // blk.N.ffn_gate.E.weight instead of blk.N.ffn_gate_exps.weight
  bool tied_output = false;
  uint32_t sliding_window = 0;
  float rope_freq_base = 10000.0f;
  std::string chat_template = {};  // tokenizer.chat_template when not empty
  uint64_t seed = 1;
  std::vector<std::string> omit_keys = {};     // metadata keys to leave out
  std::vector<std::string> omit_tensors = {};  // tensors to leave out
};

HParams tiny_hparams(const TinyModelOptions& options);
// SentencePiece-like: <unk> <s> </s>, 256 byte tokens, then pieces whose scores make "_the" from
// "_t" + "he" (_ for U+2581).
struct TinyVocabulary {
  std::vector<std::string> tokens;
  std::vector<float> scores;
  std::vector<int32_t> types;
};
TinyVocabulary tiny_vocabulary(uint32_t n_vocab = 0);

GgufBuilder tiny_model(const TinyModelOptions& options);  // to be altered, then build()
std::vector<std::byte> tiny_model_bytes(const TinyModelOptions& options);
void write_tiny_model(const std::filesystem::path& path, const TinyModelOptions& options);

}  // namespace duet::test
