// The forward pass of a chunk of tokens on a card. Layers whose experts are the CPU's hand their rows to it and take them
// back. Keys and values, working memory and all rows live on the card; the host waits for it only before and after the
// CPU's experts, and at the end.
#pragma once

#include <atomic>
#include <functional>
#include <span>
#include <vector>

#include "runtime/gpu/offload.h"
#include "runtime/gpu/scratch.h"

namespace duet::gpu {

// Keys and values of one sequence, [layer][keys, values][position][n_head_kv][head_dim]; Q8_0: and scales.
class Cache {
 public:
  // Error(memory), Error(unsupported).
  Cache(Offload& card, uint32_t n_ctx, KvType type);

  KvLayer layer(size_t i) const;
  size_t n_ctx() const { return n_ctx_; }
  size_t n_layer() const { return n_layer_; }
  size_t size_bytes() const { return memory_.size(); }
  // Takes over the first n positions of a cache of the same size.
  void copy_prefix(const Cache& from, size_t n);
  // Of positions [256 * block, ... + n) of a layer. Error(io).
  size_t block_bytes(size_t n) const;
  void save(size_t layer, size_t block, size_t n, std::span<std::byte> out) const;
  void load(size_t layer, size_t block, size_t n, std::span<const std::byte> in);

 private:
  struct Part {
    std::byte* data;
    size_t position_bytes;
  };
  std::vector<Part> parts(size_t layer) const;

  Offload* card_;
  size_t n_layer_, n_ctx_, n_positions_, row_bytes_, scale_bytes_;  // of a position: values, scales
  Memory memory_;
};

// Positions [first, first + n) of a sequence.
struct CardRun {
  Cache* cache;
  size_t first, n;
};

struct ForwardHooks {
  // residual [n, n_embd] += experts(rms_norm(residual)), by the CPU.
  std::function<void(size_t layer, float* residual)> experts;
  // Null, or told at the end of the experts that the card's router chose.
  std::function<void(size_t layer, std::span<const int32_t> chosen)> routing;
  std::function<void(int layer, std::span<const float> hidden)> hidden;  // null, or as DecoderProbe's; slows
  const std::atomic<bool>* cancel = nullptr;
  int n_threads = 1;  // that copy the CPU's experts, which long chunks have sent through the card
};

// One thread at a time.
class Forward {
 public:
  // Error(memory).
  Forward(Offload& card, const ChunkSizes& sizes);

  // Where the host writes the rows of embeddings, [n_batch, n_embd].
  float* rows() const { return rows_; }
  // Evaluates them. Error(cancelled) between layers, Error(io) when the card fails.
  void forward(std::span<const CardRun> runs, const ForwardHooks& hooks);
  // Logits of rows of the last forward() -> out [rows.size(), n_vocab]; hidden states after the final norm.
  void logits(std::span<const size_t> rows, float* out);
  void hidden(std::span<const size_t> rows, float* out);

  Offload& card() const { return *card_; }
  const ChunkSizes& sizes() const { return sizes_; }

 private:
  void begin(std::span<const CardRun> runs);
  void attend(size_t layer);
  void choose(size_t layer);
  void run_experts(size_t layer);
  void run_in_transit(size_t layer, int n_threads);
  void multiply_in_transit(const Expert& expert, size_t first, size_t n);
  void run_on_host(size_t layer, const ForwardHooks& hooks);
  void multiply(const ExpertMatrices& w, const float* x, const ActRows& acts, const int32_t* token, float* y);
  void multiply(const Matrices& w, const float* x, const ActRows& acts, size_t n, float* y, bool add);
  void finish(const ForwardHooks& hooks, size_t first_layer);
  void tell_hidden(const ForwardHooks& hooks, int layer);
  void pick(std::span<const size_t> rows);  // and normalize
  size_t n_slots() const { return n_ * used_count(*h_); }
  int32_t* chosen(size_t layer) const { return s_.chosen + layer * n_slots(); }
  float* weights(size_t layer) const { return s_.weights + layer * n_slots(); }

  Offload* card_;
  Device* device_;
  const HParams* h_;
  ChunkSizes sizes_;
  HeadShape shape_;
  size_t attention_bytes_;
  std::vector<float> speeds_;      // of rotation, [n_rot / 2]
  Memory memory_;
  Scratch s_{};
  HostMemory host_;                // rows, cosines and sines, runs
  float *rows_, *cos_sin_;
  KvRun* runs_;
  size_t n_ = 0, n_runs_ = 0, max_keys_ = 0;
  std::vector<int32_t> first_;     // s_.first, where the host goes from expert to expert
  std::vector<int32_t> chosen_;    // by the card's router
};

}  // namespace duet::gpu
