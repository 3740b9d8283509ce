// The codebook formats (IQ1_S .. IQ3_S) and the ternary ones, unpacked to plain integers: what their
// decoding and their kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/format.h"

namespace duet {

// 256 values d * scale[i / 16] * q[i], every product exact in float. |q| <= 62, 1 <= scale <= 31.
struct WideBlock {
  float d;
  int8_t scale[16];
  int8_t q[256];
};
inline constexpr int kWideLargest = 62;

void unpack(const BlockIQ1_S& block, WideBlock& out) noexcept;
void unpack(const BlockIQ1_M& block, WideBlock& out) noexcept;
void unpack(const BlockIQ2_XXS& block, WideBlock& out) noexcept;
void unpack(const BlockIQ2_XS& block, WideBlock& out) noexcept;
void unpack(const BlockIQ2_S& block, WideBlock& out) noexcept;
void unpack(const BlockIQ3_XXS& block, WideBlock& out) noexcept;
void unpack(const BlockIQ3_S& block, WideBlock& out) noexcept;
void unpack(const BlockTQ1_0& block, WideBlock& out) noexcept;
void unpack(const BlockTQ2_0& block, WideBlock& out) noexcept;

}  // namespace duet
