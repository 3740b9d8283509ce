// How much errors in the weights of a matrix matter, given the inputs it multiplies.
//
// Inputs x with moments H = sum of w x x^T make a row's error e cost e H e^T. With H = V V^T, V
// upper triangular, that is the sum over columns k of (sum over j <= k of e_j V_jk)^2: each column
// can make up for the errors of those before it, and V_kk^2 (H conditioned on the later columns) is
// what an error costs that later columns make up for as well as they can. This is the triangular
// factor of GPTQ (arXiv 2210.17323) and LDLQ (arXiv 2307.13304) without an inverse.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "quant/fit_ops.h"

namespace duet {

// Moments and factor, damped and scaled so that the mean of the diagonal is 1. Block-diagonal where
// they were collected in blocks: n_cols^2 floats are too many for the widest matrices.
class InputMetric {
 public:
  // moments: for every block of `block_cols` columns (the last may be narrower) its square, one
  // after the other, symmetric; n_cols when block_cols >= n_cols. Of those that are no moments (not
  // finite, all zero, a diagonal below zero) nothing is used: the identity, usable() false.
  // damping: added to the diagonal, in parts of its mean; > 0. ops: this processor's.
  InputMetric(size_t n_cols, size_t block_cols, std::span<const double> moments, double damping,
              int n_threads, const FitOps& ops = kPlainFitOps);

  size_t n_cols() const { return n_cols_; }
  size_t block_cols() const { return block_cols_; }
  bool usable() const { return usable_; }
  // Block of column c: its first column and width.
  size_t block_begin(size_t c) const { return c / block_cols_ * block_cols_; }
  size_t block_end(size_t c) const;
  // Row c within its block: element [k - block_begin(c)] for column k.
  const float* moments_row(size_t c) const { return rows_[c].moments; }
  const float* factor_row(size_t c) const { return rows_[c].factor; }  // before column c: of V^T
  // Floats of all blocks.
  static size_t n_floats(size_t n_cols, size_t block_cols);

  const FitOps& ops() const { return ops_; }

  // Solves z H = x for rows [n_rows, n_cols], in place: z = x H^-1. Within blocks.
  void solve(float* x, size_t n_rows) const;

 private:
  struct Row {
    const float *moments, *factor;
  };
  bool load(std::span<const double> moments, double damping);
  bool factorize(int n_threads);
  void solve_block(float* x, size_t n_rows, size_t first) const;

  size_t n_cols_, block_cols_;
  const FitOps& ops_;
  bool usable_ = true;
  std::vector<float> moments_, factor_;
  std::vector<Row> rows_;
};

}  // namespace duet
