// One layer evaluated piece by piece on rows given from outside, with weights given from outside:
// what calibration needs of the forward pass, by the same attention and kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/attention.h"
#include "runtime/compute.h"
#include "runtime/kv_cache.h"

namespace duet {

// Owns its scratch. One thread at a time. `hparams` and `rope_factors` must outlive it.
class LayerEval {
 public:
  // max_rows: of a sequence.
  LayerEval(const HParams& hparams, const std::vector<float>& rope_factors, int n_threads,
            size_t max_rows);

  // out [n, n_embd] = rms_norm(x) * weight
  void norm(const std::vector<float>& weight, const float* x, size_t n, float* out) const;
  // heads [n, n_head * head_dim]: what attention over this one sequence gives to the output
  // projection; n <= max_rows.
  void heads(const Layer& layer, const float* residual, size_t n, float* heads);
  // chosen, weights [n, n_expert_used]; a dense layer: its one expert, weight 1.
  void route(const Layer& layer, const float* normed, size_t n, int32_t* chosen,
             float* weights) const;
  // y [n, w.rows] = w x
  void multiply(const Weight& w, const float* x, size_t n, float* y) const;
  // hidden [n, n_ff] = silu(gate x) * (up x)
  void hidden(const Expert& expert, const float* x, size_t n, float* hidden) const;
  // sum [nx, ny] += the sum over n rows of x^T y
  void add_moments(const float* x, size_t nx, const float* y, size_t ny, size_t n,
                   double* sum) const;

  size_t n_used() const { return hparams_->n_expert > 0 ? hparams_->n_expert_used : 1; }
  int n_threads() const { return compute_.n_threads; }
  const FitOps& fit_ops() const { return compute_.kernels->fit; }

 private:
  static HParams one_layer(HParams hparams);

  const HParams* hparams_;
  HParams one_layer_;
  AlignedArray<float> panels_;
  Compute compute_;
  KvCache kv_;
  Activations input_;
  Attention attention_;
};

}  // namespace duet
