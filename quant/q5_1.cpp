// Q5_1: 32 elements, x = d * q + m. Bits as in Q5_0.
#include "quant/block_codec.h"
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

void pack(const BlockFit& fit, BlockQ5_1& b) noexcept {
  b.d = fit.d;
  b.m = fit.m;
  pack_5bit(fit.q, b.qs, b.qh);
}

}  // namespace

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
