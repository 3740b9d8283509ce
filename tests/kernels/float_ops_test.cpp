// Element-wise kernels of every table against doubles.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "quant/f16.h"
#include "tests/support/close.h"
#include "tests/support/isa.h"

namespace duet::test {
namespace {

constexpr size_t kLengths[] = {1,  2,  3,  4,  6,  7,   8,   9,   15,  16,
                               17, 31, 32, 33, 64, 100, 127, 128, 255, 4096};
constexpr double kEps = double{std::numeric_limits<float>::epsilon()};

// n floats that end at an inaccessible page.
struct Floats : GuardedBuffer {
  explicit Floats(size_t n) : GuardedBuffer(n * sizeof(float)), count(n) {}
  Floats(size_t n, Rng& rng, float magnitude) : Floats(n) {
    for (size_t i = 0; i < n; ++i) data()[i] = magnitude * rng.symmetric();
  }
  float* data() const { return as<float>(); }
  float operator[](size_t i) const { return data()[i]; }
  std::vector<float> copy() const { return {data(), data() + count}; }
  size_t count;
};

void check_rms_norm(const KernelTable& table) {
  Rng rng(1);
  for (size_t n : kLengths) {
    const Floats x(n, rng, 3.0f), w(n, rng, 2.0f), y(n);
    table.rms_norm(x.data(), w.data(), 1e-5f, y.data(), n);
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) sum += double{x[i]} * double{x[i]};
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(n) + double{1e-5f});
    for (size_t i = 0; i < n; ++i) {
      const double exact = double{x[i]} * scale * double{w[i]};
      INFO("n ", n, " i ", i);
      CHECK(std::abs(double{y[i]} - exact) <= 16.0 * kEps * std::abs(exact));
    }
  }
}
TEST_CASE("rms_norm: scalar") { with_isa("scalar", check_rms_norm); }
TEST_CASE("rms_norm: avx2") { with_isa("avx2", check_rms_norm); }
TEST_CASE("rms_norm: avx512") { with_isa("avx512", check_rms_norm); }

void check_rope(const KernelTable& table) {
  Rng rng(2);
  for (size_t n : {size_t{2}, size_t{4}, size_t{6}, size_t{14}, size_t{16}, size_t{32}, size_t{50},
                   size_t{128}}) {
    const Floats x(n, rng, 2.0f), cs(n);
    for (size_t i = 0; i < n; i += 2) {
      const float angle = 4.0f * rng.symmetric();
      cs.data()[i] = std::cos(angle);
      cs.data()[i + 1] = std::sin(angle);
    }
    const std::vector<float> in = x.copy();
    table.rope(x.data(), cs.data(), n);
    for (size_t i = 0; i < n; i += 2) {
      const double a = double{in[i]}, b = double{in[i + 1]}, c = double{cs[i]},
                   s = double{cs[i + 1]};
      const double bound = 2.0 * kEps * (std::abs(a) + std::abs(b));
      INFO("n ", n, " pair ", i);
      CHECK(std::abs(double{x[i]} - (a * c - b * s)) <= bound);
      CHECK(std::abs(double{x[i + 1]} - (a * s + b * c)) <= bound);
    }
  }
}
TEST_CASE("rope: scalar") { with_isa("scalar", check_rope); }
TEST_CASE("rope: avx2") { with_isa("avx2", check_rope); }
TEST_CASE("rope: avx512") { with_isa("avx512", check_rope); }

// Logits of any magnitude: the largest is subtracted before the exponential.
void check_softmax(const KernelTable& table) {
  Rng rng(3);
  for (float magnitude : {0.0f, 1.0f, 20.0f, 1e4f, 1e38f}) {
    for (size_t n : kLengths) {
      const Floats x(n, rng, magnitude);
      const std::vector<float> in = x.copy();
      table.softmax(x.data(), n);
      const double max = double{*std::max_element(in.begin(), in.end())};
      double sum = 0.0;
      for (float v : in) sum += std::exp(double{v} - max);
      for (size_t i = 0; i < n; ++i) {
        const double shift = double{in[i]} - max, exact = std::exp(shift) / sum;
        INFO("magnitude ", magnitude, " n ", n, " i ", i);
        // The float difference in[i] - max is itself rounded: relative error |shift| * eps.
        CHECK(std::abs(double{x[i]} - exact) <= (16.0 + std::abs(shift)) * kEps * exact + 1e-37);
      }
    }
  }
}
TEST_CASE("softmax: scalar") { with_isa("scalar", check_softmax); }
TEST_CASE("softmax: avx2") { with_isa("avx2", check_softmax); }
TEST_CASE("softmax: avx512") { with_isa("avx512", check_softmax); }

// Masked positions are -infinity: exactly zero afterwards, the others unaffected.
void check_softmax_masked(const KernelTable& table) {
  Rng rng(4);
  for (size_t n : kLengths) {
    const Floats x(n, rng, 5.0f);
    std::vector<float> kept;
    const size_t keep = rng.below(n);
    for (size_t i = 0; i < n; ++i) {
      if (i != keep && rng.below(2) == 0)
        x.data()[i] = -std::numeric_limits<float>::infinity();
      else
        kept.push_back(x[i]);
    }
    const std::vector<float> in = x.copy();
    table.softmax(x.data(), n);
    select_kernels("scalar").softmax(kept.data(), kept.size());
    for (size_t i = 0, k = 0; i < n; ++i) {
      INFO("n ", n, " i ", i);
      if (std::isinf(in[i]))
        CHECK(x[i] == 0.0f);
      else
        CHECK(std::abs(x[i] - kept[k++]) <= 1e-6f);
    }
  }
}
TEST_CASE("softmax of masked positions: scalar") { with_isa("scalar", check_softmax_masked); }
TEST_CASE("softmax of masked positions: avx2") { with_isa("avx2", check_softmax_masked); }
TEST_CASE("softmax of masked positions: avx512") { with_isa("avx512", check_softmax_masked); }

void check_silu_mul(const KernelTable& table) {
  Rng rng(5);
  for (float magnitude : {1.0f, 30.0f, 200.0f}) {
    for (size_t n : kLengths) {
      const Floats gate(n, rng, magnitude), up(n, rng, 2.0f), y(n);
      table.silu_mul(gate.data(), up.data(), y.data(), n);
      for (size_t i = 0; i < n; ++i) {
        const double g = double{gate[i]}, exact = g / (1.0 + std::exp(-g)) * double{up[i]};
        INFO("magnitude ", magnitude, " n ", n, " gate ", gate[i]);
        CHECK(std::abs(double{y[i]} - exact) <=
              (8.0 + std::abs(g)) * kEps * std::abs(exact) + 1e-35);
      }
    }
  }
}
TEST_CASE("silu_mul: scalar") { with_isa("scalar", check_silu_mul); }
TEST_CASE("silu_mul: avx2") { with_isa("avx2", check_silu_mul); }
TEST_CASE("silu_mul: avx512") { with_isa("avx512", check_silu_mul); }

void check_add(const KernelTable& table) {
  Rng rng(6);
  for (size_t n : kLengths) {
    const Floats x(n, rng, 1.0f), y(n, rng, 1.0f), z(n, rng, 1.0f);
    const std::vector<float> y0 = y.copy(), z0 = z.copy();
    table.add(y.data(), x.data(), n);
    table.add_scaled(z.data(), x.data(), 0.37f, n);
    for (size_t i = 0; i < n; ++i) {
      CHECK(y[i] == y0[i] + x[i]);
      CHECK(std::abs(double{z[i]} - (double{z0[i]} + double{0.37f} * double{x[i]})) <= 2.0 * kEps);
    }
  }
}
TEST_CASE("add and add_scaled: scalar") { with_isa("scalar", check_add); }
TEST_CASE("add and add_scaled: avx2") { with_isa("avx2", check_add); }
TEST_CASE("add and add_scaled: avx512") { with_isa("avx512", check_add); }

// All 65536 halves to float; floats of every exponent, ties and overflows to half.
void check_f16(const KernelTable& table) {
  const size_t n = 65536;
  std::vector<uint16_t> half(n), back(n);
  std::vector<float> wide(n);
  for (size_t i = 0; i < n; ++i) half[i] = static_cast<uint16_t>(i);
  table.f16_to_f32(half.data(), wide.data(), n);
  table.f32_to_f16(wide.data(), back.data(), n);
  size_t wrong = 0;
  for (size_t i = 0; i < n; ++i) {
    const float expected = f16_to_f32(half[i]);
    const bool nan = std::isnan(expected);
    wrong += nan ? !std::isnan(wide[i]) : std::memcmp(&wide[i], &expected, 4) != 0;
    wrong += nan ? !std::isnan(f16_to_f32(back[i])) : back[i] != half[i];
  }
  CHECK(wrong == 0);
  Rng rng(7);
  for (size_t i = 0; i < n; ++i) {
    const uint32_t low =
        rng.below(4) == 0 ? 0x1000u : static_cast<uint32_t>(rng.next()) & 0x1fffu;  // ties too
    const uint32_t bits = (static_cast<uint32_t>(rng.next()) & 0x8fffe000u) | 0x30000000u | low;
    std::memcpy(&wide[i], &bits, 4);
  }
  table.f32_to_f16(wide.data(), back.data(), n);
  for (size_t i = 0; i < n; ++i) wrong += back[i] != f32_to_f16(wide[i]);
  CHECK(wrong == 0);
  for (size_t m : {size_t{1}, size_t{5}, size_t{9}, size_t{17}}) {  // ends of rows
    GuardedBuffer src(m * 2), dst(m * 4);
    std::memcpy(src.data(), half.data() + 0x3c00, m * 2);
    table.f16_to_f32(src.as<uint16_t>(), dst.as<float>(), m);
    table.f32_to_f16(dst.as<float>(), src.as<uint16_t>(), m);
    CHECK(std::memcmp(src.data(), half.data() + 0x3c00, m * 2) == 0);
  }
}
TEST_CASE("half precision both ways: scalar") { with_isa("scalar", check_f16); }
TEST_CASE("half precision both ways: avx2") { with_isa("avx2", check_f16); }
TEST_CASE("half precision both ways: avx512") { with_isa("avx512", check_f16); }

#if defined(__aarch64__)
TEST_CASE("rms_norm: neon") { with_isa("neon", check_rms_norm); }
TEST_CASE("rope: neon") { with_isa("neon", check_rope); }
TEST_CASE("softmax: neon") { with_isa("neon", check_softmax); }
TEST_CASE("softmax of masked positions: neon") { with_isa("neon", check_softmax_masked); }
TEST_CASE("silu_mul: neon") { with_isa("neon", check_silu_mul); }
TEST_CASE("add and add_scaled: neon") { with_isa("neon", check_add); }
TEST_CASE("half precision both ways: neon") { with_isa("neon", check_f16); }
#endif

}  // namespace
}  // namespace duet::test
