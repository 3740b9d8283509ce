// Q5_0: 32 elements, x = d * (q - 16). Low nibbles as in Q4_0; bit j of qh is the fifth bit of
// element j.
#include "quant/block_codec.h"
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

void pack(const BlockFit& fit, BlockQ5_0& b) noexcept {
  b.d = fit.d;
  pack_5bit(fit.q, b.qs, b.qh);
}

}  // namespace

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
