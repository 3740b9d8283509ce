// Q4_1: 32 elements, x = d * q + m. Nibbles as in Q4_0.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kElems = 32;

void decode(const BlockQ4_1& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  for (size_t j = 0; j < 16; ++j) {
    y[j] = static_cast<float>(b.qs[j] & 15) * d + m;
    y[j + 16] = static_cast<float>(b.qs[j] >> 4) * d + m;
  }
}

void pack(const BlockParts& parts, BlockQ4_1& b) noexcept {
  b.d = parts.unit;
  b.m = parts.offset_unit;
  pack_nibbles(parts.q, b.qs);
}

void unpack(const BlockQ4_1& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.scale[0] = 1;
  parts.offset_unit = b.m;
  parts.offset[0] = 1;
  unpack_nibbles(b.qs, parts.q);
}

}  // namespace

extern const BlockGrid kGridQ4_1;
const BlockGrid kGridQ4_1 = {.group_elems = 32, .n_groups = 1, .q_max = 15, .zero = 0,
                            .scale_lo = 1, .scale_hi = 1, .offset_max = 1, .offset_sign = 1,
                            .unit_positive = false, .unpack = unpack_block<BlockQ4_1, unpack>,
                            .pack = pack_block<BlockQ4_1, pack>};
extern const Format kFormatQ4_1;
const Format kFormatQ4_1 = {DType::Q4_1,
                            "Q4_1",
                            kElems,
                            sizeof(BlockQ4_1),
                            ActFormat::act32,
                            decode_blocks<BlockQ4_1, kElems, decode>,
                            encode_fitted<BlockQ4_1, 15, true, pack>,
                            all_blocks_finite<BlockQ4_1, kElems, d_m_finite>};

}  // namespace duet
