#include "tests/support/blocks.h"

#include <cstddef>
#include <vector>

#include "quant/f16.h"

namespace duet::test {
namespace {

// Small integers would do for any format: random quants stay, only the scales must be tame.
uint16_t random_scale(Rng& rng) { return f32_to_f16((0.5f + 0.25f * rng.symmetric()) * 0x1p-6f); }

void fill_random_floats(const Format& format, void* dst, size_t n, Rng& rng) {
  std::vector<float> values(n);
  for (float& v : values) v = rng.symmetric();
  format.encode_row(values.data(), dst, n, nullptr);
}

void store_half(std::byte* block, int offset, uint16_t half) {
  if (offset >= 0) std::memcpy(block + offset, &half, sizeof half);
}

// A nibble on top of each of four words, lowest first.
void store_nibbles(uint8_t scales[8], uint16_t half) {
  for (size_t i = 0; i < 4; ++i) {
    uint8_t& byte = scales[2 * i + 1];
    byte = static_cast<uint8_t>((byte & 15) | (half >> (4 * i) & 15) << 4);
  }
}

}  // namespace

ScaleFields scale_fields(DType dtype) {
  const auto at = [](size_t d) { return static_cast<int>(d); };
  switch (dtype) {
    case DType::Q4_1:
      return {at(offsetof(BlockQ4_1, d)), at(offsetof(BlockQ4_1, m))};
    case DType::Q5_1:
      return {at(offsetof(BlockQ5_1, d)), at(offsetof(BlockQ5_1, m))};
    case DType::Q2_K:
      return {at(offsetof(BlockQ2_K, d)), at(offsetof(BlockQ2_K, dmin))};
    case DType::Q4_K:
      return {at(offsetof(BlockQ4_K, d)), at(offsetof(BlockQ4_K, dmin))};
    case DType::Q5_K:
      return {at(offsetof(BlockQ5_K, d)), at(offsetof(BlockQ5_K, dmin))};
    case DType::Q3_K:
      return {at(offsetof(BlockQ3_K, d)), -1};
    case DType::Q6_K:
      return {at(offsetof(BlockQ6_K, d)), -1};
    case DType::Q4_0:
    case DType::Q5_0:
    case DType::Q8_0:
    case DType::IQ4_NL:
    case DType::IQ4_XS:
    case DType::IQ1_S:
    case DType::IQ2_XXS:
    case DType::IQ2_XS:
    case DType::IQ2_S:
    case DType::IQ3_XXS:
    case DType::IQ3_S:
      return {0, -1};
    case DType::TQ1_0:
      return {at(offsetof(BlockTQ1_0, d)), -1};
    case DType::TQ2_0:
      return {at(offsetof(BlockTQ2_0, d)), -1};
    case DType::IQ1_M:  // in four pieces
    case DType::F32:
    case DType::F16:
    case DType::BF16:
      break;
  }
  return {};
}

void fill_weights_with_scale(const Format& format, void* dst, size_t n, uint16_t d, uint16_t dmin,
                             Rng& rng) {
  const ScaleFields fields = scale_fields(format.dtype);
  auto* block = static_cast<std::byte*>(dst);
  rng.fill({block, row_bytes(format, n)});
  for (size_t i = 0; i < n / format.block_elems; ++i, block += format.block_bytes) {
    store_half(block, fields.d, d);
    if (format.dtype == DType::IQ1_M) store_nibbles(reinterpret_cast<BlockIQ1_M*>(block)->scales, d);
    store_half(block, fields.dmin, dmin);
  }
}

void fill_random_weights(const Format& format, void* dst, size_t n, Rng& rng) {
  if (format.act == ActFormat::f32) return fill_random_floats(format, dst, n, rng);
  auto* block = static_cast<std::byte*>(dst);
  for (size_t i = 0; i < n / format.block_elems; ++i, block += format.block_bytes) {
    const uint16_t sign =
        static_cast<uint16_t>((rng.next() & 1u) << 15);  // negative scales occur in files
    fill_weights_with_scale(format, block, format.block_elems,
                            static_cast<uint16_t>(random_scale(rng) | sign), random_scale(rng),
                            rng);
  }
}

}  // namespace duet::test
