#include "calibrate/moments.h"

#include <algorithm>
#include <numeric>

#include "base/parallel.h"

namespace duet {
namespace {

// Added to the diagonal in parts of its mean; measured on the demo model. More where there are few
// tokens, whose moments say little about others.
constexpr double kDamping = 0.05;

// Rows that go through the moments together, so that these are read once for all of them.
constexpr size_t kRowBatch = 16;

// Tokens kept in all columns of a matrix in several blocks: all that one factor is to be read off.
constexpr size_t kSampleTokens = 512;

// Columns [first, first + width) of rows [n, cols].
std::vector<float> columns(const float* x, size_t n, size_t cols, size_t first, size_t width) {
  std::vector<float> out(n * width);
  for (size_t t = 0; t < n; ++t) std::copy_n(x + t * cols + first, width, out.data() + t * width);
  return out;
}

double product(const float* a, const float* b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += double{a[i]} * double{b[i]};
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
  if (block_cols_ == n_cols) return;
  sample_.x.resize(n_cols * kSampleTokens);
  sample_.lost.resize(n_cols * kSampleTokens);
  sample_.behind.resize(n_out * kSampleTokens);
}

size_t Moments::sample_bytes(size_t n_cols, size_t block_cols, size_t n_out) {
  return n_cols > block_cols ? (2 * n_cols + n_out) * kSampleTokens * sizeof(float) : 0;
}

// Reservoir sampling (Vitter 1985, algorithm R).
void Moments::sample(const float* x, const float* x0, const float* r, size_t n) {
  if (sample_.x.empty()) return;
  for (size_t t = 0; t < n; ++t) {
    const size_t seen = n_tokens_ + t, slot = seen < kSampleTokens ? seen : sample_.random() % (seen + 1);
    if (slot < kSampleTokens) keep(slot, x + t * n_cols_, x0 + t * n_cols_, r != nullptr ? r + t * n_out_ : nullptr);
  }
}

void Moments::keep(size_t slot, const float* x, const float* x0, const float* r) {
  for (size_t c = 0; c < n_cols_; ++c) {
    sample_.x[c * kSampleTokens + slot] = x[c];
    sample_.lost[c * kSampleTokens + slot] = x0[c] - x[c];
  }
  for (size_t i = 0; r != nullptr && i < n_out_; ++i) sample_.behind[i * kSampleTokens + slot] = r[i];
}

void Moments::add(const LayerEval& eval, const float* x, const float* x0, const float* r,
                  size_t n) {
  sample(x, x0, r, n);
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

const InputMetric& Moments::metric(const LayerEval& eval) {
  if (metric_) return *metric_;
  const double few =
      static_cast<double>(n_cols_) / static_cast<double>(std::max<size_t>(n_tokens_, 1));
  return metric_.emplace(n_cols_, block_cols_, h_, kDamping * (1 + few), eval.n_threads(), eval.fit_ops());
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
  parallel_for(n_threads, n_rows, kRowBatch, [&](size_t begin, size_t end) {
    const float* rows = w.data() + begin * n_cols_;
    const Wish a = wish(metric, d[0], halves_[0].m, scale, begin, end - begin, rows);
    const Wish b = wish(metric, d[1], halves_[1].m, scale, begin, end - begin, rows);
    for (size_t row = begin; row < end; ++row) {
      const size_t at = (row - begin) * n_cols_;
      const auto with = [&](const std::vector<float>& side, const std::vector<float>& moved) {
        return product(side.data() + at, moved.data() + at, n_cols_);
      };
      common[row] = 2 * with(a.side, b.change);
      own[row] = with(a.side, a.change) + with(b.side, b.change);
    }
    for (size_t i = 0; i < a.change.size(); ++i) change[begin * n_cols_ + i] = a.change[i] + b.change[i];
  });
  double all_common = 0, all_own = 0;
  for (size_t row = 0; row < n_rows; ++row) {
    all_common += common[row];
    all_own += own[row];
  }
  if (!(all_common > 0 && all_own > 0)) return;
  const double rho = std::min(all_common / all_own, 1.0);
  const auto share = static_cast<float>(useful_part(metric, w, change, n_threads) * 2 * rho / (1 + rho));
  for (size_t i = 0; i < w.size(); ++i) w[i] += share * change[i];
}

// From 0 to 1: the t for which t times the change comes nearest to what rows w are to make up for.
double Moments::useful_part(const InputMetric& metric, const std::vector<float>& w, const std::vector<float>& change, int n_threads) const {
  if (sample_.x.empty()) return 1;
  const size_t n_rows = w.size() / n_cols_;
  std::vector<double> common(n_rows), own(n_rows);
  parallel_for(n_threads, n_rows, kRowBatch, [&](size_t begin, size_t end) {
    const size_t n = end - begin;
    std::vector<float> wanted(n * kSampleTokens), given(n * kSampleTokens);
    if (n_out_ > 0) std::copy_n(sample_.behind.data() + begin * kSampleTokens, wanted.size(), wanted.data());
    const auto add = [&](const std::vector<float>& rows, const std::vector<float>& tokens, std::vector<float>& to) {
      metric.ops().add_products({rows.data() + begin * n_cols_, n_cols_, n, tokens.data(), kSampleTokens, n_cols_, to.data(), kSampleTokens, kSampleTokens});
    };
    add(w, sample_.lost, wanted);
    add(change, sample_.x, given);
    for (size_t row = 0; row < n; ++row) {
      const float *a = wanted.data() + row * kSampleTokens, *b = given.data() + row * kSampleTokens;
      common[begin + row] = product(a, b, kSampleTokens);
      own[begin + row] = product(b, b, kSampleTokens);
    }
  });
  const double all_common = std::accumulate(common.begin(), common.end(), 0.0), all_own = std::accumulate(own.begin(), own.end(), 0.0);
  return all_own > 0 ? std::clamp(all_common / all_own, 0.0, 1.0) : 1;
}

Moments::Wish Moments::wish(const InputMetric& metric, const std::vector<float>& d,
                            const std::vector<double>& m, double scale, size_t row, size_t n_rows,
                            const float* w) const {
  Wish out;
  out.side.resize(n_rows * n_cols_);
  for (size_t i = 0; n_out_ > 0 && i < out.side.size(); ++i)
    out.side[i] = static_cast<float>(m[row * n_cols_ + i] * scale);
  size_t at = 0;
  for (size_t first = 0; first < n_cols_; first += block_cols_) {
    const size_t width = std::min(block_cols_, n_cols_ - first);
    metric.ops().add_products({w + first, n_cols_, n_rows, d.data() + at, width, width, out.side.data() + first, n_cols_, width});
    at += width * width;
  }
  out.change = out.side;
  metric.solve(out.change.data(), n_rows);
  return out;
}

}  // namespace duet
