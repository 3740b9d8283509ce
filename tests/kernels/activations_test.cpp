// Activation blocks and row decoding: every table to the bit.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/support/blocks.h"
#include "tests/support/close.h"
#include "tests/support/isa.h"

namespace duet::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Rows that reach every branch: ordinary, tiny, huge, subnormal, ties, all zero, not finite.
std::vector<std::vector<float>> activation_rows(size_t n, Rng& rng) {
  std::vector<std::vector<float>> rows;
  for (float magnitude : {1.0f, 1e-3f, 1e30f, 0x1p-99f, 0x1p-101f, 0x1p-140f, 0.0f}) {
    std::vector<float>& row = rows.emplace_back(n);
    for (float& v : row) v = magnitude * rng.symmetric();
  }
  std::vector<float>& ties = rows.emplace_back(n);
  for (size_t i = 0; i < n; ++i) ties[i] = static_cast<float>(rng.below(254)) - 126.5f;
  for (size_t i = 0; i < n; i += 32) ties[i] = 127.0f;
  for (float bad : {std::numeric_limits<float>::quiet_NaN(),
                    -std::numeric_limits<float>::quiet_NaN(), kInf, -kInf}) {
    rows.push_back(rows.front());
    rows.back()[rng.below(n)] = bad;
  }
  return rows;
}

void check_act_bits(const KernelTable& table) {
  const KernelTable& scalar = select_kernels("scalar");
  Rng rng(1);
  for (size_t n : {size_t{32}, size_t{96}, size_t{256}, size_t{768}}) {
    for (const std::vector<float>& row : activation_rows(n, rng)) {
      GuardedBuffer x(n * 4), got(n / 32 * sizeof(BlockAct32)), want(n / 32 * sizeof(BlockAct32));
      std::memcpy(x.data(), row.data(), n * 4);
      table.quantize_act32(x.as<float>(), got.data(), n);
      scalar.quantize_act32(x.as<float>(), want.data(), n);
      CHECK(std::memcmp(got.data(), want.data(), got.size()) == 0);
      if (n % 256 != 0) continue;
      GuardedBuffer got256(n / 256 * sizeof(BlockAct256)), want256(n / 256 * sizeof(BlockAct256));
      table.quantize_act256(x.as<float>(), got256.data(), n);
      scalar.quantize_act256(x.as<float>(), want256.data(), n);
      CHECK(std::memcmp(got256.data(), want256.data(), got256.size()) == 0);
    }
  }
}
TEST_CASE("activation blocks equal scalar to the bit: avx2") { with_isa("avx2", check_act_bits); }
TEST_CASE("activation blocks equal scalar to the bit: avx512") {
  with_isa("avx512", check_act_bits);
}

// The rules of kernels.h, by the scalar table.
TEST_CASE("activation blocks follow their definition") {
  const KernelTable& scalar = select_kernels("scalar");
  Rng rng(2);
  std::vector<float> x(256);
  for (float& v : x) v = 5.0f * rng.symmetric();
  float max = 0.0f;
  for (float v : x) max = std::max(max, std::abs(v));
  BlockAct256 block;
  scalar.quantize_act256(x.data(), &block, 256);
  CHECK(block.d == max / 127.0f);
  for (size_t i = 0; i < 256; ++i) {
    CHECK(std::abs(block.d * static_cast<float>(block.qs[i]) - x[i]) <= 0.501f * block.d);
  }
  for (size_t g = 0; g < 16; ++g) {
    int sum = 0;
    for (size_t i = 0; i < 16; ++i) sum += block.qs[16 * g + i];
    CHECK(block.bsums[g] == sum);
    if (g % 2 == 1) CHECK(block.bsums32[g / 2] == block.bsums[g - 1] + block.bsums[g]);
  }
  BlockAct32 small[8];
  scalar.quantize_act32(x.data(), small, 256);
  for (const BlockAct32& b : small) {
    int sum = 0, top = 0;
    for (int8_t q : b.qs) sum += q, top = std::max(top, std::abs(int{q}));
    CHECK(top == 127);
    CHECK(b.sum == sum);
  }
}

TEST_CASE("halves round to even, zeros stay zero, NaN and infinity give NaN scales") {
  const KernelTable& scalar = select_kernels("scalar");
  std::vector<float> x(32, 0.0f);
  x[0] = 127.0f, x[1] = 0.5f, x[2] = 1.5f, x[3] = 2.5f, x[4] = -0.5f, x[5] = -1.5f;
  BlockAct32 b;
  scalar.quantize_act32(x.data(), &b, 32);
  CHECK(b.d == 1.0f);
  CHECK(int{b.qs[1]} == 0);
  CHECK(int{b.qs[2]} == 2);
  CHECK(int{b.qs[3]} == 2);
  CHECK(int{b.qs[4]} == 0);
  CHECK(int{b.qs[5]} == -2);
  std::fill(x.begin(), x.end(), 0x1p-120f);
  scalar.quantize_act32(x.data(), &b, 32);
  CHECK(b.d == 0.0f);
  CHECK(int{b.qs[7]} == 0);
  for (float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
    x[9] = bad;
    scalar.quantize_act32(x.data(), &b, 32);
    CHECK(std::isnan(b.d));
    CHECK(b.sum == 0);
  }
}

void check_decode(const KernelTable& table) {
  Rng rng(3);
  for (const Format& format : all_formats()) {
    for (size_t blocks : {size_t{1}, size_t{3}, size_t{4}, size_t{17}, size_t{65}}) {
      const size_t n = blocks * format.block_elems;
      GuardedBuffer src(row_bytes(format, n)), got(n * 4), want(n * 4);
      rng.fill(src.bytes());
      table.decode_row[static_cast<size_t>(format.dtype)](src.data(), got.as<float>(), n);
      format.decode_row(src.data(), want.as<float>(), n);
      size_t wrong = 0;
      for (size_t i = 0; i < n; ++i) {
        const float a = got.as<float>()[i], b = want.as<float>()[i];
        wrong += !(std::isnan(a) && std::isnan(b)) && std::memcmp(&a, &b, 4) != 0;
      }
      INFO(format.name, " n ", n);
      CHECK(wrong == 0);
    }
  }
}
TEST_CASE("decoded rows equal the format's to the bit: scalar") {
  with_isa("scalar", check_decode);
}
TEST_CASE("decoded rows equal the format's to the bit: avx2") { with_isa("avx2", check_decode); }
TEST_CASE("decoded rows equal the format's to the bit: avx512") {
  with_isa("avx512", check_decode);
}

#if defined(__aarch64__)
TEST_CASE("activation blocks equal scalar to the bit: neon") { with_isa("neon", check_act_bits); }
TEST_CASE("decoded rows equal the format's to the bit: neon") { with_isa("neon", check_decode); }
#endif

}  // namespace
}  // namespace duet::test
