// The feed-forward half of a layer: router, experts, weighted sum. A dense layer is one expert that
// every token uses with weight 1.
//
//   p = softmax(router x); the n_expert_used largest, renormalised to sum 1
//   residual += sum over chosen e of p_e * down_e(silu(gate_e x) * (up_e x))
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/compute.h"
#include "runtime/expert_source.h"
#include "runtime/model.h"

namespace duet {

// The n_used largest logits, lowest index first among equals, best first, and their weights.
void choose_experts(const float* logits, size_t n_expert, size_t n_used, int32_t* chosen, float* weights);

// The router's choice for rows x [n, n_embd], in float from floats, whatever the format of the experts: chosen, weights
// [n, n_expert_used]; without a router expert 0, weight 1. logits: scratch [n, n_expert].
void route(const Compute& compute, const HParams& hparams, const Layer& layer, const float* x, size_t n, float* logits,
           int32_t* chosen, float* weights);

// Scratch for chunks of up to n_batch tokens. One thread at a time.
class Moe {
 public:
  // source: where experts come from when they are not all in memory; null: from the model.
  Moe(const Model& model, const Compute& compute, size_t n_batch, ExpertSource* source = nullptr);

  // residual [n, n_embd] += experts(rms_norm(residual)); `input` is scratch [n_batch, n_embd].
  void forward(size_t layer_index, size_t n, Activations& input, float* residual);

  // Experts chosen in the last forward(), [n, n_expert_used], best first, and their weights.
  std::span<const int32_t> chosen() const { return {chosen_.data(), n_ * n_used_}; }
  std::span<const float> weights() const { return {weights_.data(), n_ * n_used_}; }

  static uint64_t bytes_needed(const HParams& hparams, size_t n_batch);

 private:
  // Rows of one expert among the gathered ones, at most kTokenBlock, and where the wave at hand keeps
  // its hidden rows.
  struct Segment {
    const Expert* expert;
    int32_t index;  // of the expert
    size_t first_slot, n, hidden_row;
  };
  void group();
  void gather(const Layer& layer, const Activations& input);
  void choose_block_size();
  void run_resident(const Layer& layer, const Activations& input);
  void run_streamed(size_t layer_index, const Activations& input, const float* residual);
  void guess_ahead(size_t layer_index, size_t reach, const float* residual);
  void add_to_waves(int32_t index, const Expert& expert, const Activations& input, bool arriving);
  void run_wave(const Activations& input, bool arriving);
  void make_hidden(const Activations& input, bool arriving);
  void make_inner(const Activations& input);
  Product hidden_product(const Weight& weight, const Activations& input, const Segment& block, float* y) const;
  const std::byte* gate_rows_after(size_t block_index, size_t first_row) const;
  void make_hidden_block(const Activations& input, size_t worker, size_t block_index, size_t first_row);
  void down(bool arriving);
  void combine(float* residual) const;
  void observe_inputs(Activations& input);
  void observe_hidden();
  void tell(TensorKind expert_kind, size_t expert, size_t first_slot, size_t n, const float* rows, size_t cols) const;
  size_t n_rows() const { return n_ * n_used_; }
  // Gathering costs a copy: not for one token, nor where every token goes the same way.
  bool gathers() const { return n_ > 1 && n_expert_ > 1; }

  const Model* model_;
  Compute compute_;
  ExpertSource* source_;
  size_t n_expert_, n_used_, n_embd_, n_ff_;
  size_t n_ = 0, layer_index_ = 0;  // of the chunk at hand
  std::vector<int32_t> chosen_;     // [n_batch, n_used]
  std::vector<float> weights_;      // [n_batch, n_used]
  std::vector<size_t> slot_;        // [n_batch, n_used] row among the gathered ones
  std::vector<size_t> first_slot_;  // [n_expert + 1]
  std::vector<int32_t> slot_expert_, slot_token_;  // [n_batch * n_used]
  std::vector<size_t> cursor_;      // [n_expert]
  AlignedArray<float> logits_;      // [n_batch, n_expert]
  AlignedArray<float> out_;         // [n_batch * n_used, n_embd]
  size_t block_size_ = 0;           // tokens of one task
  std::vector<Segment> wave_;       // what is computed at once
  size_t wave_rows_ = 0;
  std::vector<Segment> blocks_;     // the same in pieces of block_size_
  InnerProducts inner_;             // of gate and up of each block
  Activations gathered_;            // [n_batch * n_used, n_embd]
  Activations hidden_;              // [rows of a wave, n_ff]
  // Of the look-ahead, for short chunks.
  Activations next_input_;          // [n, n_embd]
  std::vector<int32_t> next_chosen_;
  std::vector<float> next_weights_;
  std::vector<float> likely_;       // [n_expert]
  std::vector<ExpertSource::Guess> guesses_;
  // For an observer: router weight by row, and the rows of an expert or the hidden rows of a wave in float.
  std::vector<float> slot_weight_;  // [n_batch * n_used]
  AlignedArray<float> observed_;
  MatmulQueue queue_;
};

}  // namespace duet
