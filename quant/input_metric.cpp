#include "quant/input_metric.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/parallel.h"

namespace duet {
namespace {

// Several chains, so that additions do not wait for each other.
template <class T>
T dot(const T* a, const T* b, size_t n) {
  constexpr size_t kChains = 16;
  T s[kChains] = {};
  size_t i = 0;
  for (; i + kChains <= n; i += kChains)
    for (size_t l = 0; l < kChains; ++l) s[l] += a[i + l] * b[i + l];
  for (; i < n; ++i) s[0] += a[i] * b[i];
  for (size_t half = kChains / 2; half > 0; half /= 2)
    for (size_t l = 0; l < half; ++l) s[l] += s[l + half];
  return s[0];
}

// h [n, n] -> V in place, upper triangular with h = V V^T; what is below the diagonal is left as it
// was. From the last column to the first. False when h is not positive definite.
bool factorize_block(double* h, size_t n, int n_threads) {
  for (size_t j = n; j-- > 0;) {
    double* row_j = h + j * n;
    const double rest = row_j[j] - dot(row_j + j + 1, row_j + j + 1, n - j - 1);
    if (!(rest > 0)) return false;
    const double pivot = row_j[j] = std::sqrt(rest);
    parallel_for(j * (n - j) > 65536 ? n_threads : 1, j, 64, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        double* row_i = h + i * n;
        row_i[j] = (row_i[j] - dot(row_i + j + 1, row_j + j + 1, n - j - 1)) / pivot;
      }
    });
  }
  return true;
}

}  // namespace

size_t InputMetric::n_floats(size_t n_cols, size_t block_cols) {
  const size_t b = std::min(n_cols, block_cols), rest = n_cols % b;
  return n_cols / b * b * b + rest * rest;
}

size_t InputMetric::block_end(size_t c) const {
  return std::min(block_begin(c) + block_cols_, n_cols_);
}

InputMetric::InputMetric(size_t n_cols, size_t block_cols, std::span<const double> moments,
                         double damping, int n_threads)
    : n_cols_(n_cols), block_cols_(std::min(n_cols, block_cols)) {
  DUET_ASSERT(n_cols > 0 && block_cols > 0 && moments.size() == n_floats(n_cols, block_cols_));
  moments_.resize(moments.size());
  factor_.resize(moments.size());
  size_t at = 0;
  for (size_t c = 0; c < n_cols; ++c) {
    rows_.push_back({moments_.data() + at, factor_.data() + at});
    at += block_end(c) - block_begin(c);
  }
  usable_ = load(moments, damping) && factorize(n_threads);
  if (usable_) return;
  std::fill(moments_.begin(), moments_.end(), 0.0f);
  std::fill(factor_.begin(), factor_.end(), 0.0f);
  for (size_t c = 0; c < n_cols; ++c) {
    const size_t diagonal =
        static_cast<size_t>(rows_[c].moments - moments_.data()) + c - block_begin(c);
    moments_[diagonal] = factor_[diagonal] = 1.0f;
  }
}

// Columns that were never used keep the damping alone: their errors count little and spread
// nowhere.
bool InputMetric::load(std::span<const double> moments, double damping) {
  const auto diagonal = [&](size_t c) {
    return rows_[c].moments - moments_.data() + static_cast<ptrdiff_t>(c - block_begin(c));
  };
  double sum = 0;
  for (size_t c = 0; c < n_cols_; ++c) {
    const double d = moments[static_cast<size_t>(diagonal(c))];
    if (!(d >= 0)) return false;
    sum += d;
  }
  const double mean = sum / static_cast<double>(n_cols_);
  if (!std::isfinite(mean) || mean < 1e-300) return false;
  for (size_t i = 0; i < moments.size(); ++i) {
    const double v = moments[i] / mean;
    if (!std::isfinite(v) || std::fabs(v) > 1e30) return false;
    moments_[i] = static_cast<float>(v);
  }
  for (size_t c = 0; c < n_cols_; ++c)
    moments_[static_cast<size_t>(diagonal(c))] += static_cast<float>(damping);
  return true;
}

// More damping, a decade at a time, where rounding has left a matrix that is not positive.
bool InputMetric::factorize(int n_threads) {
  for (size_t first = 0; first < n_cols_; first = block_end(first)) {
    const size_t n = block_end(first) - first,
                 at = static_cast<size_t>(rows_[first].moments - moments_.data());
    std::vector<double> h(n * n);
    double extra = 0;
    for (int attempt = 0;; ++attempt) {
      for (size_t i = 0; i < n * n; ++i) h[i] = double{moments_[at + i]};
      for (size_t i = 0; i < n; ++i) h[i * n + i] += extra;
      if (factorize_block(h.data(), n, n_threads)) break;
      if (attempt == 6) return false;
      extra = extra > 0 ? 10 * extra : 1e-5;
    }
    for (size_t i = 0; i < n; ++i) {
      moments_[at + i * n + i] += static_cast<float>(extra);
      for (size_t k = i; k < n; ++k) factor_[at + i * n + k] = static_cast<float>(h[i * n + k]);
    }
  }
  return true;
}

// z V = y is solved from the first column, then y V^T = x, which comes first, from the last.
void InputMetric::solve(std::span<float> x) const {
  DUET_ASSERT(x.size() == n_cols_);
  for (size_t first = 0; first < n_cols_; first = block_end(first)) {
    const size_t n = block_end(first) - first;
    float* v = x.data() + first;
    for (size_t j = n; j-- > 0;) {  // x_j = sum over k >= j of y_k V_jk
      const float* row = factor_row(first + j);
      v[j] = (v[j] - dot(v + j + 1, row + j + 1, n - j - 1)) / row[j];
    }
    for (size_t j = 0; j < n; ++j) {  // y_k = sum over j <= k of z_j V_jk
      const float* row = factor_row(first + j);
      const float z = v[j] /= row[j];
      for (size_t k = j + 1; k < n; ++k) v[k] -= z * row[k];
    }
  }
}

}  // namespace duet
