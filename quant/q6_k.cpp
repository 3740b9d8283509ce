// Q6_K: 16 groups of 16, x = d * scale * (q - 32). Element 128 h + 32 k + l has its low nibble in
// ql[64 h + 32 (k % 2) + l] (low half for k < 2) and its upper two bits at bit 2k of qh[32 h + l].
#include "quant/block_codec.h"
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

}  // namespace

extern const Format kFormatQ6_K;
const Format kFormatQ6_K = {DType::Q6_K,       "Q6_K",
                            kSuperBlock,       sizeof(BlockQ6_K),
                            ActFormat::act256, decode_blocks<BlockQ6_K, kSuperBlock, decode>,
                            nullptr,           all_blocks_finite<BlockQ6_K, kSuperBlock, d_finite>};

}  // namespace duet
