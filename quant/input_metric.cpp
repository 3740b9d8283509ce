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
// was. From the last column to the first, some at a time, so that rows above are read once for all of
// them. False when h is not positive definite.
bool factorize_block(double* h, size_t n, int n_threads) {
  constexpr size_t kColumns = 16;
  const auto element = [&](size_t i, size_t j) {
    double *row_i = h + i * n, *row_j = h + j * n;
    row_i[j] = (row_i[j] - dot(row_i + j + 1, row_j + j + 1, n - j - 1)) / row_j[j];
  };
  for (size_t end = n; end > 0;) {
    const size_t begin = (end - 1) / kColumns * kColumns;
    for (size_t j = end; j-- > begin;) {
      double* row = h + j * n;
      const double rest = row[j] - dot(row + j + 1, row + j + 1, n - j - 1);
      if (!(rest > 0)) return false;
      row[j] = std::sqrt(rest);
      for (size_t i = begin; i < j; ++i) element(i, j);
    }
    parallel_for(begin * (n - begin) > 4096 ? n_threads : 1, begin, 16, [&](size_t first, size_t last) {
      for (size_t i = first; i < last; ++i)
        for (size_t j = end; j-- > begin;) element(i, j);
    });
    end = begin;
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
                         double damping, int n_threads, const FitOps& ops)
    : n_cols_(n_cols), block_cols_(std::min(n_cols, block_cols)), ops_(ops) {
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
      for (size_t k = i; k < n; ++k)
        factor_[at + i * n + k] = factor_[at + k * n + i] = static_cast<float>(h[i * n + k]);
    }
  }
  return true;
}

void InputMetric::solve(float* x, size_t n_rows) const {
  for (size_t first = 0; first < n_cols_; first = block_end(first)) solve_block(x + first, n_rows, first);
}

// x = y V^T is solved from the last column, y = z V from the first: some columns at a time, then what they
// leave to all that come after.
void InputMetric::solve_block(float* x, size_t n_rows, size_t first) const {
  constexpr size_t kTile = 32;
  const size_t n = block_end(first) - first;
  std::vector<float> minus(n_rows * kTile);
  // Columns [from, to) less what the finished columns [begin, end) account for.
  const auto push = [&](size_t begin, size_t end, size_t from, size_t to) {
    if (from >= to) return;
    for (size_t r = 0; r < n_rows; ++r)
      for (size_t j = begin; j < end; ++j) minus[r * kTile + j - begin] = -x[r * n_cols_ + j];
    ops_.add_products({minus.data(), kTile, n_rows, factor_row(first + begin) + from, n, end - begin, x + from, n_cols_, to - from});
  };
  for (size_t end = n; end > 0;) {
    const size_t begin = (end - 1) / kTile * kTile;
    for (size_t j = end; j-- > begin;) {
      const float* row = factor_row(first + j);
      for (size_t r = 0; r < n_rows; ++r) {
        float* v = x + r * n_cols_;
        v[j] /= row[j];
        for (size_t k = begin; k < j; ++k) v[k] -= v[j] * row[k];
      }
    }
    push(begin, end, 0, begin);
    end = begin;
  }
  for (size_t begin = 0; begin < n; begin += kTile) {
    const size_t end = std::min(begin + kTile, n);
    for (size_t j = begin; j < end; ++j) {
      const float* row = factor_row(first + j);
      for (size_t r = 0; r < n_rows; ++r) {
        float* v = x + r * n_cols_;
        v[j] /= row[j];
        for (size_t k = j + 1; k < end; ++k) v[k] -= v[j] * row[k];
      }
    }
    push(begin, end, end, n);
  }
}

}  // namespace duet
