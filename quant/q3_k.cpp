// Q3_K: 16 groups of 16, x = d * (scale - 32) * (q - 4). The low two bits of q lie as in Q2_K; bit
// 4 h + k of hmask[l] is the third bit of element 128 h + 32 k + l.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

// Sixteen 6-bit scales in 12 bytes: low nibbles of groups 0-7, then 8-15, in bytes 0-7; the upper
// two bits of group g at bits 2 (g / 4) of byte 8 + g % 4.
void unpack_scales(const uint8_t in[12], int scales[16]) {
  for (size_t g = 0; g < 16; ++g) {
    const int low = (in[g % 8] >> (g / 8 * 4)) & 15;
    const int high = (in[8 + g % 4] >> (g / 4 * 2)) & 3;
    scales[g] = (low | (high << 4)) - 32;
  }
}

void decode(const BlockQ3_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  int scales[16];
  unpack_scales(b.scales, scales);
  for (size_t group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(scales[group]);
    const uint8_t* qs = b.qs + 32 * (group / 8) + 16 * (group % 2);
    const uint8_t* hmask = b.hmask + 16 * (group % 2);
    const size_t shift = group % 8 / 2 * 2, bit = group / 2;
    for (size_t l = 0; l < 16; ++l) {
      const int q = ((qs[l] >> shift) & 3) + ((hmask[l] >> bit) & 1) * 4;
      y[16 * group + l] = scale * static_cast<float>(q - 4);
    }
  }
}

void pack_scales(const int16_t scales[16], uint8_t out[12]) {
  for (size_t i = 0; i < 12; ++i) out[i] = 0;
  for (size_t g = 0; g < 16; ++g) {
    const int v = scales[g] + 32;
    out[g % 8] = static_cast<uint8_t>(out[g % 8] | ((v & 15) << (g / 8 * 4)));
    out[8 + g % 4] = static_cast<uint8_t>(out[8 + g % 4] | ((v >> 4) << (g / 4 * 2)));
  }
}

void pack(const BlockParts& parts, BlockQ3_K& b) noexcept {
  b.d = parts.unit;
  pack_scales(parts.scale, b.scales);
  uint8_t low[kSuperBlock];
  for (size_t i = 0; i < kSuperBlock; ++i) low[i] = parts.q[i] & 3;
  pack_2bit(low, b.qs);
  for (size_t l = 0; l < 32; ++l) {
    int bits = 0;
    for (size_t k = 0; k < 8; ++k) bits |= (parts.q[32 * k + l] >> 2) << k;
    b.hmask[l] = static_cast<uint8_t>(bits);
  }
}

void unpack(const BlockQ3_K& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  int scales[16];
  unpack_scales(b.scales, scales);
  for (size_t g = 0; g < 16; ++g) parts.scale[g] = static_cast<int16_t>(scales[g]);
  unpack_2bit(b.qs, parts.q);
  for (size_t i = 0; i < kSuperBlock; ++i)
    parts.q[i] = static_cast<uint8_t>(parts.q[i] | (((b.hmask[i % 32] >> (i / 32)) & 1) << 2));
}

void encode(const float* x, const float* importance, BlockQ3_K& b) noexcept {
  SymmetricSuperFit fit;
  fit_symmetric_super({.zero = 4, .scale_max = 31}, x, importance, fit);
  pack(parts_of(fit), b);
}

}  // namespace

extern const BlockGrid kGridQ3_K;
const BlockGrid kGridQ3_K = {.group_elems = 16, .n_groups = 16, .q_max = 7, .zero = 4,
                             .scale_lo = -32, .scale_hi = 31, .offset_max = 0, .offset_sign = 0,
                             .unit_positive = false, .unpack = unpack_block<BlockQ3_K, unpack>,
                             .pack = pack_block<BlockQ3_K, pack>};
extern const Format kFormatQ3_K;
const Format kFormatQ3_K = {DType::Q3_K,
                            "Q3_K",
                            kSuperBlock,
                            sizeof(BlockQ3_K),
                            ActFormat::act256,
                            decode_blocks<BlockQ3_K, kSuperBlock, decode>,
                            encode_blocks<BlockQ3_K, kSuperBlock, encode>,
                            all_blocks_finite<BlockQ3_K, kSuperBlock, d_finite>};

}  // namespace duet
