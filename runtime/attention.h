// Grouped-query attention with rotary positions over a KV cache.
//
//   q, k, v = Wq x, Wk x, Wv x; q and k rotated at their positions; k, v stored
//   out = softmax(q k^T / sqrt(head_dim)) v over the visible positions; residual += Wo out
//
// Query i sees key j when j <= i and, with a sliding window, i - j < window.
#pragma once

#include <cstddef>

#include "runtime/compute.h"
#include "runtime/kv_cache.h"
#include "runtime/model.h"

namespace duet {

// Scratch for chunks of up to n_batch tokens in a context of n_ctx. One thread at a time.
class Attention {
 public:
  Attention(const Model& model, const Compute& compute, size_t n_ctx, size_t n_batch);

  // Sets the positions [first, first + n) of the chunk that the next forward() calls evaluate.
  void begin(size_t first, size_t n);
  // residual [n, n_embd] += attention(rms_norm(residual)); `input` is scratch [n_batch, n_embd].
  void forward(size_t layer_index, KvCache& kv, Activations& input, float* residual);

  size_t size_bytes() const;
  static uint64_t bytes_needed(const HParams& hparams, int n_threads, size_t n_ctx, size_t n_batch);

 private:
  void rotate_and_store(size_t layer_index, KvCache& kv);
  void attend(size_t layer_index, const KvCache& kv);
  void attend_tile(size_t layer_index, const KvCache& kv, size_t worker, size_t head_kv, size_t tile);
  void score(const float* queries, size_t n_rows, KvView keys, size_t n_keys, float* scores, float* panel) const;
  void mix(const float* scores, size_t n_rows, KvView values, size_t n_keys, float* mixed, float* panel) const;
  bool use_gemm(size_t n_rows) const;
  void mask_and_softmax(float* scores, size_t n_keys, size_t key_begin, size_t pos) const;
  size_t first_visible(size_t pos) const { return window_ > 0 && pos + 1 > window_ ? pos + 1 - window_ : 0; }

  const Model* model_;
  Compute compute_;
  size_t n_ctx_, head_dim_, n_head_, n_head_kv_, n_rot_, window_;
  size_t tile_tokens_;      // queries of one task
  size_t scratch_floats_;   // of one worker
  size_t first_ = 0, n_ = 0;
  std::vector<float> speeds_;        // [n_rot / 2] radians per position
  AlignedArray<float> cos_sin_;      // [n_batch, n_rot]
  AlignedArray<float> q_, k_, v_;    // [n_batch, n_head or n_head_kv * head_dim]
  AlignedArray<float> projected_;    // [n_batch, n_embd]
  AlignedArray<float> scratch_;      // [n_threads, scratch_floats]
  Activations out_;                  // [n_batch, n_head * head_dim]
  MatmulQueue queue_{3};
};

}  // namespace duet
