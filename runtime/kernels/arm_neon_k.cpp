// NEON with dot products: the 256-element formats (Q2_K .. Q6_K, IQ4_XS) times act256. The scale of
// each group multiplies its integer sum, so that one conversion to float serves a super-block.
#include "runtime/kernels/arm_neon.h"

namespace duet {
namespace {

DUET_INLINE uint8x16_t bits_of(uint8x16_t v, int left, uint8_t mask) {
  return vandq_u8(shift_left(v, left), vdupq_n_u8(mask));
}
DUET_INLINE uint8x16_t two_bits(const uint8_t* qs, size_t i) {
  return bits_of(vld1q_u8(qs + 32 * (i / 8) + 16 * (i % 2)), -static_cast<int>(i % 8 / 2 * 2), 3);
}
DUET_INLINE uint8x16_t nibbles64(const uint8_t* qs, size_t i) {  // 64 values in 32 bytes
  return nibbles(qs + 32 * (i / 4) + 16 * (i % 2), i % 4 >= 2);
}

DUET_INLINE int8x16_t quants(const BlockQ2_K& b, size_t i) {
  return vreinterpretq_s8_u8(two_bits(b.qs, i));
}
DUET_INLINE int8x16_t quants(const BlockQ3_K& b, size_t i) {
  const uint8x16_t high = bits_of(vld1q_u8(b.hmask + 16 * (i % 2)), 2 - static_cast<int>(i / 2), 4);
  return minus(vorrq_u8(two_bits(b.qs, i), high), 4);
}
DUET_INLINE int8x16_t quants(const BlockQ4_K& b, size_t i) {
  return vreinterpretq_s8_u8(nibbles64(b.qs, i));
}
DUET_INLINE int8x16_t quants(const BlockQ5_K& b, size_t i) {
  const uint8x16_t high = bits_of(vld1q_u8(b.qh + 16 * (i % 2)), 4 - static_cast<int>(i / 2), 16);
  return vreinterpretq_s8_u8(vorrq_u8(nibbles64(b.qs, i), high));
}
DUET_INLINE int8x16_t quants(const BlockQ6_K& b, size_t i) {
  const size_t half = i / 8, j = i % 8;
  const uint8x16_t low = nibbles(b.ql + 64 * half + 16 * (j % 4), j >= 4);
  const uint8x16_t high = vld1q_u8(b.qh + 32 * half + 16 * (j % 2));
  return minus(vorrq_u8(low, bits_of(high, 4 - 2 * static_cast<int>(j / 2), 0x30)), 32);
}
DUET_INLINE int8x16_t quants(const BlockIQ4_XS& b, size_t i) {
  return iq4_levels(nibbles(b.qs + 16 * (i / 2), i % 2 == 1));
}

// ---- scales: one per group of 256 / kGroups values, in the first lanes --------------------------
struct KScales {
  int8x16_t scale;
  uint8x16_t min;  // only where the format has a dmin
};

DUET_INLINE uint8x8_t bytes8(uint32_t first4, uint32_t last4) {
  return vcreate_u8(first4 | (static_cast<uint64_t>(last4) << 32));
}

DUET_INLINE KScales load_scales(const BlockQ2_K& b) {
  return {vreinterpretq_s8_u8(nibbles(b.scales, false)), nibbles(b.scales, true)};
}
DUET_INLINE KScales load_scales(const BlockQ3_K& b) {
  uint32_t top;
  __builtin_memcpy(&top, b.scales + 8, 4);
  const uint8x8_t bytes = vld1_u8(b.scales);
  const uint8x16_t low = vcombine_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
  const int8x8_t down = vcreate_s8(0xfefefefe00000000u);  // 0, -2; the upper half another -4
  const uint8x16_t high = vshlq_u8(vreinterpretq_u8_u32(vdupq_n_u32(top)),
                                   vcombine_s8(down, vsub_s8(down, vdup_n_s8(4))));
  return {minus(vorrq_u8(low, vshlq_n_u8(vandq_u8(high, vdupq_n_u8(3)), 4)), 32), vdupq_n_u8(0)};
}
DUET_INLINE KScales load_scales_6bit(const uint8_t* packed) {
  uint32_t s[3];
  __builtin_memcpy(s, packed, 12);
  const uint32_t scale_high = (s[2] & 0x0f0f0f0fu) | (((s[0] >> 6) & 0x03030303u) << 4);
  const uint32_t min_high = ((s[2] >> 4) & 0x0f0f0f0fu) | (((s[1] >> 6) & 0x03030303u) << 4);
  const uint8x8_t scale = bytes8(s[0] & 0x3f3f3f3fu, scale_high);
  const uint8x8_t min = bytes8(s[1] & 0x3f3f3f3fu, min_high);
  return {vreinterpretq_s8_u8(vcombine_u8(scale, scale)), vcombine_u8(min, min)};
}
DUET_INLINE KScales load_scales(const BlockQ4_K& b) { return load_scales_6bit(b.scales); }
DUET_INLINE KScales load_scales(const BlockQ5_K& b) { return load_scales_6bit(b.scales); }
DUET_INLINE KScales load_scales(const BlockQ6_K& b) { return {vld1q_s8(b.scales), vdupq_n_u8(0)}; }
DUET_INLINE KScales load_scales(const BlockIQ4_XS& b) {
  uint32_t packed;
  __builtin_memcpy(&packed, b.scales_l, 4);
  const uint8x8_t bytes = bytes8(packed, 0);
  const uint8x8_t low = vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
  constexpr int16_t kDown[8] = {0, -2, -4, -6, -8, -10, -12, -14};
  const uint16x8_t pairs = vshlq_u16(vdupq_n_u16(b.scales_h), vld1q_s16(kDown));
  const uint8x8_t high = vshl_n_u8(vand_u8(vmovn_u16(pairs), vdup_n_u8(3)), 4);
  const uint8x8_t both = vorr_u8(low, high);
  return {minus(vcombine_u8(both, both), 32), vdupq_n_u8(0)};
}

template <class Block>
constexpr size_t kGroups = 16;
template <>
constexpr size_t kGroups<BlockQ4_K> = 8;
template <>
constexpr size_t kGroups<BlockQ5_K> = 8;
template <>
constexpr size_t kGroups<BlockIQ4_XS> = 8;

template <size_t Groups>
DUET_INLINE const int16_t* group_sums(const BlockAct256& x) {
  return Groups == 8 ? x.bsums32 : x.bsums;
}

template <class Block>
struct KKernel {
  static constexpr bool kHasMinimum = requires(Block b) { b.dmin; };
  static constexpr size_t kActElems = 256, kN = kGroups<Block>, kParts = 16 / kN;
  using Act = BlockAct256;

  struct Panel {
    PanelQuants q;
    int32_t scale[kN][kPanelRows];
    int16_t min[kN][kPanelRows];
    float d[kPanelRows], dmin[kPanelRows];
  };

  static DUET_INLINE void widen(int8x16_t v, int32_t (&out)[16]) {
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
    vst1q_s32(out, vmovl_s16(vget_low_s16(low)));
    vst1q_s32(out + 4, vmovl_s16(vget_high_s16(low)));
    vst1q_s32(out + 8, vmovl_s16(vget_low_s16(high)));
    vst1q_s32(out + 12, vmovl_s16(vget_high_s16(high)));
  }
  static DUET_INLINE int32x4_t times_sums(int32x4_t sum, uint8x8_t min, const int16_t* bsums) {
    const int16x8_t m = vreinterpretq_s16_u16(vmovl_u8(min)), b = vld1q_s16(bsums);
    sum = vmlal_s16(sum, vget_low_s16(m), vget_low_s16(b));
    return vmlal_s16(sum, vget_high_s16(m), vget_high_s16(b));
  }

  static DUET_INLINE float32x4_t strip(const std::byte* const (&w)[kStripRows], const std::byte* x,
                                       size_t cols) {
    float32x4_t acc = vdupq_n_f32(0.0f);
    for (size_t b = 0; b < cols / 256; ++b) {
      const Block* rows[kStripRows];
      for (size_t r = 0; r < kStripRows; ++r) rows[r] = reinterpret_cast<const Block*>(w[r]) + b;
      acc = add_block(acc, rows, reinterpret_cast<const Act*>(x)[b]);
    }
    return acc;
  }

  static DUET_INLINE float32x4_t add_block(float32x4_t acc, const Block* const (&w)[kStripRows],
                                           const Act& x) {
    int32x4_t sum[kStripRows], mins[kStripRows];
    uint16_t d[kStripRows], dmin[kStripRows];
    // One row after the other: side by side they would not fit the registers.
    for (size_t r = 0; r < kStripRows; ++r) {
      const KScales s = load_scales(*w[r]);
      sum[r] = row_sum(*w[r], s, x);
      d[r] = w[r]->d;
      if constexpr (kHasMinimum) {
        dmin[r] = w[r]->dmin;
        mins[r] = times_sums(vdupq_n_s32(0), vget_low_u8(s.min), group_sums<kN>(x));
        if constexpr (kN == 16) mins[r] = times_sums(mins[r], vget_high_u8(s.min), x.bsums + 8);
      }
    }
    const float32x4_t scaled = vmulq_n_f32(halves_to_floats(d), x.d);
    acc = vfmaq_f32(acc, vcvtq_f32_s32(lane_sums(sum)), scaled);
    if constexpr (kHasMinimum) {
      const float32x4_t scaled_min = vmulq_n_f32(halves_to_floats(dmin), x.d);
      acc = vfmsq_f32(acc, vcvtq_f32_s32(lane_sums(mins)), scaled_min);
    }
    return acc;
  }

  static DUET_INLINE int32x4_t row_sum(const Block& w, const KScales& s, const Act& x) {
    int32_t scale[16];
    widen(s.scale, scale);
    int32x4_t sum = vdupq_n_s32(0);
#pragma GCC unroll 16
    for (size_t g = 0; g < kN; ++g) {
      int32x4_t dot = vdupq_n_s32(0);
#pragma GCC unroll 2
      for (size_t i = 0; i < kParts; ++i)
        dot = vdotq_s32(dot, quants(w, kParts * g + i), vld1q_s8(x.qs + 16 * (kParts * g + i)));
      sum = vmlaq_n_s32(sum, dot, scale[g]);
    }
    return sum;
  }

  static void unpack(const std::byte* const (&w)[kPanelRows], size_t col, size_t, Panel& out) {
    for (size_t r = 0; r < kPanelRows; ++r) {
      const Block& block = reinterpret_cast<const Block*>(w[r])[col / 256];
#pragma GCC unroll 16
      for (size_t i = 0; i < 16; ++i) put_columns(quants(block, i), r, out.q + 4 * i);
      const KScales s = load_scales(block);
      int32_t scale[16];
      uint8_t min[16];
      widen(s.scale, scale);
      vst1q_u8(min, s.min);
      for (size_t g = 0; g < kN; ++g) {
        out.scale[g][r] = scale[g];
        if constexpr (kHasMinimum) out.min[g][r] = min[g];
      }
      out.d[r] = half_to_float(block.d);
      if constexpr (kHasMinimum) out.dmin[r] = half_to_float(block.dmin);
    }
  }

  static DUET_INLINE void tile(const Panel& panel, const std::byte* const (&x)[kTileTokens],
                               float32x4_t (&acc)[kTileTokens][kPanelRows / 4]) {
    const Act* act[kTileTokens];
    for (size_t t = 0; t < kTileTokens; ++t) act[t] = reinterpret_cast<const Act*>(x[t]);
    TileSums sum = {};
    for (size_t g = 0; g < kN; ++g) {
      TileSums dot = {};
#pragma GCC unroll 2
      for (size_t i = kParts * g; i < kParts * (g + 1); ++i) {
        int8x16_t columns[kTileTokens];
#pragma GCC unroll 4
        for (size_t t = 0; t < kTileTokens; ++t) columns[t] = vld1q_s8(act[t]->qs + 16 * i);
        add_columns(panel.q + 4 * i, columns, dot);
      }
#pragma GCC unroll 2
      for (size_t h = 0; h < kPanelRows / 4; ++h) {
        const int32x4_t scale = vld1q_s32(panel.scale[g] + 4 * h);
#pragma GCC unroll 4
        for (size_t t = 0; t < kTileTokens; ++t) sum[t][h] = vmlaq_s32(sum[t][h], dot[t][h], scale);
      }
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < kPanelRows / 4; ++h) {
      const float32x4_t d = vld1q_f32(panel.d + 4 * h);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTileTokens; ++t)
        acc[t][h] = vfmaq_f32(acc[t][h], vcvtq_f32_s32(sum[t][h]), vmulq_n_f32(d, act[t]->d));
    }
    if constexpr (kHasMinimum) add_mins(panel, act, acc);
  }

  static DUET_INLINE void add_mins(const Panel& panel, const Act* const (&act)[kTileTokens],
                                   float32x4_t (&acc)[kTileTokens][kPanelRows / 4]) {
    TileSums mins = {};
    for (size_t g = 0; g < kN; ++g) {
#pragma GCC unroll 2
      for (size_t h = 0; h < kPanelRows / 4; ++h) {
        const int16x4_t min = vld1_s16(panel.min[g] + 4 * h);
#pragma GCC unroll 4
        for (size_t t = 0; t < kTileTokens; ++t)
          mins[t][h] = vmlal_n_s16(mins[t][h], min, group_sums<kN>(*act[t])[g]);
      }
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < kPanelRows / 4; ++h) {
      const float32x4_t dmin = vld1q_f32(panel.dmin + 4 * h);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTileTokens; ++t)
        acc[t][h] = vfmsq_f32(acc[t][h], vcvtq_f32_s32(mins[t][h]), vmulq_n_f32(dmin, act[t]->d));
    }
  }
};

}  // namespace

void add_neon_k(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul_neon<KKernel<BlockQ2_K>>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul_neon<KKernel<BlockQ3_K>>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] = matmul_neon<KKernel<BlockQ4_K>>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul_neon<KKernel<BlockQ5_K>>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul_neon<KKernel<BlockQ6_K>>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul_neon<KKernel<BlockIQ4_XS>>;
}

}  // namespace duet
