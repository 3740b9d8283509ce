// The feed-forward half of a layer: router, experts, weighted sum. A dense layer is one expert that
// every token uses with weight 1.
//
//   p = softmax(router x); the n_expert_used largest, renormalised to sum 1
//   residual += sum over chosen e of p_e * down_e(silu(gate_e x) * (up_e x))
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/compute.h"
#include "runtime/model.h"

namespace duet {

// Scratch for chunks of up to n_batch tokens. One thread at a time.
class Moe {
 public:
  Moe(const Model& model, const Compute& compute, size_t n_batch);

  // residual [n, n_embd] += experts(rms_norm(residual)); `input` is scratch [n_batch, n_embd].
  void forward(size_t layer_index, size_t n, Activations& input, float* residual);

  // Experts chosen in the last forward(), [n, n_expert_used], best first, and their weights.
  std::span<const int32_t> chosen() const { return {chosen_.data(), n_ * n_used_}; }
  std::span<const float> weights() const { return {weights_.data(), n_ * n_used_}; }

  static uint64_t bytes_needed(const HParams& hparams, size_t n_batch);

 private:
  struct TokenBlock {
    size_t expert, first_slot, n;
  };
  void route(const Layer& layer, Activations& input);
  void choose(const float* logits, int32_t* chosen, float* weights) const;
  void group();
  void gather(const Layer& layer, const Activations& input);
  void make_hidden(const Layer& layer, const Activations& input);
  void split_tokens();
  void make_hidden_block(const Layer& layer, const Activations& input, size_t worker, const TokenBlock& block, size_t first_row);
  void down(const Layer& layer);
  void combine(float* residual) const;
  size_t n_rows() const { return n_ * n_used_; }
  // Gathering costs a copy: not for one token, nor where every token goes the same way.
  bool gathers() const { return n_ > 1 && n_expert_ > 1; }

  const Model* model_;
  Compute compute_;
  size_t n_expert_, n_used_, n_embd_, n_ff_;
  size_t n_ = 0;
  std::vector<int32_t> chosen_;     // [n_batch, n_used]
  std::vector<float> weights_;      // [n_batch, n_used]
  std::vector<size_t> slot_;        // [n_batch, n_used] row among the gathered ones
  std::vector<size_t> first_slot_;  // [n_expert + 1]
  std::vector<int32_t> slot_expert_, slot_token_;  // [n_batch * n_used]
  std::vector<size_t> cursor_;      // [n_expert]
  AlignedArray<float> logits_;      // [n_batch, n_expert]
  AlignedArray<float> out_;         // [n_batch * n_used, n_embd]
  std::vector<TokenBlock> blocks_;
  Activations gathered_;            // [n_batch * n_used, n_embd]
  Activations hidden_;              // [n_batch * n_used, n_ff]
  MatmulQueue queue_;
};

}  // namespace duet
