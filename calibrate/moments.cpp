#include "calibrate/moments.h"

#include <algorithm>

#include "base/parallel.h"

namespace duet {
namespace {

// Added to the diagonal in parts of its mean. Measured on the demo model; more where there are few
// tokens, whose moments say little about others.
constexpr double kDamping = 0.05;

// Columns [first, first + width) of rows [n, cols].
std::vector<float> columns(const float* x, size_t n, size_t cols, size_t first, size_t width) {
  std::vector<float> out(n * width);
  for (size_t t = 0; t < n; ++t) std::copy_n(x + t * cols + first, width, out.data() + t * width);
  return out;
}

}  // namespace

Moments::Moments(size_t n_cols, size_t block_cols, size_t n_out)
    : n_cols_(n_cols),
      block_cols_(std::min(n_cols, block_cols)),
      n_out_(n_out),
      h_(InputMetric::n_floats(n_cols, block_cols_)),
      d_(h_.size()),
      m_(n_out * n_cols) {}

void Moments::add(const LayerEval& eval, const float* x, const float* x0, const float* r,
                  size_t n) {
  n_tokens_ += n;
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    const std::vector<float> part = columns(x, n, n_cols_, first, width);
    std::vector<float> change = columns(x0, n, n_cols_, first, width);
    for (size_t i = 0; i < change.size(); ++i) change[i] -= part[i];
    eval.add_moments(part.data(), width, part.data(), width, n, h_.data() + at);
    eval.add_moments(change.data(), width, part.data(), width, n, d_.data() + at);
    at += width * width;
  }
  if (r != nullptr) eval.add_moments(r, n_out_, x, n_cols_, n, m_.data());
}

InputMetric Moments::metric(int n_threads) const {
  const double few =
      static_cast<double>(n_cols_) / static_cast<double>(std::max<size_t>(n_tokens_, 1));
  return InputMetric(n_cols_, block_cols_, h_, kDamping * (1 + few), n_threads);
}

double Moments::mean_diagonal() const {
  double trace = 0;
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    for (size_t i = 0; i < width; ++i) trace += h_[at + i * width + i];
    at += width * width;
  }
  return trace / static_cast<double>(n_cols_);
}

void Moments::correct(const InputMetric& metric, std::vector<float>& w, int n_threads) const {
  if (!metric.usable()) return;
  // In the metric's units: it has a mean diagonal of 1.
  const double scale = 1 / mean_diagonal();
  std::vector<float> d(d_.size());
  for (size_t i = 0; i < d.size(); ++i) d[i] = static_cast<float>(d_[i] * scale);
  parallel_for(n_threads, w.size() / n_cols_, 4, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row)
      correct_row(metric, d, row, w.data() + row * n_cols_);
  });
}

void Moments::correct_row(const InputMetric& metric, const std::vector<float>& d, size_t row,
                          float* w) const {
  std::vector<float> change(n_cols_);
  if (n_out_ > 0) {
    const double scale = 1 / mean_diagonal();
    for (size_t c = 0; c < n_cols_; ++c)
      change[c] = static_cast<float>(m_[row * n_cols_ + c] * scale);
  }
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    for (size_t i = 0; i < width; ++i, at += width)
      for (size_t k = 0; k < width; ++k) change[first + k] += w[first + i] * d[at + k];
  }
  metric.solve(change);
  for (size_t c = 0; c < n_cols_; ++c) w[c] += change[c];
}

}  // namespace duet
