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

// Consecutive positions [first, first + n) of one sequence.
struct KvRun {
  KvCache* kv;
  size_t first, n;
};

// Radians per position of each pair, [n_rot / 2], and for a position their cosines and sines, in turns.
std::vector<float> rotation_speeds(const HParams& hparams, const std::vector<float>& factors);
void rotation_at(const std::vector<float>& speeds, size_t position, float* cos_sin);

// Scratch for chunks of up to n_batch tokens in a context of n_ctx. One thread at a time.
class Attention {
 public:
  // rope_factors: Model::rope_factors(). Both must outlive this.
  Attention(const HParams& hparams, const std::vector<float>& rope_factors, const Compute& compute, size_t n_ctx,
            size_t n_batch);

  // Sets the rows of the chunk that the next forward() calls evaluate: those of the runs, one after
  // the other, no sequence twice. Keys before a run must be in its cache; its own are stored.
  void begin(std::span<const KvRun> runs);
  // residual [n, n_embd] += attention(rms_norm(residual)); `input` is scratch [n_batch, n_embd].
  // kv_layer: the layer's place in the caches.
  void forward(const Layer& layer, size_t kv_layer, Activations& input, float* residual);
  // The same in two steps, where only some rows go on: keys and values of all rows; then, after a begin() of those
  // positions alone, their queries, residual [n, n_embd] being that of these rows.
  void store_keys(const Layer& layer, size_t kv_layer, Activations& input, const float* residual);
  void forward_queries(const Layer& layer, size_t kv_layer, Activations& input, float* residual);
  // Only up to the input of the output projection, head_rows().
  void attend(const Layer& layer, size_t kv_layer, Activations& input, const float* residual);
  const float* head_rows() { return out_.row(0); }  // [n, n_head * head_dim]

  size_t size_bytes() const;
  static uint64_t bytes_needed(const HParams& hparams, int n_threads, size_t n_ctx, size_t n_batch);

 private:
  // Rows [row, row + n) of the chunk.
  struct Run : KvRun {
    size_t row;
    size_t position(size_t t) const { return first + t - row; }  // of row t
  };
  // What one task evaluates: rows [t_begin, t_end) of a run in the heads of one KV head.
  struct Tile {
    const Run* run;
    size_t head_kv, t_begin, t_end;
  };
  struct Spans {
    size_t begin, end;
  };
  struct Parts {
    bool queries, keys;
  };
  void make_tiles();
  void project(const Layer& layer, size_t kv_layer, Activations& input, const float* residual, Parts parts);
  void rotate(float* rows, size_t n_heads, size_t t) const;
  void mix_values(const Layer& layer, size_t kv_layer);
  void add_output(const Layer& layer, float* residual);
  void attend_whole(const KvView& kv, size_t worker, const Tile& tile);
  void attend_split(size_t kv_layer, const Run& run, Spans spans, int n_threads);
  void attend_span(const KvView& kv, const Tile& tile, size_t span, float* scratch, float* out) const;
  void finish_row(const float* row, size_t token, size_t head);
  Spans spans_seen(const Run& run, size_t t_begin, size_t t_end) const;
  float* partial(size_t span, size_t head_kv, size_t token) const;

  const HParams* hparams_;
  Compute compute_;
  size_t head_dim_, n_head_, n_head_kv_, n_rot_, window_;
  size_t group_, row_floats_;
  size_t max_tile_tokens_;
  size_t scratch_floats_;   // of one worker
  size_t n_ = 0;                     // rows of the chunk
  uint64_t n_bytes_ = 0;             // touched by all queries, about
  std::vector<Run> runs_;
  std::vector<const Run*> run_of_;   // [n]
  std::vector<Tile> tiles_;          // of KV head 0, longest first
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
