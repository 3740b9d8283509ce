// The tensors of an open file, bound once to typed fields with every shape and type checked.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/pages.h"
#include "formats/gguf.h"
#include "formats/lora.h"
#include "formats/schema.h"

namespace duet {

struct StreamOptions;

// What adapters add to a matrix: y += b (a x).
struct LowRank {
  size_t rank = 0;
  std::vector<float> a, b;  // [rank, cols], [rows, rank]
};

// A matrix in place in the file (or, for small ones, decoded): y[rows] = W x[cols].
struct Weight {
  const Format* format = nullptr;
  size_t rows = 0, cols = 0;
  const std::byte* data = nullptr;  // [rows, cols]
  size_t row_bytes = 0;
  const LowRank* low_rank = nullptr;  // of the model; null: nothing
};

struct Expert {
  Weight gate, up;  // [n_ff, n_embd]
  Weight down;      // [n_embd, n_ff]
};

struct Layer {
  std::vector<float> attn_norm, ffn_norm;       // [n_embd]
  Weight attn_q, attn_k, attn_v, attn_output;   // [n_head * head_dim, n_embd], ..., [n_embd, n_head * head_dim]
  std::vector<float> router;                    // [n_expert, n_embd]; empty when dense
  std::vector<Expert> experts;                  // n_expert, one when dense; formats may differ
};

// Immutable. Holds the file open; weights point into it.
class Model {
 public:
  // Throws Error: format (tensor missing, of another shape or a type that does not fit its use),
  // unsupported (a tensor that this architecture has no place for: ignoring it would change results).
  static Model bind(const GgufFile& file, const HParams& hparams);

  // Copies all matrices that are not routed experts to memory of the model's own, past the page cache
  // where possible, and lets go of the file's pages: for models whose experts are streamed. Beside a card, which has
  // the others, only the embeddings. Error: io, memory.
  void own_dense(const StreamOptions& options, bool beside_card);

  // From now on the products of these matrices are those with the adapter. Error: as of read_lora().
  void apply(const LoraChoice& lora);

  const HParams& hparams() const { return hparams_; }
  const GgufFile& file() const { return file_; }
  const Weight& token_embd() const { return token_embd_; }               // [n_vocab, n_embd]
  const Weight& output() const { return output_; }                       // [n_vocab, n_embd], may be token_embd
  const std::vector<float>& output_norm() const { return output_norm_; } // [n_embd]
  // Divisors of the rotation speeds, [n_rot / 2]; empty: all 1.
  const std::vector<float>& rope_factors() const { return rope_factors_; }
  const std::vector<Layer>& layers() const { return layers_; }

  std::string layout() const;  // "dense", "merged experts", "per-expert"
  std::string types() const;   // formats by bytes, "Q4_K (experts), Q8_0, F32"
  uint64_t n_params() const;
  uint64_t lora_bytes() const;  // of adapters, in memory

 private:
  friend class ModelBinder;
  Model(GgufFile file, HParams hparams) : file_(std::move(file)), hparams_(std::move(hparams)) {}

  GgufFile file_;
  HParams hparams_;
  Weight token_embd_, output_;
  std::vector<float> output_norm_, rope_factors_;
  std::vector<Layer> layers_;
  bool split_experts_ = false;
  PageArray dense_;  // own_dense()
  std::vector<std::unique_ptr<LowRank>> low_ranks_;  // by Weight::low_rank
};

}  // namespace duet
