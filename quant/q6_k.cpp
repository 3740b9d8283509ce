// Q6_K: 16 groups of 16, x = d * scale * (q - 32). Element 128 h + 32 k + l has its low nibble in
// ql[64 h + 32 (k % 2) + l] (low half for k < 2) and its upper two bits at bit 2k of qh[32 h + l].
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

void decode(const BlockQ6_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (size_t group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(b.scales[group]);
    const size_t half = group / 8, k = group % 8 / 2, odd = group % 2 * 16;
    const uint8_t* ql = b.ql + 64 * half + 32 * (k % 2) + odd;
    const uint8_t* qh = b.qh + 32 * half + odd;
    const size_t low_shift = k / 2 * 4, high_shift = 2 * k;
    for (size_t l = 0; l < 16; ++l) {
      const int q = ((ql[l] >> low_shift) & 15) | (((qh[l] >> high_shift) & 3) << 4);
      y[16 * group + l] = scale * static_cast<float>(q - 32);
    }
  }
}

void pack(const BlockParts& parts, BlockQ6_K& b) noexcept {
  b.d = parts.unit;
  for (size_t g = 0; g < 16; ++g) b.scales[g] = static_cast<int8_t>(parts.scale[g]);
  for (size_t half = 0; half < 2; ++half) {
    const uint8_t* q = parts.q + 128 * half;
    for (size_t l = 0; l < 32; ++l) {
      b.ql[64 * half + l] = static_cast<uint8_t>((q[l] & 15) | ((q[l + 64] & 15) << 4));
      b.ql[64 * half + 32 + l] = static_cast<uint8_t>((q[l + 32] & 15) | ((q[l + 96] & 15) << 4));
      b.qh[32 * half + l] = static_cast<uint8_t>((q[l] >> 4) | ((q[l + 32] >> 4) << 2) |
                                                 ((q[l + 64] >> 4) << 4) | ((q[l + 96] >> 4) << 6));
    }
  }
}

void unpack(const BlockQ6_K& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  for (size_t g = 0; g < 16; ++g) parts.scale[g] = b.scales[g];
  for (size_t half = 0; half < 2; ++half) {
    uint8_t* q = parts.q + 128 * half;
    for (size_t l = 0; l < 32; ++l) {
      const uint8_t *ql = b.ql + 64 * half + l, high = b.qh[32 * half + l];
      q[l] = static_cast<uint8_t>((ql[0] & 15) | ((high & 3) << 4));
      q[l + 32] = static_cast<uint8_t>((ql[32] & 15) | (((high >> 2) & 3) << 4));
      q[l + 64] = static_cast<uint8_t>((ql[0] >> 4) | (((high >> 4) & 3) << 4));
      q[l + 96] = static_cast<uint8_t>((ql[32] >> 4) | ((high >> 6) << 4));
    }
  }
}

void encode(const float* x, const float* importance, BlockQ6_K& b) noexcept {
  SymmetricSuperFit fit;
  fit_symmetric_super({.zero = 32, .scale_max = 127}, x, importance, fit);
  pack(parts_of(fit), b);
}

}  // namespace

extern const BlockGrid kGridQ6_K;
const BlockGrid kGridQ6_K = {.group_elems = 16, .n_groups = 16, .q_max = 63, .zero = 32,
                             .scale_lo = -128, .scale_hi = 127, .offset_max = 0, .offset_sign = 0,
                             .unit_positive = false, .unpack = unpack_block<BlockQ6_K, unpack>,
                             .pack = pack_block<BlockQ6_K, pack>};
extern const Format kFormatQ6_K;
const Format kFormatQ6_K = {DType::Q6_K,
                            "Q6_K",
                            kSuperBlock,
                            sizeof(BlockQ6_K),
                            ActFormat::act256,
                            decode_blocks<BlockQ6_K, kSuperBlock, decode>,
                            encode_blocks<BlockQ6_K, kSuperBlock, encode>,
                            all_blocks_finite<BlockQ6_K, kSuperBlock, d_finite>};

}  // namespace duet
