// Second moments of the inputs of one matrix, and what its rows should become.
#pragma once

#include <cstddef>
#include <optional>
#include <random>
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
//
// Where H is kept in blocks of columns, each block makes up for r as if it were alone: together they
// would do it as often as there are blocks that know of it. Some tokens are therefore kept in all
// columns; they say which part of the blocks' common change serves best.
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
  // Of the tokens that a matrix in several blocks keeps.
  static size_t sample_bytes(size_t n_cols, size_t block_cols, size_t n_out);

 private:
  struct Half {
    std::vector<double> d;  // in blocks of columns, as InputMetric takes them
    std::vector<double> m;  // [n_out, n_cols]
  };
  // What one half asks of rows: their side w D + M, and the change, that times H^-1.
  struct Wish {
    std::vector<float> side, change;  // [n_rows, n_cols]
  };
  // Some tokens, any with the same chance: x, x0 - x [n_cols, kSampleTokens] and r [n_out, kSampleTokens],
  // 0 where there are fewer. Empty when all columns are one block.
  struct Sample {
    std::vector<float> x, lost, behind;
    std::mt19937_64 random{1};
  };
  void sample(const float* x, const float* x0, const float* r, size_t n);
  void keep(size_t slot, const float* x, const float* x0, const float* r);
  double useful_part(const InputMetric& metric, const std::vector<float>& w, const std::vector<float>& change, int n_threads) const;
  void add_half(const LayerEval& eval, Half& half, const float* x, const float* x0, const float* r,
                size_t n) const;
  // Of rows from `row` on, w [n_rows, n_cols]; d: D in the metric's units; scale: of sums to them.
  Wish wish(const InputMetric& metric, const std::vector<float>& d, const std::vector<double>& m,
            double scale, size_t row, size_t n_rows, const float* w) const;
  double mean_diagonal() const;

  size_t n_cols_, block_cols_, n_out_, n_tokens_ = 0;
  std::vector<double> h_;
  Half halves_[2];
  Sample sample_;
  std::optional<InputMetric> metric_;
};

}  // namespace duet
