// Second moments of the inputs of one matrix, and what its rows should become.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "quant/input_metric.h"
#include "runtime/layer_eval.h"

namespace duet {

// Sums over tokens, of rows already times their weight: H = x x^T of the inputs x that the encoded
// model gives, D = (x0 - x) x^T with the inputs x0 of the source model, and M = r x^T with what the
// output is to make up for beside. The row w that serves best in floating point, whose outputs for
// x are nearest to w x0 + r, is w + (w D + M_row) H^-1 (GPTAQ, arXiv 2504.02692, where r is 0).
//
// From few tokens most of that change is chance. D and M are therefore kept for two halves of the
// tokens: where the changes that they ask for agree (in the metric H, over all rows) by rho of
// their size, 2 rho / (1 + rho) of the change is what to expect on other texts.
class Moments {
 public:
  // n_out: rows of M; 0: there is no r.
  Moments(size_t n_cols, size_t block_cols, size_t n_out);

  // x, x0 [n, n_cols], r [n, n_out] or null
  void add(const LayerEval& eval, const float* x, const float* x0, const float* r, size_t n);
  const InputMetric& metric(const LayerEval& eval);  // made when first asked for: nothing is added after that
  // Moves w [n_rows, n_cols] to what serves best; metric: that of these moments.
  void correct(const InputMetric& metric, std::vector<float>& w, int n_threads) const;
  size_t n_tokens() const { return n_tokens_; }

 private:
  struct Half {
    std::vector<double> d;  // in blocks of columns, as InputMetric takes them
    std::vector<double> m;  // [n_out, n_cols]
  };
  // What one half asks of rows: their side w D + M, and the change, that times H^-1.
  struct Wish {
    std::vector<float> side, change;  // [n_rows, n_cols]
  };
  void add_half(const LayerEval& eval, Half& half, const float* x, const float* x0, const float* r,
                size_t n) const;
  // Of rows from `row` on, w [n_rows, n_cols]; d: D in the metric's units; scale: of sums to them.
  Wish wish(const InputMetric& metric, const std::vector<float>& d, const std::vector<double>& m,
            double scale, size_t row, size_t n_rows, const float* w) const;
  double mean_diagonal() const;

  size_t n_cols_, block_cols_, n_out_, n_tokens_ = 0;
  std::vector<double> h_;
  Half halves_[2];
  std::optional<InputMetric> metric_;
};

}  // namespace duet
