// IQ1_S .. IQ3_S and the ternary formats: read only.
#include "quant/block_codec.h"
#include "quant/f16.h"
#include "quant/iq_blocks.h"

namespace duet {
namespace {

template <class Block>
void decode_wide(const Block& b, float* y) noexcept {
  WideBlock wide;
  unpack(b, wide);
  for (size_t i = 0; i < kSuperBlock; ++i) y[i] = wide.d * static_cast<float>(wide.scale[i / 16]) * static_cast<float>(wide.q[i]);
}

bool iq1_m_finite(const BlockIQ1_M& b) noexcept { return f16_finite(scale_bits(b)); }

template <class Block, bool (*kFinite)(const Block&) noexcept = d_finite<Block>>
constexpr Format wide_format(DType dtype, const char* name) {
  return {dtype, name, kSuperBlock, sizeof(Block), ActFormat::act256, decode_blocks<Block, kSuperBlock, decode_wide<Block>>,
          nullptr, all_blocks_finite<Block, kSuperBlock, kFinite>};
}

}  // namespace

extern const Format kFormatIQ1_S, kFormatIQ1_M, kFormatIQ2_XXS, kFormatIQ2_XS, kFormatIQ2_S, kFormatIQ3_XXS, kFormatIQ3_S;
extern const Format kFormatTQ1_0, kFormatTQ2_0;
const Format kFormatIQ1_S = wide_format<BlockIQ1_S>(DType::IQ1_S, "IQ1_S");
const Format kFormatIQ1_M = wide_format<BlockIQ1_M, iq1_m_finite>(DType::IQ1_M, "IQ1_M");
const Format kFormatIQ2_XXS = wide_format<BlockIQ2_XXS>(DType::IQ2_XXS, "IQ2_XXS");
const Format kFormatIQ2_XS = wide_format<BlockIQ2_XS>(DType::IQ2_XS, "IQ2_XS");
const Format kFormatIQ2_S = wide_format<BlockIQ2_S>(DType::IQ2_S, "IQ2_S");
const Format kFormatIQ3_XXS = wide_format<BlockIQ3_XXS>(DType::IQ3_XXS, "IQ3_XXS");
const Format kFormatIQ3_S = wide_format<BlockIQ3_S>(DType::IQ3_S, "IQ3_S");
const Format kFormatTQ1_0 = wide_format<BlockTQ1_0>(DType::TQ1_0, "TQ1_0");
const Format kFormatTQ2_0 = wide_format<BlockTQ2_0>(DType::TQ2_0, "TQ2_0");

}  // namespace duet
