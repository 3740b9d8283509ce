#include "quant/f16.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using namespace duet;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// From the definition: sign, 5 bits of exponent, 10 of fraction.
float half_by_definition(uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  float value = std::ldexp(static_cast<float>(fraction), -24);
  if (exponent != 0) value = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) value = fraction == 0 ? kInf : std::numeric_limits<float>::quiet_NaN();
  return (h & 0x8000) != 0 ? -value : value;
}

// Numbers next to and at the middle of two neighbours, checked against round to nearest even.
template <class Narrow, class Widen>
void check_rounding(Narrow narrow, Widen widen, uint16_t largest) {
  int wrong = 0;
  for (uint32_t h = 0; h < largest; ++h) {
    const auto low = static_cast<uint16_t>(h), high = static_cast<uint16_t>(h + 1);
    const auto middle = static_cast<float>((double{widen(low)} + double{widen(high)}) / 2);
    wrong += narrow(middle) != (h % 2 == 0 ? low : high);
    wrong += narrow(std::nextafter(middle, 0.0f)) != low;
    wrong += narrow(std::nextafter(middle, kInf)) != high;
    wrong += narrow(-middle) != ((h % 2 == 0 ? low : high) | 0x8000);
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("f16: every half widens to its definition and narrows back to itself") {
  int wrong = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto h = static_cast<uint16_t>(i);
    const float value = f16_to_f32(h), expected = half_by_definition(h);
    if (std::isnan(expected)) {
      wrong += !std::isnan(value) || !std::isnan(f16_to_f32(f32_to_f16(value)));
    } else {
      wrong += value != expected || std::signbit(value) != std::signbit(expected) ||
               f32_to_f16(value) != h;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("f16: narrowing rounds to nearest even everywhere") {
  check_rounding(f32_to_f16, f16_to_f32, 0x7bff);
}

TEST_CASE("f16: overflow, underflow, not-a-number") {
  CHECK(f32_to_f16(65504.0f) == 0x7bff);
  CHECK(f32_to_f16(65519.996f) == 0x7bff);
  CHECK(f32_to_f16(65520.0f) == 0x7c00);
  CHECK(f32_to_f16(-1e30f) == 0xfc00);
  CHECK(f32_to_f16(-kInf) == 0xfc00);
  CHECK(f32_to_f16(0x1p-25f) == 0);
  CHECK(f32_to_f16(std::nextafter(0x1p-25f, 1.0f)) == 1);
  CHECK(f32_to_f16(-1e-45f) == 0x8000);
  CHECK(std::isnan(f16_to_f32(f32_to_f16(std::numeric_limits<float>::signaling_NaN()))));
}

TEST_CASE("bf16: every number round-trips, narrowing rounds to nearest even") {
  int wrong = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto h = static_cast<uint16_t>(i);
    const float value = bf16_to_f32(h);
    wrong += std::bit_cast<uint32_t>(value) != i << 16;
    wrong +=
        std::isnan(value) ? !std::isnan(bf16_to_f32(f32_to_bf16(value))) : f32_to_bf16(value) != h;
  }
  CHECK(wrong == 0);
  check_rounding(f32_to_bf16, bf16_to_f32, 0x7f7f);
  CHECK(f32_to_bf16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}
