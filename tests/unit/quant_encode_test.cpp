#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "quant/f16.h"
#include "quant/format.h"
#include "tests/support/close.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr DType kEncoded[] = {DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K,
                              DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0,
                              DType::IQ4_NL, DType::IQ4_XS};

// Near-Gaussian numbers: sums of twelve uniform ones, of unit variance.
std::vector<float> gaussian(size_t n, Rng& rng, float scale = 1) {
  std::vector<float> x(n);
  for (float& v : x) {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += rng.symmetric();
    v = scale * sum / 2;
  }
  return x;
}

std::vector<std::byte> encode(const Format& f, const std::vector<float>& x,
                              const float* importance = nullptr) {
  std::vector<std::byte> row(row_bytes(f, x.size()));
  f.encode_row(x.data(), row.data(), x.size(), importance);
  return row;
}

std::vector<float> round_trip(const Format& f, const std::vector<float>& x,
                              const float* importance = nullptr) {
  const std::vector<std::byte> row = encode(f, x, importance);
  CHECK(f.scales_finite(row.data(), x.size()));
  std::vector<float> y(x.size());
  f.decode_row(row.data(), y.data(), x.size());
  return y;
}

double squared_error(const std::vector<float>& x, const std::vector<float>& y,
                     const std::vector<float>& w = {}) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double diff = double{x[i]} - double{y[i]};
    sum += diff * diff * (w.empty() ? 1.0 : double{w[i]});
  }
  return sum;
}

float largest(const std::vector<float>& x) {
  float amax = 0;
  for (const float v : x) amax = std::max(amax, std::fabs(v));
  return amax;
}

}  // namespace

// Bounds: the error that ggml's quantization without importance leaves on Gaussian rows, relative
// to their root mean square (measured with ggml 0.25.3; 0.5 % allowed for the sample).
TEST_CASE("encode: error on Gaussian rows is not above ggml's") {
  struct Bound {
    DType dtype;
    double relative_error;
  };
  const Bound bounds[] = {{DType::Q8_0, 0.00534}, {DType::Q6_K, 0.01768}, {DType::Q5_K, 0.03606},
                          {DType::Q4_K, 0.07137}, {DType::Q3_K, 0.15078}, {DType::Q2_K, 0.29642},
                          {DType::Q5_1, 0.03788}, {DType::Q5_0, 0.04264}, {DType::Q4_1, 0.07823},
                          {DType::Q4_0, 0.08584}, {DType::IQ4_NL, 0.07623}, {DType::IQ4_XS, 0.07682}, {DType::F16, 0.0003},   {DType::BF16, 0.0025}};
  Rng rng(1);
  const std::vector<float> x = gaussian(64 * 1024, rng, 0.03f);
  const double power = squared_error(x, std::vector<float>(x.size(), 0.0f));
  for (const Bound& bound : bounds) {
    const Format& f = format_of(bound.dtype);
    CAPTURE(std::string(f.name));
    CHECK(std::sqrt(squared_error(x, round_trip(f, x)) / power) <= bound.relative_error * 1.005);
  }
}

TEST_CASE("encode: F32 is exact, rows on the levels of a format come back") {
  Rng rng(2);
  const std::vector<float> x = gaussian(512, rng);
  CHECK(round_trip(format_of(DType::F32), x) == x);
  struct Levels {
    DType dtype;
    int n;
  };
  for (const Levels& levels :
       {Levels{DType::Q3_K, 8}, Levels{DType::Q4_0, 16}, Levels{DType::Q4_1, 16},
        Levels{DType::Q5_0, 32}, Levels{DType::Q5_1, 32}, Levels{DType::Q8_0, 32}}) {
    const Format& f = format_of(levels.dtype);
    CAPTURE(std::string(f.name));
    std::vector<float> row(256);
    for (size_t i = 0; i < row.size(); ++i) {
      row[i] = 0.125f * static_cast<float>(static_cast<int>(i) % levels.n - levels.n / 2);
    }
    if (levels.dtype == DType::Q8_0) {
      row.assign(row.size(), 0.125f * 127);
      row[9] = -0.125f * 3;
    }
    CHECK(std::sqrt(squared_error(row, round_trip(f, row)) / 256) < 0.001);
  }
}

TEST_CASE("encode: importance lowers the weighted error") {
  Rng rng(3);
  const std::vector<float> x = gaussian(8192, rng);
  std::vector<float> importance(x.size());
  for (float& w : importance) w = rng.below(8) == 0 ? 50.0f : 0.5f;
  for (const DType dtype : kEncoded) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    const double plain = squared_error(x, round_trip(f, x), importance);
    const double weighted = squared_error(x, round_trip(f, x, importance.data()), importance);
    if (dtype == DType::Q8_0) CHECK(weighted == plain);  // rounds to nearest, nothing to weigh
    if (dtype != DType::Q8_0) CHECK(weighted < 0.97 * plain);
  }
}

TEST_CASE("encode: the unit of importance does not matter, none of it serves as all alike") {
  Rng rng(4);
  const std::vector<float> x = gaussian(1024, rng);
  std::vector<float> importance(x.size()), scaled(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    importance[i] = 1 + rng.symmetric();
    scaled[i] = importance[i] * 0x1p60f;
  }
  const std::vector<float> none(x.size(), 0.0f), one(x.size(), 1.0f);
  for (const DType dtype : kEncoded) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    CHECK(encode(f, x, importance.data()) == encode(f, x, scaled.data()));
    const double all_alike = squared_error(x, round_trip(f, x, one.data()));
    CHECK(squared_error(x, round_trip(f, x, none.data())) ==
          doctest::Approx(all_alike).epsilon(0.001));
  }
}

TEST_CASE("encode: a block depends on its own elements only, and on nothing else") {
  Rng rng(5);
  const std::vector<float> x = gaussian(7 * 256, rng);
  for (const Format& f : all_formats()) {
    if (f.encode_row == nullptr) continue;
    CAPTURE(std::string(f.name));
    const std::vector<std::byte> whole = encode(f, x);
    CHECK(whole == encode(f, x));
    std::vector<std::byte> pieces(whole.size());
    for (size_t i = 0; i < x.size(); i += f.block_elems) {
      f.encode_row(x.data() + i, pieces.data() + row_bytes(f, i), f.block_elems, nullptr);
    }
    CHECK(whole == pieces);
  }
}

TEST_CASE("encode: zeros stay zero") {
  const std::vector<float> zeros(512, 0.0f);
  for (const DType dtype : kEncoded) {
    CAPTURE(std::string(format_of(dtype).name));
    CHECK(round_trip(format_of(dtype), zeros) == zeros);
  }
}

TEST_CASE("encode: constant rows and lone outliers keep their largest value") {
  for (const DType dtype : kEncoded) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    for (const float value : {1.0f, -0.37f, 1e-3f, -3000.0f}) {
      CAPTURE(value);
      const std::vector<float> constant(256, value);
      std::vector<float> outlier(256, 0.0f);
      outlier[77] = value;
      for (const float v : round_trip(f, constant))
        CHECK(std::fabs(v - value) <= 0.01f * std::fabs(value));
      CHECK(std::fabs(round_trip(f, outlier)[77] - value) <= 0.01f * std::fabs(value));
    }
  }
}

// Half-precision scales end at 65504 and begin at 6e-8. Beyond, blocks saturate; below, they fade
// to zero; they never hold an infinity or NaN.
TEST_CASE("encode: any finite input gives finite blocks") {
  Rng rng(6);
  for (const DType dtype : kEncoded) {
    const Format& f = format_of(dtype);
    CAPTURE(std::string(f.name));
    for (int exponent = -148; exponent <= 127; ++exponent) {
      const float scale = std::ldexp(1.0f, exponent);
      std::vector<float> rows[4] = {
          gaussian(512, rng), gaussian(512, rng), std::vector<float>(512, scale), {}};
      for (float& v : rows[0]) v = std::clamp(v, -1.9f, 1.9f) * scale;
      rows[1][rng.below(512)] = -scale;
      rows[3].assign(512, 0.0f);
      for (float& v : rows[3])
        v = rng.symmetric() * std::ldexp(1.0f, static_cast<int>(rng.below(276)) - 149);
      for (const std::vector<float>& x : rows) {
        const std::vector<float> y = round_trip(f, x);
        CHECK(std::all_of(y.begin(), y.end(), [](float v) { return std::isfinite(v); }));
        if (largest(x) < 60000) CHECK(largest(y) <= 1.5f * largest(x) + 1e-6f);
      }
    }
  }
}

TEST_CASE("encode: values beyond the largest scale saturate with their sign") {
  std::vector<float> x(256, 0.0f);
  x[3] = 1e30f;
  x[4] = -1e30f;
  for (const DType dtype : kEncoded) {
    CAPTURE(std::string(format_of(dtype).name));
    const std::vector<float> y = round_trip(format_of(dtype), x);
    CHECK(y[3] >= 65504.0f);
    CHECK(y[4] <= -65504.0f);
  }
}

TEST_CASE("encode: values that are not finite count as zero, their neighbours survive") {
  Rng rng(7);
  std::vector<float> x = gaussian(256, rng);
  x[5] = std::numeric_limits<float>::infinity();
  x[100] = std::nanf("");
  for (const DType dtype :
       {DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::Q4_0}) {
    CAPTURE(std::string(format_of(dtype).name));
    std::vector<float> y = round_trip(format_of(dtype), x);
    CHECK(std::fabs(y[5]) < 1);
    CHECK(std::fabs(y[100]) < 1);
    CHECK(std::fabs(y[6] - x[6]) < 1);
  }
}
