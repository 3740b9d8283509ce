// Q5_K: 8 groups of 32, x = d * scale * q - dmin * min. Low nibbles as in Q4_K; bit g of qh[l] is
// the fifth bit of element 32 g + l.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

void decode(const BlockQ5_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  uint8_t scales[8], mins[8];
  unpack_k4_scales(b.scales, scales, mins);
  for (size_t group = 0; group < 8; ++group) {
    const float scale = d * static_cast<float>(scales[group]),
                min = dmin * static_cast<float>(mins[group]);
    const uint8_t* qs = b.qs + 32 * (group / 2);
    const size_t shift = group % 2 * 4;
    for (size_t l = 0; l < 32; ++l) {
      const int q = ((qs[l] >> shift) & 15) + ((b.qh[l] >> group) & 1) * 16;
      y[32 * group + l] = scale * static_cast<float>(q) - min;
    }
  }
}

void pack(const BlockParts& parts, BlockQ5_K& b) noexcept {
  b.d = parts.unit;
  b.dmin = parts.offset_unit;
  pack_k4_scales(parts, b.scales);
  for (size_t i = 0; i < 128; ++i) {
    const uint8_t* q = parts.q + 64 * (i / 32) + i % 32;
    b.qs[i] = static_cast<uint8_t>((q[0] & 15) | ((q[32] & 15) << 4));
  }
  for (size_t l = 0; l < 32; ++l) {
    int bits = 0;
    for (size_t g = 0; g < 8; ++g) bits |= (parts.q[32 * g + l] >> 4) << g;
    b.qh[l] = static_cast<uint8_t>(bits);
  }
}

void unpack(const BlockQ5_K& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.offset_unit = b.dmin;
  unpack_k4_scales(b.scales, parts);
  for (size_t i = 0; i < 128; ++i) {
    const size_t p = i / 32, l = i % 32;
    uint8_t* q = parts.q + 64 * p + l;
    q[0] = static_cast<uint8_t>((b.qs[i] & 15) | (((b.qh[l] >> (2 * p)) & 1) << 4));
    q[32] = static_cast<uint8_t>((b.qs[i] >> 4) | (((b.qh[l] >> (2 * p + 1)) & 1) << 4));
  }
}

void encode(const float* x, const float* importance, BlockQ5_K& b) noexcept {
  AffineSuperFit fit;
  fit_affine_super({.group_elems = 32, .q_max = 31, .scale_max = 63}, x, importance, fit);
  pack(parts_of(fit), b);
}

}  // namespace

extern const BlockGrid kGridQ5_K;
const BlockGrid kGridQ5_K = {.group_elems = 32, .n_groups = 8, .q_max = 31, .zero = 0,
                             .scale_lo = 0, .scale_hi = 63, .offset_max = 63, .offset_sign = -1,
                             .unit_positive = true, .unpack = unpack_block<BlockQ5_K, unpack>,
                             .pack = pack_block<BlockQ5_K, pack>};
extern const Format kFormatQ5_K;
const Format kFormatQ5_K = {DType::Q5_K,
                            "Q5_K",
                            kSuperBlock,
                            sizeof(BlockQ5_K),
                            ActFormat::act256,
                            decode_blocks<BlockQ5_K, kSuperBlock, decode>,
                            encode_blocks<BlockQ5_K, kSuperBlock, encode>,
                            all_blocks_finite<BlockQ5_K, kSuperBlock, d_dmin_finite>};

}  // namespace duet
