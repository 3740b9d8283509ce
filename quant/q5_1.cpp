// Q5_1: 32 elements, x = d * q + m. Bits as in Q5_0.
#include "quant/block_codec.h"
#include "quant/block_parts.h"
#include "quant/f16.h"

namespace duet {
namespace {

constexpr size_t kElems = 32;

void decode(const BlockQ5_1& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  uint8_t q[kElems];
  unpack_5bit(b.qs, b.qh, q);
  for (size_t j = 0; j < kElems; ++j) y[j] = static_cast<float>(q[j]) * d + m;
}

void pack(const BlockParts& parts, BlockQ5_1& b) noexcept {
  b.d = parts.unit;
  b.m = parts.offset_unit;
  pack_5bit(parts.q, b.qs, b.qh);
}

void unpack(const BlockQ5_1& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.scale[0] = 1;
  parts.offset_unit = b.m;
  parts.offset[0] = 1;
  unpack_5bit(b.qs, b.qh, parts.q);
}

}  // namespace

extern const BlockGrid kGridQ5_1;
const BlockGrid kGridQ5_1 = {.group_elems = 32, .n_groups = 1, .q_max = 31, .zero = 0,
                            .scale_lo = 1, .scale_hi = 1, .offset_max = 1, .offset_sign = 1,
                            .unit_positive = false, .unpack = unpack_block<BlockQ5_1, unpack>,
                            .pack = pack_block<BlockQ5_1, pack>};
extern const Format kFormatQ5_1;
const Format kFormatQ5_1 = {DType::Q5_1,
                            "Q5_1",
                            kElems,
                            sizeof(BlockQ5_1),
                            ActFormat::act32,
                            decode_blocks<BlockQ5_1, kElems, decode>,
                            encode_fitted<BlockQ5_1, 31, true, pack>,
                            all_blocks_finite<BlockQ5_1, kElems, d_m_finite>};

}  // namespace duet
