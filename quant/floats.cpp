// F32, F16 and BF16: plain arrays, a block is one element.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "quant/block_codec.h"
#include "quant/f16.h"
#include "quant/float8.h"

namespace duet {
namespace {

void decode_f32(const void* src, float* dst, size_t n) noexcept {
  std::memcpy(dst, src, n * sizeof(float));
}
void encode_f32(const float* src, void* dst, size_t n, const float*) noexcept {
  std::memcpy(dst, src, n * sizeof(float));
}
// A file may place F32 rows at any 2-byte boundary, hence memcpy.
bool finite_f32(const void* src, size_t n) noexcept {
  const auto* bytes = static_cast<const char*>(src);
  for (size_t i = 0; i < n; ++i) {
    float value;
    std::memcpy(&value, bytes + i * sizeof(float), sizeof(float));
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <float (*kWiden)(uint16_t)>
void decode_half(const void* src, float* dst, size_t n) noexcept {
  const auto* half = static_cast<const uint16_t*>(src);
  for (size_t i = 0; i < n; ++i) dst[i] = kWiden(half[i]);
}
template <uint16_t (*kNarrow)(float)>
void encode_half(const float* src, void* dst, size_t n, const float*) noexcept {
  auto* half = static_cast<uint16_t*>(dst);
  for (size_t i = 0; i < n; ++i) half[i] = kNarrow(src[i]);
}
template <uint16_t kExponentMask>
bool finite_half(const void* src, size_t n) noexcept {
  const auto* half = static_cast<const uint16_t*>(src);
  bool finite = true;
  for (size_t i = 0; i < n; ++i) finite &= (half[i] & kExponentMask) != kExponentMask;
  return finite;
}

// Exponent 15 with mantissa 7 alone is NaN.
float f8_e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits >> 7 ? -magnitude : magnitude;
}

void decode_f8_e4m3(const void* src, float* dst, size_t n) noexcept {
  static const std::array<float, 256> kValues = [] {
    std::array<float, 256> values{};
    for (size_t i = 0; i < values.size(); ++i) values[i] = f8_e4m3_value(static_cast<uint8_t>(i));
    return values;
  }();
  const auto* bytes = static_cast<const uint8_t*>(src);
  for (size_t i = 0; i < n; ++i) dst[i] = kValues[bytes[i]];
}
bool finite_f8_e4m3(const void* src, size_t n) noexcept {
  const auto* bytes = static_cast<const uint8_t*>(src);
  bool finite = true;
  for (size_t i = 0; i < n; ++i) finite &= (bytes[i] & 0x7f) != 0x7f;
  return finite;
}

}  // namespace

const Format& f8_e4m3() {
  static const Format kFormat = {static_cast<DType>(38), "F8_E4M3", 1, 1, ActFormat::f32, decode_f8_e4m3, nullptr, finite_f8_e4m3};
  return kFormat;
}

extern const Format kFormatF32, kFormatF16, kFormatBF16;
const Format kFormatF32 = {DType::F32,     "F32",      1,          4,
                           ActFormat::f32, decode_f32, encode_f32, finite_f32};
const Format kFormatF16 = {DType::F16,
                           "F16",
                           1,
                           2,
                           ActFormat::f32,
                           decode_half<f16_to_f32>,
                           encode_half<f32_to_f16>,
                           finite_half<0x7c00>};
const Format kFormatBF16 = {DType::BF16,
                            "BF16",
                            1,
                            2,
                            ActFormat::f32,
                            decode_half<bf16_to_f32>,
                            encode_half<f32_to_bf16>,
                            finite_half<0x7f80>};

}  // namespace duet
