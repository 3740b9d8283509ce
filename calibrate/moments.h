// Second moments of the inputs of one matrix, and what its rows should become.
#pragma once

#include <cstddef>
#include <vector>

#include "quant/input_metric.h"
#include "runtime/layer_eval.h"

namespace duet {

// Sums over tokens, of rows already times their weight: H = x x^T of the inputs x that the encoded
// model gives, D = (x0 - x) x^T with the inputs x0 of the source model, and M = r x^T with what the
// output is to make up for beside. The row w that serves best in floating point, whose outputs for
// x are nearest to w x0 + r, is w + (w D + M_row) H^-1 (GPTAQ, arXiv 2504.02692, where r is 0).
class Moments {
 public:
  // n_out: rows of M; 0: there is no r.
  Moments(size_t n_cols, size_t block_cols, size_t n_out);

  // x, x0 [n, n_cols], r [n, n_out] or null
  void add(const LayerEval& eval, const float* x, const float* x0, const float* r, size_t n);
  InputMetric metric(int n_threads) const;
  // Moves w [n_rows, n_cols] to what serves best; metric: that of these moments.
  void correct(const InputMetric& metric, std::vector<float>& w, int n_threads) const;
  size_t n_tokens() const { return n_tokens_; }

 private:
  double mean_diagonal() const;
  void correct_row(const InputMetric& metric, const std::vector<float>& d, size_t row,
                   float* w) const;

  size_t n_cols_, block_cols_, n_out_, n_tokens_ = 0;
  std::vector<double> h_, d_;  // in blocks of columns, as InputMetric takes them
  std::vector<double> m_;      // [n_out, n_cols]
};

}  // namespace duet
