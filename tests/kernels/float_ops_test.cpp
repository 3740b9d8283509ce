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

void check_add_products(const KernelTable& table) {
  Rng rng(11);
  for (const size_t n : {size_t{1}, size_t{7}, size_t{16}, size_t{40}, size_t{64}, size_t{150}})
    for (const size_t n_rows : {size_t{1}, size_t{3}, size_t{4}, size_t{9}})
      for (const size_t n_k : {size_t{0}, size_t{1}, size_t{130}}) {
        const size_t a_stride = n_k + 2, b_stride = n + 1, to_stride = n + 3;
        const Floats a(n_rows * a_stride, rng, 1.0f), b(std::max<size_t>(n_k, 1) * b_stride - 1, rng, 1.0f),
            to(n_rows * to_stride - 3, rng, 1.0f);
        for (size_t i = 0; i < a.count; i += 3) a.data()[i] = 0;
        const std::vector<float> before = to.copy();
        table.fit.add_products({a.data(), a_stride, n_rows, b.data(), b_stride, n_k, to.data(), to_stride, n});
        for (size_t i = 0; i < to.count; ++i) {
          const size_t r = i / to_stride, c = i % to_stride;
          double sum = double{before[i]}, size = std::abs(sum);
          for (size_t k = 0; c < n && k < n_k; ++k) {
            const double term = double{a[r * a_stride + k]} * double{b[k * b_stride + c]};
            sum += term;
            size += std::abs(term);
          }
          INFO("n ", n, " rows ", n_rows, " k ", n_k, " i ", i);
          CHECK(std::abs(double{to[i]} - sum) <= 8 * kEps * size);
        }
        // A row has the same bits alone.
        std::vector<float> alone(before.end() - static_cast<ptrdiff_t>(n), before.end());
        table.fit.add_products({a.data() + (n_rows - 1) * a_stride, a_stride, 1, b.data(), b_stride, n_k, alone.data(), n, n});
        for (size_t c = 0; c < n; ++c) CHECK(alone[c] == to[(n_rows - 1) * to_stride + c]);
      }
}
TEST_CASE("add_products: scalar") { with_isa("scalar", check_add_products); }
TEST_CASE("add_products: avx2") { with_isa("avx2", check_add_products); }
TEST_CASE("add_products: avx512") { with_isa("avx512", check_add_products); }

// Every table chooses what the plain search does, to the bit.
void check_search_group(const KernelTable& table) {
  Rng rng(12);
  for (const DType dtype : {DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::IQ4_XS, DType::Q4_1}) {
    const BlockGrid& grid = *block_grid(dtype);
    for (int turn = 0; turn < 8; ++turn) {
      float x[kMaxGroup], before[kMaxGroup], factor[kMaxGroup * kMaxGroup];
      for (size_t i = 0; i < kMaxGroup; ++i) {
        x[i] = rng.symmetric();
        before[i] = 0.1f * rng.symmetric();
        for (size_t k = 0; k < kMaxGroup; ++k) factor[i * kMaxGroup + k] = k == i ? 1.0f : 0.2f * rng.symmetric();
      }
      BlockParts parts;
      parts.unit = parts.offset_unit = f32_to_f16(0.03f);
      parts.scale[0] = static_cast<int16_t>(std::min(5, grid.scale_hi));
      parts.offset[0] = static_cast<int16_t>(std::min(3, grid.offset_max));
      std::vector<GroupScale> scales;
      list_scales(grid, parts, 0, {3, 2}, scales);
      GroupChoice want, got;
      kPlainFitOps.search_group(grid, {x, factor, kMaxGroup, before}, scales.data(), scales.size(), want);
      table.fit.search_group(grid, {x, factor, kMaxGroup, before}, scales.data(), scales.size(), got);
      INFO("format ", static_cast<int>(dtype));
      REQUIRE(want.cost < FLT_MAX);
      CHECK(got.cost == want.cost);
      CHECK(got.scale.scale == want.scale.scale);
      CHECK(got.scale.offset == want.scale.offset);
      CHECK(got.scale.unit == want.scale.unit);
      CHECK(std::equal(got.q, got.q + grid.group_elems, want.q));
    }
  }
}
TEST_CASE("search_group: avx2") { with_isa("avx2", check_search_group); }
TEST_CASE("search_group: avx512") { with_isa("avx512", check_search_group); }

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
TEST_CASE("search_group: neon") { with_isa("neon", check_search_group); }
TEST_CASE("add_products: neon") { with_isa("neon", check_add_products); }
TEST_CASE("half precision both ways: neon") { with_isa("neon", check_f16); }
#endif

}  // namespace
}  // namespace duet::test
