// Q4_K: 8 groups of 32, x = d * scale * q - dmin * min. Byte 32 p + l of qs holds element 64 p + l
// in its low and 64 p + 32 + l in its high nibble.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

void decode(const BlockQ4_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  uint8_t scales[8], mins[8];
  unpack_k4_scales(b.scales, scales, mins);
  for (size_t group = 0; group < 8; ++group) {
    const float scale = d * static_cast<float>(scales[group]),
                min = dmin * static_cast<float>(mins[group]);
    const uint8_t* qs = b.qs + 32 * (group / 2);
    const size_t shift = group % 2 * 4;
    for (size_t l = 0; l < 32; ++l)
      y[32 * group + l] = scale * static_cast<float>((qs[l] >> shift) & 15) - min;
  }
}

void pack(const BlockParts& parts, BlockQ4_K& b) noexcept {
  b.d = parts.unit;
  b.dmin = parts.offset_unit;
  pack_k4_scales(parts, b.scales);
  for (size_t i = 0; i < 128; ++i) {
    const uint8_t* q = parts.q + 64 * (i / 32) + i % 32;
    b.qs[i] = static_cast<uint8_t>(q[0] | (q[32] << 4));
  }
}

void unpack(const BlockQ4_K& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.offset_unit = b.dmin;
  unpack_k4_scales(b.scales, parts);
  for (size_t i = 0; i < 128; ++i) {
    uint8_t* q = parts.q + 64 * (i / 32) + i % 32;
    q[0] = b.qs[i] & 15;
    q[32] = b.qs[i] >> 4;
  }
}

void encode(const float* x, const float* importance, BlockQ4_K& b) noexcept {
  AffineSuperFit fit;
  fit_affine_super({.group_elems = 32, .q_max = 15, .scale_max = 63}, x, importance, fit);
  pack(parts_of(fit), b);
}

}  // namespace

extern const BlockGrid kGridQ4_K;
const BlockGrid kGridQ4_K = {.group_elems = 32, .n_groups = 8, .q_max = 15, .zero = 0,
                             .scale_lo = 0, .scale_hi = 63, .offset_max = 63, .offset_sign = -1,
                             .unit_positive = true, .unpack = unpack_block<BlockQ4_K, unpack>,
                             .pack = pack_block<BlockQ4_K, pack>};
extern const Format kFormatQ4_K;
const Format kFormatQ4_K = {DType::Q4_K,
                            "Q4_K",
                            kSuperBlock,
                            sizeof(BlockQ4_K),
                            ActFormat::act256,
                            decode_blocks<BlockQ4_K, kSuperBlock, decode>,
                            encode_blocks<BlockQ4_K, kSuperBlock, encode>,
                            all_blocks_finite<BlockQ4_K, kSuperBlock, d_dmin_finite>};

}  // namespace duet
