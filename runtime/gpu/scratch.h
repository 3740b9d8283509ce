// Working memory on the card of one chunk of tokens, and its size before there is any.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "formats/schema.h"
#include "runtime/gpu/device.h"

namespace duet::gpu {

// Everything begins at a multiple of this.
inline constexpr size_t kAlignment = 256;
inline size_t aligned(size_t n_bytes) { return (n_bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Rows of logits computed at once.
inline constexpr size_t kLogitRowsOnCard = 32;

inline size_t expert_count(const HParams& h) { return std::max<size_t>(h.n_expert, 1); }
inline size_t used_count(const HParams& h) { return h.n_expert > 0 ? h.n_expert_used : 1; }

// Device pointers; rows of up to n_batch tokens, slots: pairs of a token and an expert.
struct Scratch {
  float *residual, *normed, *q, *k, *v, *mixed;  // [n_batch, ...]; of the second at least kLogitRowsOnCard
  float* cos_sin;                                // [n_batch, n_rot]
  float *router, *weights;                       // [n_batch, n_expert], [n_layer, n_batch, n_used]
  float *gate, *up, *out;                        // [slots, n_ff], [slots, n_ff], [slots, n_embd]
  float *picked, *logits;                        // [kLogitRowsOnCard, n_embd], [kLogitRowsOnCard, n_vocab]
  int32_t *chosen, *slot_of, *token_of, *first, *every;  // [n_layer, n_batch, n_used], [slots], [slots], [n_expert + 1], [slots]: 0, 1, ...
  ActRows input, heads, hidden;                  // of normed, mixed, gate
  KvRun* runs;                                   // [n_layer, n_batch]
  std::byte* attention;

  // Calls take(pointer, number of elements) for each; attention_bytes: Device::attention_scratch_bytes.
  template <class Take>
  void lay_out(const HParams& h, size_t n_batch, size_t attention_bytes, const Take& take) {
    const size_t slots = n_batch * used_count(h), heads_dim = size_t{h.n_head} * h.head_dim, kv_dim = size_t{h.n_head_kv} * h.head_dim;
    take(residual, n_batch * h.n_embd);
    take(normed, std::max(n_batch, kLogitRowsOnCard) * h.n_embd);
    for (float** rows : {&q, &mixed}) take(*rows, n_batch * heads_dim);
    for (float** rows : {&k, &v}) take(*rows, n_batch * kv_dim);
    take(cos_sin, n_batch * h.n_rot);
    take(router, n_batch * expert_count(h));
    take(weights, h.n_layer * slots);
    for (float** rows : {&gate, &up}) take(*rows, slots * h.n_ff);
    take(out, slots * h.n_embd);
    take(picked, kLogitRowsOnCard * h.n_embd);
    take(logits, kLogitRowsOnCard * h.n_vocab);
    take(chosen, h.n_layer * slots);
    for (int32_t** numbers : {&slot_of, &token_of, &every}) take(*numbers, slots);
    take(first, expert_count(h) + 1);
    acts(input, std::max(n_batch, kLogitRowsOnCard), h.n_embd, take);
    acts(heads, n_batch, heads_dim, take);
    acts(hidden, slots, h.n_ff, take);
    take(runs, h.n_layer * n_batch);
    take(attention, attention_bytes);
  }

 private:
  template <class Take>
  static void acts(ActRows& rows, size_t n, size_t cols, const Take& take) {
    if (cols % 32 == 0) take(rows.act32, n * act_row_bytes(ActFormat::act32, cols));
    if (cols % 256 == 0) take(rows.act256, n * act_row_bytes(ActFormat::act256, cols));
  }
};

}  // namespace duet::gpu
