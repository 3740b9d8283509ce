// NEON with dot products: formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL), activations.
#include "runtime/kernels/arm_neon.h"

namespace duet {
namespace {

// 16 where bit 16 i + lane of qh is set.
DUET_INLINE uint8x16_t fifth_bits(const uint8_t* qh, size_t i) {
  const uint8x16_t bytes = vcombine_u8(vdup_n_u8(qh[2 * i]), vdup_n_u8(qh[2 * i + 1]));
  const uint8x8_t bit_of = vcreate_u8(0x8040201008040201u);
  return vandq_u8(vtstq_u8(bytes, vcombine_u8(bit_of, bit_of)), vdupq_n_u8(16));
}

DUET_INLINE int8x16_t quants(const BlockQ4_0& b, size_t i) {
  return minus(nibbles(b.qs, i == 1), 8);
}
DUET_INLINE int8x16_t quants(const BlockQ4_1& b, size_t i) {
  return vreinterpretq_s8_u8(nibbles(b.qs, i == 1));
}
DUET_INLINE int8x16_t quants(const BlockQ5_0& b, size_t i) {
  return minus(vorrq_u8(nibbles(b.qs, i == 1), fifth_bits(b.qh, i)), 16);
}
DUET_INLINE int8x16_t quants(const BlockQ5_1& b, size_t i) {
  return vreinterpretq_s8_u8(vorrq_u8(nibbles(b.qs, i == 1), fifth_bits(b.qh, i)));
}
DUET_INLINE int8x16_t quants(const BlockQ8_0& b, size_t i) { return vld1q_s8(b.qs + 16 * i); }
DUET_INLINE int8x16_t quants(const BlockIQ4_NL& b, size_t i) {
  return iq4_levels(nibbles(b.qs, i == 1));
}

template <class Block>
struct Block32Kernel {
  static constexpr bool kHasMinimum = requires(Block b) { b.m; };
  static constexpr size_t kActElems = 32, kPanelBlocks = kPanelCols / 32;
  using Act = BlockAct32;

  struct Panel {
    PanelQuants q;
    float d[kPanelBlocks][kPanelRows], m[kPanelBlocks][kPanelRows];
    size_t n_blocks;
  };

  static DUET_INLINE const Block& block_at(const std::byte* row, size_t b) {
    return reinterpret_cast<const Block*>(row)[b];
  }

  static DUET_INLINE float32x4_t strip(const std::byte* const (&w)[kStripRows], const std::byte* x,
                                       size_t cols) {
    float32x4_t acc = vdupq_n_f32(0.0f);
    for (size_t b = 0; b < cols / 32; ++b) {
      const Act& act = reinterpret_cast<const Act*>(x)[b];
      const int8x16_t x0 = vld1q_s8(act.qs), x1 = vld1q_s8(act.qs + 16);
      int32x4_t dot[kStripRows];
      uint16_t d[kStripRows], m[kStripRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kStripRows; ++r) {
        const Block& block = block_at(w[r], b);
        dot[r] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), quants(block, 0), x0), quants(block, 1), x1);
        d[r] = block.d;
        if constexpr (kHasMinimum) m[r] = block.m;
      }
      const float32x4_t scale = vmulq_n_f32(halves_to_floats(d), act.d);
      acc = vfmaq_f32(acc, vcvtq_f32_s32(lane_sums(dot)), scale);
      if constexpr (kHasMinimum)
        acc = vfmaq_n_f32(acc, halves_to_floats(m), act.d * static_cast<float>(act.sum));
    }
    return acc;
  }

  static void unpack(const std::byte* const (&w)[kPanelRows], size_t col, size_t end, Panel& out) {
    out.n_blocks = (end - col) / 32;
    for (size_t r = 0; r < kPanelRows; ++r) {
      for (size_t b = 0; b < out.n_blocks; ++b) {
        const Block& block = block_at(w[r], col / 32 + b);
        for (size_t i = 0; i < 2; ++i) put_columns(quants(block, i), r, out.q + 8 * b + 4 * i);
        out.d[b][r] = half_to_float(block.d);
        if constexpr (kHasMinimum) out.m[b][r] = half_to_float(block.m);
      }
    }
  }

  static DUET_INLINE void tile(const Panel& panel, const std::byte* const (&x)[kTileTokens],
                               float32x4_t (&acc)[kTileTokens][kPanelRows / 4]) {
    for (size_t b = 0; b < panel.n_blocks; ++b) {
      TileSums dot = {};
#pragma GCC unroll 2
      for (size_t i = 0; i < 2; ++i) {
        int8x16_t columns[kTileTokens];
#pragma GCC unroll 4
        for (size_t t = 0; t < kTileTokens; ++t)
          columns[t] = vld1q_s8(reinterpret_cast<const Act*>(x[t])[b].qs + 16 * i);
        add_columns(panel.q + 8 * b + 4 * i, columns, dot);
      }
#pragma GCC unroll 4
      for (size_t t = 0; t < kTileTokens; ++t) {
        const Act& act = reinterpret_cast<const Act*>(x[t])[b];
#pragma GCC unroll 2
        for (size_t h = 0; h < kPanelRows / 4; ++h) {
          const float32x4_t scale = vmulq_n_f32(vld1q_f32(panel.d[b] + 4 * h), act.d);
          acc[t][h] = vfmaq_f32(acc[t][h], vcvtq_f32_s32(dot[t][h]), scale);
          if constexpr (kHasMinimum) {
            const float sum = act.d * static_cast<float>(act.sum);
            acc[t][h] = vfmaq_n_f32(acc[t][h], vld1q_f32(panel.m[b] + 4 * h), sum);
          }
        }
      }
    }
  }
};

// ---- activations --------------------------------------------------------------------------------
struct BlockScale {
  float d, inverse;  // inverse 0: all quants are 0
};

DUET_INLINE BlockScale block_scale(const float* x, size_t n) {
  uint32x4_t top = vdupq_n_u32(0);  // of |x| by its bits: NaN and infinity come out on top
  for (size_t i = 0; i < n; i += 4)
    top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
  const uint32_t bits = vmaxvq_u32(top);
  float max;
  __builtin_memcpy(&max, &bits, 4);
  if (bits >= 0x7f800000u) return {__builtin_nanf(""), 0.0f};
  if (max < kActFloor) return {0.0f, 0.0f};
  return {max / 127.0f, 127.0f / max};
}

// 16 values as bytes, rounded to nearest even; |x * inverse| rounds to at most 127.
DUET_INLINE int8x16_t quantize16(const float* x, float inverse) {
  if (inverse == 0.0f) return vdupq_n_s8(0);
  const auto four = [&](size_t i) {
    return vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), inverse)));
  };
  return vcombine_s8(vmovn_s16(vcombine_s16(four(0), four(1))),
                     vmovn_s16(vcombine_s16(four(2), four(3))));
}

void quantize_act32(const float* x, void* dst, size_t n) noexcept {
  auto* out = static_cast<BlockAct32*>(dst);
  for (size_t b = 0; b < n / 32; ++b) {
    const BlockScale scale = block_scale(x + 32 * b, 32);
    const int8x16_t low = quantize16(x + 32 * b, scale.inverse),
                    high = quantize16(x + 32 * b + 16, scale.inverse);
    out[b].d = scale.d;
    out[b].sum = vaddlvq_s8(low) + vaddlvq_s8(high);
    vst1q_s8(out[b].qs, low);
    vst1q_s8(out[b].qs + 16, high);
  }
}

void quantize_act256(const float* x, void* dst, size_t n) noexcept {
  auto* out = static_cast<BlockAct256*>(dst);
  for (size_t b = 0; b < n / 256; ++b) {
    const BlockScale scale = block_scale(x + 256 * b, 256);
    out[b].d = scale.d;
    for (size_t g = 0; g < 16; ++g) {
      const int8x16_t q = quantize16(x + 256 * b + 16 * g, scale.inverse);
      vst1q_s8(out[b].qs + 16 * g, q);
      out[b].bsums[g] = vaddlvq_s8(q);
    }
    vst1q_s16(out[b].bsums32, vpaddq_s16(vld1q_s16(out[b].bsums), vld1q_s16(out[b].bsums + 8)));
  }
}

}  // namespace

void add_neon_block32(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q4_0)] = matmul_neon<Block32Kernel<BlockQ4_0>>;
  table.matmul[static_cast<size_t>(DType::Q4_1)] = matmul_neon<Block32Kernel<BlockQ4_1>>;
  table.matmul[static_cast<size_t>(DType::Q5_0)] = matmul_neon<Block32Kernel<BlockQ5_0>>;
  table.matmul[static_cast<size_t>(DType::Q5_1)] = matmul_neon<Block32Kernel<BlockQ5_1>>;
  table.matmul[static_cast<size_t>(DType::Q8_0)] = matmul_neon<Block32Kernel<BlockQ8_0>>;
  table.matmul[static_cast<size_t>(DType::IQ4_NL)] = matmul_neon<Block32Kernel<BlockIQ4_NL>>;
  table.quantize_act32 = quantize_act32;
  table.quantize_act256 = quantize_act256;
}

}  // namespace duet
