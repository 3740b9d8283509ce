// Q8_0: 32 elements, x = d * q, q in [-127, 127] as written here ([-128, 127] is read).
#include <algorithm>
#include <cmath>

#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kElems = 32;

void decode(const BlockQ8_0& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (size_t j = 0; j < kElems; ++j) y[j] = static_cast<float>(b.qs[j]) * d;
}

// Rounds to nearest on the grid of the stored (half-precision) scale. A scale beyond half
// precision saturates: the block then decodes to at most 127 * 65504 in magnitude.
void encode(const float* x, BlockQ8_0& b) noexcept {
  float amax = 0;
  for (size_t j = 0; j < kElems; ++j) amax = std::max(amax, std::fabs(x[j]));
  b.d = f32_to_f16(std::min(amax / 127, kF16Max));
  if (b.d == 0 && amax > 0) b.d = 1;  // 6e-8, better than losing the block
  const float d = f16_to_f32(b.d);
  const float inverse = d > 0 ? 1 / d : 0.0f;
  for (size_t j = 0; j < kElems; ++j) {
    const float q = std::clamp(x[j] * inverse, -127.0f, 127.0f);
    b.qs[j] = static_cast<int8_t>(static_cast<int>(q + std::copysign(0.5f, q)));
  }
}

void encode_row(const float* src, void* dst, size_t n, const float*) noexcept {
  auto* block = static_cast<BlockQ8_0*>(dst);
  for (size_t i = 0; i < n; i += kElems) encode(src + i, *block++);
}

void pack(const BlockParts& parts, BlockQ8_0& b) noexcept {
  b.d = parts.unit;
  for (size_t j = 0; j < kElems; ++j) b.qs[j] = static_cast<int8_t>(parts.q[j] - 127);
}

void unpack(const BlockQ8_0& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.scale[0] = 1;
  for (size_t j = 0; j < kElems; ++j)
    parts.q[j] = static_cast<uint8_t>(std::max<int>(b.qs[j], -127) + 127);
}

}  // namespace

extern const BlockGrid kGridQ8_0;
const BlockGrid kGridQ8_0 = {.group_elems = 32, .n_groups = 1, .q_max = 254, .zero = 127,
                             .scale_lo = 1, .scale_hi = 1, .offset_max = 0, .offset_sign = 0,
                             .unit_positive = false, .unpack = unpack_block<BlockQ8_0, unpack>,
                             .pack = pack_block<BlockQ8_0, pack>};
extern const Format kFormatQ8_0;
const Format kFormatQ8_0 = {DType::Q8_0,      "Q8_0",
                            kElems,           sizeof(BlockQ8_0),
                            ActFormat::act32, decode_blocks<BlockQ8_0, kElems, decode>,
                            encode_row,       all_blocks_finite<BlockQ8_0, kElems, d_finite>};

}  // namespace duet
