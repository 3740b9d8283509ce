// Grouped-query attention with rotary positions over a KV cache.
//
//   q, k, v = Wq x, Wk x, Wv x; q and k rotated at their positions; k, v stored
//   out = softmax(q k^T / sqrt(head_dim)) v over the visible positions; residual += Wo out
//
// Query i sees key j when j <= i and, with a sliding window, i - j < window.
//
// The result of a query depends on its position and the keys alone, not on the chunk, the number of
// threads or its neighbours, to the bit: keys are cut at fixed positions into spans, these into
// segments (kernels.h), and partial results are merged in the order of positions, whether one
// thread evaluates all spans of a query or several do.
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
  // What one task evaluates: tokens [t_begin, t_end) of the chunk in the heads of one KV head.
  struct Tile {
    size_t head_kv, t_begin, t_end;
  };
  struct Spans {
    size_t begin, end;
  };
  void rotate_and_store(size_t layer_index, KvCache& kv);
  void attend(size_t layer_index, const KvCache& kv);
  void attend_whole(const KvView& kv, size_t worker, const Tile& tile);
  void attend_split(size_t layer_index, const KvCache& kv, Spans spans, int n_threads);
  void attend_span(const KvView& kv, const Tile& tile, size_t span, float* scratch, float* out) const;
  void finish_row(const float* row, size_t token, size_t head);
  Spans spans_seen(size_t t_begin, size_t t_end) const;
  float* partial(size_t span, size_t head_kv, size_t token) const;

  const Model* model_;
  Compute compute_;
  size_t head_dim_, n_head_, n_head_kv_, n_rot_, window_;
  size_t group_, row_floats_;
  size_t max_tile_tokens_;
  size_t scratch_floats_;   // of one worker
  size_t first_ = 0, n_ = 0;
  std::vector<float> speeds_;        // [n_rot / 2] radians per position
  AlignedArray<float> cos_sin_;      // [n_batch, n_rot]
  AlignedArray<float> q_, k_, v_;    // [n_batch, n_head or n_head_kv * head_dim]
  AlignedArray<float> projected_;    // [n_batch, n_embd]
  AlignedArray<float> scratch_;      // [n_threads, scratch_floats]
  AlignedArray<float> partials_;     // [n_spans, n_head_kv, kSplitTokens * group, row_floats]
  Activations out_;                  // [n_batch, n_head * head_dim]
  MatmulQueue queue_{3};
};

}  // namespace duet
