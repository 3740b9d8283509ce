// What the NEON files share: unpacking blocks, and cutting a matmul into decode strips and prefill
// panels. Needs the dot product instructions (sdot).
//
// Lanes are rows everywhere, so that each lane carries the one chain of fmaf that kernels.h asks
// for: a strip is 4 weight rows times one token, a panel 8 rows of up to 256 columns unpacked to
// bytes that 4 tokens at a time pass over. Rows and tokens past the end are copies of the last one.
#pragma once

#include <arm_neon.h>

#include "quant/format.h"
#include "runtime/kernels/matmul_tiles.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

constexpr size_t kStripRows = 4, kPanelRows = 8, kTileTokens = 4, kPanelCols = 256;
// From here on unpacking to a panel pays; a tile computes kTileTokens in any case.
constexpr size_t kPanelTokens = 4;

// ---- quants: values 16 i .. 16 i + 15 of a block, signed ----------------------------------------
DUET_INLINE uint8x16_t shift_left(uint8x16_t v, int n) {  // right where negative
  return vshlq_u8(v, vdupq_n_s8(static_cast<int8_t>(n)));
}
DUET_INLINE uint8x16_t nibbles(const uint8_t* qs, bool high) {
  const uint8x16_t v = vld1q_u8(qs);
  return high ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
}
DUET_INLINE int8x16_t minus(uint8x16_t v, int8_t offset) {
  return vsubq_s8(vreinterpretq_s8_u8(v), vdupq_n_s8(offset));
}
DUET_INLINE int8x16_t iq4_levels(uint8x16_t index) {
  return vqtbl1q_s8(vld1q_s8(kIq4Levels), index);
}

// ---- rows and tokens ----------------------------------------------------------------------------
DUET_INLINE float half_to_float(uint16_t bits) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}
DUET_INLINE float32x4_t halves_to_floats(const uint16_t (&bits)[4]) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits)));
}

// The sums over the lanes of four vectors.
DUET_INLINE int32x4_t lane_sums(const int32x4_t (&v)[4]) {
  return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

// Pointers to N rows (weights) or tokens (activations) from `first` on, `end` excluded.
template <size_t N, class T>
DUET_INLINE void pointers(T* base, size_t stride, size_t first, size_t end, T* (&out)[N]) {
  for (size_t i = 0; i < N; ++i) out[i] = base + (first + i < end ? first + i : end - 1) * stride;
}

DUET_INLINE void store_first(float* y, float32x4_t v, size_t n) {
  float whole[4];
  vst1q_f32(whole, v);
  for (size_t i = 0; i < n; ++i) y[i] = whole[i];
}

// ---- panels -------------------------------------------------------------------------------------
// q[k / 4][row][k % 4]: four rows are one register, and sdot by lane takes four columns of a token.
using PanelQuants = int8_t[kPanelCols / 4][kPanelRows][4];

// Puts 16 columns of one row in their place; q starts at the cell of the first column.
DUET_INLINE void put_columns(int8x16_t v, size_t row, int8_t (*q)[kPanelRows][4]) {
  const int32x4_t cells = vreinterpretq_s32_s8(v);
  const auto put = [row](int32_t cell, int8_t(*to)[4]) { __builtin_memcpy(to[row], &cell, 4); };
  put(vgetq_lane_s32(cells, 0), q[0]);
  put(vgetq_lane_s32(cells, 1), q[1]);
  put(vgetq_lane_s32(cells, 2), q[2]);
  put(vgetq_lane_s32(cells, 3), q[3]);
}

using TileSums = int32x4_t[kTileTokens][kPanelRows / 4];

template <int Lane>
DUET_INLINE void add_lane(const int8_t (*q)[kPanelRows][4], const int8x16_t (&x)[kTileTokens],
                          TileSums& dot) {
#pragma GCC unroll 2
  for (size_t h = 0; h < kPanelRows / 4; ++h) {
    const int8x16_t w = vld1q_s8(q[Lane][4 * h]);
#pragma GCC unroll 4
    for (size_t t = 0; t < kTileTokens; ++t) dot[t][h] = vdotq_laneq_s32(dot[t][h], w, x[t], Lane);
  }
}

// dot += 16 columns; x[t]: those of each token.
DUET_INLINE void add_columns(const int8_t (*q)[kPanelRows][4], const int8x16_t (&x)[kTileTokens],
                             TileSums& dot) {
  add_lane<0>(q, x, dot);
  add_lane<1>(q, x, dot);
  add_lane<2>(q, x, dot);
  add_lane<3>(q, x, dot);
}

// The float chains of a tile: zero before the first column, kept in y between panels.
struct TileChains {
  float32x4_t acc[kTileTokens][kPanelRows / 4];

  DUET_INLINE void load(float* const (&y)[kTileTokens], size_t n_rows, bool first) {
    for (size_t t = 0; t < kTileTokens; ++t) {
      float row[kPanelRows] = {};
      if (!first) __builtin_memcpy(row, y[t], n_rows * sizeof(float));
      for (size_t h = 0; h < kPanelRows / 4; ++h) acc[t][h] = vld1q_f32(row + 4 * h);
    }
  }
  DUET_INLINE void save(float* const (&y)[kTileTokens], size_t n_rows) const {
    for (size_t t = 0; t < kTileTokens; ++t) {
      float row[kPanelRows];
      for (size_t h = 0; h < kPanelRows / 4; ++h) vst1q_f32(row + 4 * h, acc[t][h]);
      __builtin_memcpy(y[t], row, n_rows * sizeof(float));
    }
  }
};

// All tokens past one panel; Kernel::tile adds its columns to the chains of 4 tokens.
template <class Kernel>
DUET_INLINE void pass_panel(const typename Kernel::Panel& panel, const MatmulArgs& a, size_t row,
                            size_t col) {
  const size_t n_rows = a.n_rows - row < kPanelRows ? a.n_rows - row : kPanelRows;
  for (size_t t = 0; t < a.n_tokens; t += kTileTokens) {
    const std::byte* x[kTileTokens];
    float* y[kTileTokens];
    pointers(a.x + col / Kernel::kActElems * sizeof(typename Kernel::Act), a.x_stride, t,
             a.n_tokens, x);
    pointers(a.y + row, a.y_stride, t, a.n_tokens, y);
    TileChains chains;
    chains.load(y, n_rows, col == 0);
    Kernel::tile(panel, x, chains.acc);
    chains.save(y, n_rows);
  }
}

// Kernel::strip: 4 rows times one token, as lanes. Kernel::unpack: columns [col, end) of 8 rows.
template <class Kernel>
void matmul_neon(const MatmulArgs& a) noexcept {
  if (a.n_tokens < kPanelTokens) {
    for (size_t r = 0; r < a.n_rows; r += kStripRows) {
      const std::byte* w[kStripRows];
      pointers(a.w, a.w_stride, r, a.n_rows, w);
      const size_t n = a.n_rows - r < kStripRows ? a.n_rows - r : kStripRows;
      for (size_t t = 0; t < a.n_tokens; ++t)
        store_first(a.y + t * a.y_stride + r, Kernel::strip(w, a.x + t * a.x_stride, a.cols), n);
    }
    return;
  }
  for (size_t r = 0; r < a.n_rows; r += kPanelRows) {
    const std::byte* w[kPanelRows];
    pointers(a.w, a.w_stride, r, a.n_rows, w);
    for (size_t col = 0; col < a.cols; col += kPanelCols) {
      const size_t end = a.cols - col < kPanelCols ? a.cols : col + kPanelCols;
      typename Kernel::Panel panel;
      Kernel::unpack(w, col, end, panel);
      pass_panel<Kernel>(panel, a, r, col);
    }
  }
}

}  // namespace
}  // namespace duet
