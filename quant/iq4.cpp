// IQ4_NL and IQ4_XS: 4-bit indices into a non-uniform table of levels. Read only.
#include "quant/block_codec.h"
#include "quant/f16.h"

namespace duet {
namespace {

// 32 elements, nibbles as in Q4_0, each an index into the table of levels.
void decode_levels(float scale, const uint8_t qs[16], float* y) {
  for (size_t j = 0; j < 16; ++j) {
    y[j] = scale * static_cast<float>(kIq4Levels[qs[j] & 15]);
    y[j + 16] = scale * static_cast<float>(kIq4Levels[qs[j] >> 4]);
  }
}

void decode_nl(const BlockIQ4_NL& b, float* y) noexcept { decode_levels(f16_to_f32(b.d), b.qs, y); }

// Group g of 32 has the 6-bit scale made of nibble g of scales_l and bits 2g, 2g + 1 of scales_h,
// less 32.
void decode_xs(const BlockIQ4_XS& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (size_t group = 0; group < 8; ++group) {
    const int low = (b.scales_l[group / 2] >> (group % 2 * 4)) & 15;
    const int high = (b.scales_h >> (2 * group)) & 3;
    decode_levels(d * static_cast<float>((low | (high << 4)) - 32), b.qs + 16 * group,
                  y + 32 * group);
  }
}

}  // namespace

extern const Format kFormatIQ4_NL;
const Format kFormatIQ4_NL = {DType::IQ4_NL,
                              "IQ4_NL",
                              32,
                              sizeof(BlockIQ4_NL),
                              ActFormat::act32,
                              decode_blocks<BlockIQ4_NL, 32, decode_nl>,
                              nullptr,
                              all_blocks_finite<BlockIQ4_NL, 32, d_finite>};
extern const Format kFormatIQ4_XS;
const Format kFormatIQ4_XS = {
    DType::IQ4_XS,     "IQ4_XS",
    kSuperBlock,       sizeof(BlockIQ4_XS),
    ActFormat::act256, decode_blocks<BlockIQ4_XS, kSuperBlock, decode_xs>,
    nullptr,           all_blocks_finite<BlockIQ4_XS, kSuperBlock, d_finite>};

}  // namespace duet
