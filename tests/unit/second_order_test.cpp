// Error-compensating encoding against plain encoding, in the metric of correlated inputs.
#include "quant/second_order.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/support/close.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr DType kFormats[] = {DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K,
                              DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::IQ4_NL, DType::IQ4_XS};

std::vector<float> random_floats(size_t n, Rng& rng, float scale) {
  std::vector<float> x(n);
  for (float& v : x) v = scale * (rng.symmetric() + rng.symmetric() + rng.symmetric());
  return x;
}

// Moments of inputs that are mixtures of n / 8 sources, and some noise.
std::vector<double> correlated_moments(size_t n, Rng& rng) {
  const size_t n_sources = n / 8;
  std::vector<double> mix(n * n_sources);
  for (double& v : mix) v = double{rng.symmetric()};
  std::vector<double> h(n * n);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j)
      for (size_t k = 0; k < n_sources; ++k)
        h[i * n + j] += mix[i * n_sources + k] * mix[j * n_sources + k];
    h[i * n + i] += 0.5;
  }
  return h;
}

std::vector<float> decoded(const Format& format, const std::vector<std::byte>& bytes, size_t n) {
  std::vector<float> out(n);
  format.decode_row(bytes.data(), out.data(), n);
  return out;
}

std::vector<std::byte> second_order(const Format& format, const InputMetric& metric,
                                    const std::vector<float>& w, int n_threads = 2) {
  const size_t n_rows = w.size() / metric.n_cols();
  std::vector<std::byte> out(n_rows * row_bytes(format, metric.n_cols()));
  encode_second_order(format, metric, w.data(), n_rows, out.data(), n_threads);
  CHECK(format.scales_finite(out.data(), w.size()));
  return out;
}

double error_of(const Format& format, const InputMetric& metric, const std::vector<float>& w,
                const std::vector<std::byte>& bytes) {
  return metric_error(metric, w.data(), decoded(format, bytes, w.size()).data(),
                      w.size() / metric.n_cols());
}

// As encode_row does it, weighted by the diagonal of the moments.
std::vector<std::byte> plain(const Format& format, const InputMetric& metric,
                             const std::vector<float>& w) {
  const size_t n = metric.n_cols(), bytes = row_bytes(format, n);
  std::vector<float> importance(n);
  for (size_t c = 0; c < n; ++c) importance[c] = metric.moments_row(c)[c - metric.block_begin(c)];
  std::vector<std::byte> out(w.size() / n * bytes);
  for (size_t r = 0; r < w.size() / n; ++r)
    format.encode_row(w.data() + r * n, out.data() + r * bytes, n, importance.data());
  return out;
}

}  // namespace

TEST_CASE("second order: the metric's factor gives back its moments") {
  Rng rng(1);
  constexpr size_t n = 96;
  const std::vector<double> h = correlated_moments(n, rng);
  const InputMetric metric(n, n, h, 0.01, 1);
  REQUIRE(metric.usable());
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = i; j < n; ++j) {
      double sum = 0;
      for (size_t k = j; k < n; ++k)
        sum += double{metric.factor_row(i)[k]} * double{metric.factor_row(j)[k]};
      CHECK(sum == doctest::Approx(double{metric.moments_row(i)[j]}).epsilon(1e-4).scale(0.1));
    }
  }
}

TEST_CASE("second order: solve is the inverse of the moments, of rows alone and together") {
  Rng rng(7);
  constexpr size_t n = 96, narrow = 72, n_rows = 5;
  const std::vector<double> h = correlated_moments(n, rng);
  std::vector<double> blocks;  // 72 and 24 columns
  for (const size_t first : {size_t{0}, narrow})
    for (size_t i = first; i < std::min(first + narrow, n); ++i)
      for (size_t k = first; k < std::min(first + narrow, n); ++k) blocks.push_back(h[i * n + k]);
  const InputMetric full(n, n, h, 0.01, 1), in_blocks(n, narrow, blocks, 0.01, 1);
  for (const InputMetric* metric : {&full, &in_blocks}) {
    REQUIRE(metric->usable());
    const std::vector<float> z = random_floats(n * n_rows, rng, 1);
    std::vector<float> x(z.size());
    for (size_t r = 0; r < n_rows; ++r)
      for (size_t i = 0; i < n; ++i)
        for (size_t j = metric->block_begin(i); j < metric->block_end(i); ++j)
          x[r * n + j] += z[r * n + i] * metric->moments_row(i)[j - metric->block_begin(i)];
    std::vector<float> alone(x.end() - n, x.end());
    metric->solve(x.data(), n_rows);
    for (size_t i = 0; i < x.size(); ++i)
      CHECK(double{x[i]} == doctest::Approx(double{z[i]}).epsilon(1e-3).scale(1));
    metric->solve(alone.data(), 1);
    CHECK(std::equal(alone.begin(), alone.end(), x.end() - n));
  }
}

TEST_CASE("second order: half the error of plain encoding or less, in every format") {
  Rng rng(2);
  constexpr size_t n = 512, n_rows = 20;
  const std::vector<double> h = correlated_moments(n, rng);
  const std::vector<float> w = random_floats(n * n_rows, rng, 0.03f);
  const InputMetric full(n, n, h, 0.01, 2);
  for (const DType dtype : kFormats) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    REQUIRE(has_second_order(f));
    CHECK(error_of(f, full, w, second_order(f, full, w)) <
          0.5 * error_of(f, full, w, plain(f, full, w)));
  }
  CHECK(!has_second_order(format_of(DType::F16)));
}

TEST_CASE("second order: moments in blocks serve too, narrower ones less") {
  Rng rng(3);
  constexpr size_t n = 512, half = 256, n_rows = 16;
  const std::vector<double> h = correlated_moments(n, rng);
  std::vector<double> blocks;
  for (size_t first = 0; first < n; first += half)
    for (size_t i = 0; i < half; ++i)
      for (size_t j = 0; j < half; ++j) blocks.push_back(h[(first + i) * n + first + j]);
  const std::vector<float> w = random_floats(n * n_rows, rng, 0.03f);
  const InputMetric full(n, n, h, 0.01, 2), in_blocks(n, half, blocks, 0.01, 2);
  for (const DType dtype : {DType::Q4_K, DType::Q4_0}) {
    const Format& f = format_of(dtype);
    const double best = error_of(f, full, w, second_order(f, full, w));
    const double blocked = error_of(f, full, w, second_order(f, in_blocks, w));
    CHECK(best < blocked);
    CHECK(blocked < 0.9 * error_of(f, full, w, plain(f, full, w)));
  }
}

TEST_CASE("second order: rows do not depend on threads or neighbours") {
  Rng rng(4);
  constexpr size_t n = 256, n_rows = 37;
  const InputMetric metric(n, n, correlated_moments(n, rng), 0.01, 3);
  const std::vector<float> w = random_floats(n * n_rows, rng, 0.03f);
  for (const DType dtype : kFormats) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    const std::vector<std::byte> all = second_order(f, metric, w, 3);
    CHECK(all == second_order(f, metric, w, 1));
    const size_t row = 23, bytes = row_bytes(f, n);
    const std::vector<std::byte> alone =
        second_order(f, metric, {w.begin() + row * n, w.begin() + (row + 1) * n});
    CHECK(
        std::equal(alone.begin(), alone.end(), all.begin() + static_cast<ptrdiff_t>(row * bytes)));
  }
}

TEST_CASE("second order: zeros and rows on a format's levels come back") {
  Rng rng(5);
  constexpr size_t n = 256;
  const InputMetric metric(n, n, correlated_moments(n, rng), 0.01, 1);
  struct Levels {
    DType dtype;
    int n;
  };
  for (const Levels& levels :
       {Levels{DType::Q3_K, 8}, Levels{DType::Q4_0, 16}, Levels{DType::Q4_1, 16},
        Levels{DType::Q5_0, 32}, Levels{DType::Q5_1, 32}}) {
    const Format& f = format_of(levels.dtype);
    CAPTURE(std::string(f.name));
    std::vector<float> w(n);
    CHECK(decoded(f, second_order(f, metric, w), n) == w);
    for (size_t i = 0; i < n; ++i)
      w[i] = 0.125f * static_cast<float>(static_cast<int>(i) % levels.n - levels.n / 2);
    CHECK(error_of(f, metric, w, second_order(f, metric, w)) <
          1e-6 * metric_error(metric, w.data(), std::vector<float>(n).data(), 1));
  }
}

TEST_CASE(
    "second order: damaged, empty and degenerate moments give finite blocks near plain ones") {
  Rng rng(6);
  constexpr size_t n = 256, n_rows = 4;
  const std::vector<float> w = random_floats(n * n_rows, rng, 0.03f);
  const std::vector<double> good = correlated_moments(n, rng);
  struct Case {
    const char* what;
    std::vector<double> h;
    bool usable;
  };
  std::vector<Case> cases = {{"zero", std::vector<double>(n * n), false},
                             {"NaN", good, false},
                             {"infinite", good, false},
                             {"negative", good, false},
                             {"rank 1", std::vector<double>(n * n, 1.0), true},
                             {"one input used", std::vector<double>(n * n), true},
                             {"tiny", good, true},
                             {"huge", good, true}};
  cases[1].h[5 * n + 7] = std::numeric_limits<double>::quiet_NaN();
  cases[2].h[3] = std::numeric_limits<double>::infinity();
  cases[3].h[4 * n + 4] = -1;
  cases[5].h[9 * n + 9] = 3;
  for (double& v : cases[6].h) v *= 1e-40;
  for (double& v : cases[7].h) v *= 1e40;
  for (const Case& c : cases) {
    CAPTURE(c.what);
    const InputMetric metric(n, n, c.h, 0.01, 1);
    CHECK(metric.usable() == c.usable);
    for (const DType dtype : {DType::Q3_K, DType::Q4_K, DType::Q5_0}) {
      const Format& f = format_of(dtype);
      CHECK(error_of(f, metric, w, second_order(f, metric, w)) <=
            error_of(f, metric, w, plain(f, metric, w)) * 1.05);
    }
  }
}
