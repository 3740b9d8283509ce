// Q5_0: 32 elements, x = d * (q - 16). Low nibbles as in Q4_0; bit j of qh is the fifth bit of
// element j.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kElems = 32;

void decode(const BlockQ5_0& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  uint8_t q[kElems];
  unpack_5bit(b.qs, b.qh, q);
  for (size_t j = 0; j < kElems; ++j) y[j] = static_cast<float>(q[j] - 16) * d;
}

void pack(const BlockParts& parts, BlockQ5_0& b) noexcept {
  b.d = parts.unit;
  pack_5bit(parts.q, b.qs, b.qh);
}

void unpack(const BlockQ5_0& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.scale[0] = 1;
  unpack_5bit(b.qs, b.qh, parts.q);
}

}  // namespace

extern const BlockGrid kGridQ5_0;
const BlockGrid kGridQ5_0 = {.group_elems = 32, .n_groups = 1, .q_max = 31, .zero = 16,
                            .scale_lo = 1, .scale_hi = 1, .offset_max = 0, .offset_sign = 0,
                            .unit_positive = false, .unpack = unpack_block<BlockQ5_0, unpack>,
                            .pack = pack_block<BlockQ5_0, pack>};
extern const Format kFormatQ5_0;
const Format kFormatQ5_0 = {DType::Q5_0,
                            "Q5_0",
                            kElems,
                            sizeof(BlockQ5_0),
                            ActFormat::act32,
                            decode_blocks<BlockQ5_0, kElems, decode>,
                            encode_fitted<BlockQ5_0, 31, false, pack>,
                            all_blocks_finite<BlockQ5_0, kElems, d_finite>};

}  // namespace duet
