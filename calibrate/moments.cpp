#include "calibrate/moments.h"

#include <algorithm>

#include "base/parallel.h"

namespace duet {
namespace {

// Added to the diagonal in parts of its mean; measured on the demo model. More where there are few
// tokens, whose moments say little about others.
constexpr double kDamping = 0.05;

// Columns [first, first + width) of rows [n, cols].
std::vector<float> columns(const float* x, size_t n, size_t cols, size_t first, size_t width) {
  std::vector<float> out(n * width);
  for (size_t t = 0; t < n; ++t) std::copy_n(x + t * cols + first, width, out.data() + t * width);
  return out;
}

double product(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

std::vector<float> scaled(const std::vector<double>& x, double by) {
  std::vector<float> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = static_cast<float>(x[i] * by);
  return out;
}

}  // namespace

Moments::Moments(size_t n_cols, size_t block_cols, size_t n_out)
    : n_cols_(n_cols),
      block_cols_(std::min(n_cols, block_cols)),
      n_out_(n_out),
      h_(InputMetric::n_floats(n_cols, block_cols_)) {
  for (Half& half : halves_) {
    half.d.resize(h_.size());
    half.m.resize(n_out * n_cols);
  }
}

void Moments::add(const LayerEval& eval, const float* x, const float* x0, const float* r,
                  size_t n) {
  n_tokens_ += n;
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    const std::vector<float> part = columns(x, n, n_cols_, first, width);
    eval.add_moments(part.data(), width, part.data(), width, n, h_.data() + at);
    at += width * width;
  }
  const size_t n_first = n / 2;
  add_half(eval, halves_[0], x, x0, r, n_first);
  add_half(eval, halves_[1], x + n_first * n_cols_, x0 + n_first * n_cols_,
           r != nullptr ? r + n_first * n_out_ : nullptr, n - n_first);
}

void Moments::add_half(const LayerEval& eval, Half& half, const float* x, const float* x0,
                       const float* r, size_t n) const {
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    const std::vector<float> part = columns(x, n, n_cols_, first, width);
    std::vector<float> lost = columns(x0, n, n_cols_, first, width);
    for (size_t i = 0; i < lost.size(); ++i) lost[i] -= part[i];
    eval.add_moments(lost.data(), width, part.data(), width, n, half.d.data() + at);
    at += width * width;
  }
  if (r != nullptr) eval.add_moments(r, n_out_, x, n_cols_, n, half.m.data());
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
  const double scale = 1 / mean_diagonal();  // to the metric's units
  const size_t n_rows = w.size() / n_cols_;
  const std::vector<float> d[] = {scaled(halves_[0].d, scale), scaled(halves_[1].d, scale)};
  std::vector<float> change(w.size());
  std::vector<double> common(n_rows), own(n_rows);
  parallel_for(n_threads, n_rows, 4, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      const float* values = w.data() + row * n_cols_;
      const Wish a = wish(metric, d[0], halves_[0].m, scale, row, values);
      const Wish b = wish(metric, d[1], halves_[1].m, scale, row, values);
      common[row] = 2 * product(a.side, b.change);
      own[row] = product(a.side, a.change) + product(b.side, b.change);
      for (size_t c = 0; c < n_cols_; ++c) change[row * n_cols_ + c] = a.change[c] + b.change[c];
    }
  });
  double all_common = 0, all_own = 0;
  for (size_t row = 0; row < n_rows; ++row) {
    all_common += common[row];
    all_own += own[row];
  }
  if (!(all_common > 0 && all_own > 0)) return;
  const double rho = std::min(all_common / all_own, 1.0);
  const auto share = static_cast<float>(2 * rho / (1 + rho));
  for (size_t i = 0; i < w.size(); ++i) w[i] += share * change[i];
}

Moments::Wish Moments::wish(const InputMetric& metric, const std::vector<float>& d,
                            const std::vector<double>& m, double scale, size_t row,
                            const float* w) const {
  Wish out;
  out.side.resize(n_cols_);
  for (size_t c = 0; n_out_ > 0 && c < n_cols_; ++c)
    out.side[c] = static_cast<float>(m[row * n_cols_ + c] * scale);
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    for (size_t i = 0; i < width; ++i, at += width)
      for (size_t k = 0; k < width; ++k) out.side[first + k] += w[first + i] * d[at + k];
  }
  out.change = out.side;
  metric.solve(out.change);
  return out;
}

}  // namespace duet
