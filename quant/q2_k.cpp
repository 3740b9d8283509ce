// Q2_K: 16 groups of 16, x = d * scale * q - dmin * min; scale is the low, min the high nibble of
// scales[group]. Bits 2k and 2k + 1 of qs[32 h + l] are element 128 h + 32 k + l.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

void decode(const BlockQ2_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (size_t group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(b.scales[group] & 15);
    const float min = dmin * static_cast<float>(b.scales[group] >> 4);
    const uint8_t* qs = b.qs + 32 * (group / 8) + 16 * (group % 2);
    const size_t shift = group % 8 / 2 * 2;
    for (size_t l = 0; l < 16; ++l)
      y[16 * group + l] = scale * static_cast<float>((qs[l] >> shift) & 3) - min;
  }
}

void pack(const BlockParts& parts, BlockQ2_K& b) noexcept {
  b.d = parts.unit;
  b.dmin = parts.offset_unit;
  for (size_t g = 0; g < 16; ++g)
    b.scales[g] = static_cast<uint8_t>(parts.scale[g] | (parts.offset[g] << 4));
  pack_2bit(parts.q, b.qs);
}

void unpack(const BlockQ2_K& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.offset_unit = b.dmin;
  for (size_t g = 0; g < 16; ++g) {
    parts.scale[g] = b.scales[g] & 15;
    parts.offset[g] = b.scales[g] >> 4;
  }
  unpack_2bit(b.qs, parts.q);
}

void encode(const float* x, const float* importance, BlockQ2_K& b) noexcept {
  AffineSuperFit fit;
  fit_affine_super({.group_elems = 16, .q_max = 3, .scale_max = 15}, x, importance, fit);
  pack(parts_of(fit), b);
}

}  // namespace

extern const BlockGrid kGridQ2_K;
const BlockGrid kGridQ2_K = {.group_elems = 16, .n_groups = 16, .q_max = 3, .zero = 0,
                             .scale_lo = 0, .scale_hi = 15, .offset_max = 15, .offset_sign = -1,
                             .unit_positive = true, .unpack = unpack_block<BlockQ2_K, unpack>,
                             .pack = pack_block<BlockQ2_K, pack>};
extern const Format kFormatQ2_K;
const Format kFormatQ2_K = {DType::Q2_K,
                            "Q2_K",
                            kSuperBlock,
                            sizeof(BlockQ2_K),
                            ActFormat::act256,
                            decode_blocks<BlockQ2_K, kSuperBlock, decode>,
                            encode_blocks<BlockQ2_K, kSuperBlock, encode>,
                            all_blocks_finite<BlockQ2_K, kSuperBlock, d_dmin_finite>};

}  // namespace duet
