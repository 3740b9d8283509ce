// The forward pass of one chunk of tokens: embedding, layers, final norm, logits.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "runtime/attention.h"
#include "runtime/compute.h"
#include "runtime/engine.h"
#include "runtime/gpu/forward.h"
#include "runtime/kv_cache.h"
#include "runtime/model.h"
#include "runtime/moe.h"

namespace duet {

// Rows of logits computed at once: few enough that a large vocabulary stays in a few MiB.
inline constexpr size_t kLogitRows = 32;

// What a test may watch. Either may be null.
struct DecoderProbe {
  // After the embedding (layer -1) and after each layer: [n_tokens, n_embd], before the final norm.
  std::function<void(int layer, std::span<const float> hidden)> hidden;
  // Experts of each token, best first, [n_tokens, n_expert_used], and their weights (none where a card's router chose).
  std::function<void(int layer, std::span<const int32_t> experts, std::span<const float> weights)> routing;
};

// Consecutive tokens of one sequence at positions [first, first + n). Positions before must be in
// the cache; theirs are stored.
struct TokenRun {
  std::span<const Token> tokens;
  size_t first;
  KvCache* kv;
  gpu::Cache* on_card = nullptr;  // where a card computes, instead
  size_t n_outputs = kAllOutputs;  // last tokens, of which logits or hidden states will be asked for
};

// With a card it computes the layers, but for experts that are the CPU's. Owns all scratch, allocated on construction. One thread at a time. The model must outlive it.
class Decoder {
 public:
  Decoder(const Model& model, const Compute& compute, size_t n_ctx, size_t n_batch, ExpertSource* source = nullptr,
          std::unique_ptr<gpu::Forward> card = nullptr);

  // Evaluates 1..n_batch valid tokens in all, of one sequence or of several, none of them twice: rows of
  // the chunk, run after run. What the rows of a sequence become does not depend on the others, to the
  // bit, up to ModelInfo::exact_batch rows. Rows without outputs end with the last layer's keys and values: nothing reads
  // what else it would make of them. n_next: tokens of the chunk that will follow at once.
  // Error(cancelled) between layers.
  void forward(std::span<const TokenRun> runs, const std::atomic<bool>* cancel = nullptr, size_t n_next = 0);
  void forward(std::span<const Token> tokens, size_t first, KvCache& kv, const std::atomic<bool>* cancel = nullptr, size_t n_next = 0);
  // Each call is one team of threads (base/parallel.h); inside with_team() they share one.
  template <class Body>
  void with_team(const Body& body) const {
    compute_.team(body);
  }
  // Logits of rows [row, row + n_rows) of the last forward(), all with outputs -> out [n_rows, n_vocab].
  void logits(size_t row, size_t n_rows, float* out);
  // The same for any rows, at most n_batch.
  void logits(std::span<const size_t> rows, float* out);
  // Their hidden states after the final norm, what logits are made from -> out [rows.size(), n_embd].
  void hidden(std::span<const size_t> rows, float* out);

  size_t n_batch() const { return n_batch_; }
  bool on_card() const { return card_ != nullptr; }
  void set_probe(DecoderProbe probe) { probe_ = std::move(probe); }
  // Bytes of scratch of such a decoder, about.
  static uint64_t bytes_needed(const HParams& hparams, int n_threads, size_t n_ctx, size_t n_batch);

 private:
  void evaluate(const std::atomic<bool>* cancel, size_t n_next);
  void evaluate_on_card(const std::atomic<bool>* cancel, size_t n_next);
  void embed(float* rows);
  void choose_outputs(std::span<const TokenRun> runs);
  void attend(size_t layer_index);
  void keep_outputs();
  size_t place_of(size_t row) const;
  void multiply_output(size_t n_rows, float* out);

  const Model* model_;
  AlignedArray<float> panels_;    // Compute::panels
  Compute compute_;
  ExpertSource* source_;          // null: all experts are in memory
  size_t n_batch_, n_embd_, n_ = 0;
  std::vector<Token> tokens_;     // of the chunk
  std::vector<KvRun> runs_, output_runs_;  // all rows; those with outputs
  std::vector<size_t> outputs_;   // rows with outputs, which end as the first of residual_
  std::vector<gpu::CardRun> card_runs_;
  AlignedArray<float> residual_;  // [n_batch, n_embd]
  Activations input_;             // [n_batch, n_embd]
  Attention attention_;
  Moe moe_;
  MatmulQueue queue_{1};
  DecoderProbe probe_;
  std::unique_ptr<gpu::Forward> card_;
};

}  // namespace duet
