// Q4_0: 32 elements, x = d * (q - 8). Element j is the low nibble of byte j, j + 16 the high one.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kElems = 32;

void decode(const BlockQ4_0& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (size_t j = 0; j < 16; ++j) {
    y[j] = static_cast<float>((b.qs[j] & 15) - 8) * d;
    y[j + 16] = static_cast<float>((b.qs[j] >> 4) - 8) * d;
  }
}

void pack(const BlockParts& parts, BlockQ4_0& b) noexcept {
  b.d = parts.unit;
  pack_nibbles(parts.q, b.qs);
}

void unpack(const BlockQ4_0& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.scale[0] = 1;
  unpack_nibbles(b.qs, parts.q);
}

}  // namespace

extern const BlockGrid kGridQ4_0;
const BlockGrid kGridQ4_0 = {.group_elems = 32, .n_groups = 1, .q_max = 15, .zero = 8,
                            .scale_lo = 1, .scale_hi = 1, .offset_max = 0, .offset_sign = 0,
                            .unit_positive = false, .unpack = unpack_block<BlockQ4_0, unpack>,
                            .pack = pack_block<BlockQ4_0, pack>};
extern const Format kFormatQ4_0;
const Format kFormatQ4_0 = {DType::Q4_0,
                            "Q4_0",
                            kElems,
                            sizeof(BlockQ4_0),
                            ActFormat::act32,
                            decode_blocks<BlockQ4_0, kElems, decode>,
                            encode_fitted<BlockQ4_0, 15, false, pack>,
                            all_blocks_finite<BlockQ4_0, kElems, d_finite>};

}  // namespace duet
