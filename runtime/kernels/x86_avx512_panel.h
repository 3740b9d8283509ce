// What the AVX-512 matmuls share: panels of unpacked weights, transposes, the loops over rows.
//
// Prefill. 32 rows x 256 columns are unpacked once into bytes (a panel, 8 KiB: it stays in the L1
// cache), then all tokens pass over it. Lanes are rows: vpdpbusd multiplies four columns of 16 rows
// by four activations that are broadcast from memory, so nothing is ever added across lanes, and
// the float chain of a (row, token) pair advances by one step per block, as kernels.h defines it.
// 2 x 6 accumulators of 16 rows hide the latency of vpdpbusd (5 cycles, two a cycle on Intel).
#pragma once

#include "runtime/kernels/x86_blocks.h"

namespace duet {
namespace {

constexpr size_t kPanelRows = 32, kPanelCols = 256;
// Tokens that share an unpacked panel: their sums (32 KiB) stay in the L2 cache.
constexpr size_t kPanelTokens = 256;

struct Panel {
  alignas(64) uint8_t q[kPanelCols / 4][kPanelRows * 4];  // [column / 4][row][column % 4]
  alignas(64) int32_t scale[16][kPanelRows];    // of each group of columns, for the integer part
  alignas(64) int32_t min[8][kPanelRows];       // pairs of int16: minimums of two groups
  alignas(64) float d[8][kPanelRows], m[8][kPanelRows];
};

DUET_INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
DUET_INLINE __m512i broadcast4(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
DUET_INLINE __m512i four_lanes(const void* a, const void* b, const void* c, const void* d) {
  // Halves first: inserting into 256 bits costs half as much.
  const __m256i ab = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(a)), load128(b), 1);
  const __m256i cd = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(c)), load128(d), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
}
// The same with 32 bytes: their lower halves, then their upper ones.
DUET_INLINE void four_lanes(const void* a, const void* b, const void* c, const void* d, __m512i& low, __m512i& high) {
  const __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(load256(a)), load256(b), 1);
  const __m512i cd = _mm512_inserti64x4(_mm512_castsi256_si512(load256(c)), load256(d), 1);
  low = _mm512_shuffle_i32x4(ab, cd, 0x88);
  high = _mm512_shuffle_i32x4(ab, cd, 0xdd);
}
DUET_INLINE __m512i masked(__m512i v, int mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
// Bits of 16-bit lanes moved left (right if negative).
DUET_INLINE __m512i moved_left(__m512i v, int by) {
  return by >= 0 ? _mm512_slli_epi16(v, by) : _mm512_srli_epi16(v, -by);
}
// v | (bits & mask)
DUET_INLINE __m512i or_bits(__m512i v, __m512i bits, int mask) {
  return _mm512_ternarylogic_epi32(v, bits, _mm512_set1_epi8(static_cast<char>(mask)), 0xf8);
}
DUET_INLINE __m512i high_nibbles(__m512i v) { return masked(_mm512_srli_epi16(v, 4), 15); }

// ---- 16 rows of a panel --------------------------------------------------------------------------
// Sixteen bytes of 16 rows: lane l of register i is row 4 l + i.
struct Quad {
  __m512i v[4];

  template <class Each>
  DUET_INLINE Quad map(Each each) const {
    return {{each(v[0]), each(v[1]), each(v[2]), each(v[3])}};
  }
  template <class Each>
  DUET_INLINE Quad zip(const Quad& other, Each each) const {
    return {{each(v[0], other.v[0]), each(v[1], other.v[1]), each(v[2], other.v[2]),
             each(v[3], other.v[3])}};
  }
  // Register j: 32-bit word j of the rows in order.
  DUET_INLINE Quad transposed() const {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    return {{_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
             _mm512_unpackhi_epi64(b, d)}};
  }
};

// The bytes at `offset` behind 16 pointers.
DUET_INLINE Quad load_quad(const std::byte* const* row, size_t offset) {
  const auto at = [&](size_t i) {
    return four_lanes(row[i] + offset, row[4 + i] + offset, row[8 + i] + offset,
                      row[12 + i] + offset);
  };
  return {{at(0), at(1), at(2), at(3)}};
}

DUET_INLINE void load_quads(const std::byte* const* row, size_t offset, Quad (&q)[2]) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i)
    four_lanes(row[i] + offset, row[4 + i] + offset, row[8 + i] + offset, row[12 + i] + offset, q[0].v[i], q[1].v[i]);
}

// v[j] lane i <- v[i] lane j, for 16 x 16 lanes of 32 bits.
DUET_INLINE void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Quants of columns `column` .. column + 15 of half the rows, one word of four columns a register.
DUET_INLINE void store_words(Panel& panel, size_t half, size_t column, const Quad& words) {
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j)
    _mm512_store_si512(panel.q[column / 4 + j] + 64 * half, words.v[j]);
}

// to[16 * half + r] = the half-precision float at `offset` behind pointer r.
DUET_INLINE void store_halves(float* to, size_t half, const std::byte* const* row, size_t offset) {
  const auto four = [&](size_t i) {
    uint16_t h[4];
    for (size_t r = 0; r < 4; ++r) __builtin_memcpy(&h[r], row[i + r] + offset, 2);
    const uint64_t low = h[0] | static_cast<uint32_t>(h[1]) << 16, high = h[2] | static_cast<uint32_t>(h[3]) << 16;
    return static_cast<int64_t>(low | high << 32);
  };
  _mm512_store_ps(to + 16 * half, _mm512_cvtph_ps(_mm256_setr_epi64x(four(0), four(4), four(8), four(12))));
}

// Rows of a panel; those beyond the last repeat it and are not stored.
struct PanelRowsAt {
  const std::byte* row[kPanelRows];
};
DUET_INLINE PanelRowsAt panel_rows(const MatmulArgs& a, size_t first) {
  PanelRowsAt at;
  for (size_t r = 0; r < kPanelRows; ++r) {
    const size_t row = first + r < a.n_rows ? first + r : a.n_rows - 1;
    at.row[r] = a.w + row * a.w_stride;
  }
  return at;
}

// Sums of a panel: [token][row].
struct PanelSums {
  alignas(64) float at[kPanelTokens][kPanelRows];
};

DUET_INLINE void store_sums(const MatmulArgs& a, const PanelSums& sums, size_t row, size_t token,
                            size_t n_tokens) {
  const size_t n = a.n_rows - row < kPanelRows ? a.n_rows - row : kPanelRows;
  const uint32_t mask = n == 32 ? ~0u : (1u << n) - 1;
  for (size_t t = 0; t < n_tokens; ++t) {
    float* y = a.y + (token + t) * a.y_stride + row;
    _mm512_mask_storeu_ps(y, static_cast<__mmask16>(mask), _mm512_load_ps(sums.at[t]));
    _mm512_mask_storeu_ps(y + 16, static_cast<__mmask16>(mask >> 16),
                          _mm512_load_ps(sums.at[t] + 16));
  }
}

// While a step of a panel is computed, as many bytes of the rows that follow the panel are fetched into the
// L2 cache, in address order: rows side by side are too many streams for the hardware. A few with each
// tile, as all at once they would hold up the loads of activations.
class NextRows {
 public:
  DUET_INLINE NextRows(const std::byte* p, size_t n_bytes)
      : next_(reinterpret_cast<const char*>(p)), end_(next_ + n_bytes) {}
  DUET_INLINE void fetch(size_t n_bytes) {
    const char* to = next_ + n_bytes < end_ ? next_ + n_bytes : end_;
    for (; next_ < to; next_ += 64) _mm_prefetch(next_, _MM_HINT_T1);
  }

 private:
  const char *next_, *end_;
};

// Of all rows in 256 columns.
template <class Kernel>
constexpr size_t kStepBytesOf = kPanelRows * Kernel::kWeightBytes;

// Tokens are dealt out evenly to tiles of up to 6: from 4 tokens on, none is smaller than 3, which
// would leave the units waiting for their own sums.
template <class Kernel>
DUET_INLINE void panel_tiles(const Panel& panel, const std::byte* x, size_t x_stride,
                             size_t n_tokens, size_t n_cols, NextRows next, PanelSums& sums) {
  const size_t n_tiles = (n_tokens + 5) / 6;
  for (size_t tile = 0, t = 0; tile < n_tiles; ++tile) {
    next.fetch(kStepBytesOf<Kernel> / n_tiles + 64);
    const size_t n = (n_tokens + tile) / n_tiles;
    const std::byte* at = x + t * x_stride;
    if (n == 6) Kernel::template tile<6>(panel, at, x_stride, n_cols, sums.at[t]);
    if (n == 5) Kernel::template tile<5>(panel, at, x_stride, n_cols, sums.at[t]);
    if (n == 4) Kernel::template tile<4>(panel, at, x_stride, n_cols, sums.at[t]);
    if (n == 3) Kernel::template tile<3>(panel, at, x_stride, n_cols, sums.at[t]);
    t += n;
  }
}

// Kernel::unpack(rows, step, n_cols, panel) and Kernel::tile<T>(panel, x, n_cols, sums) for 256
// columns at a time (n_cols: fewer at the end of a row); x: T tokens at these columns. At least 4
// tokens.
template <class Kernel>
void matmul_panels(const MatmulArgs& a) noexcept {
  Panel panel;
  PanelSums sums;
  const size_t n_steps = (a.cols + kPanelCols - 1) / kPanelCols;
  const size_t n_blocks = (a.n_tokens + kPanelTokens - 1) / kPanelTokens;
  for (size_t i = 0; i < kPanelRows * a.w_stride; i += 64)
    _mm_prefetch(reinterpret_cast<const char*>(a.w) + i, _MM_HINT_T1);
  for (size_t row = 0; row < a.n_rows; row += kPanelRows) {
    const PanelRowsAt rows = panel_rows(a, row);
    const std::byte* later = rows_from(a, row + kPanelRows);
    for (size_t block = 0, token = 0; block < n_blocks; ++block) {
      const size_t n = (a.n_tokens + block) / n_blocks;
      __builtin_memset(sums.at, 0, n * sizeof sums.at[0]);
      for (size_t step = 0; step < n_steps; ++step) {
        const size_t left = a.cols - step * kPanelCols;
        const size_t n_cols = left < kPanelCols ? left : kPanelCols;
        Kernel::unpack(rows, step, n_cols, panel);
        const std::byte* x = a.x + token * a.x_stride + step * Kernel::kStepBytes;
        panel_tiles<Kernel>(panel, x, a.x_stride, n, n_cols, NextRows(later + step * kStepBytesOf<Kernel>, kStepBytesOf<Kernel>), sums);
      }
      store_sums(a, sums, row, token, n);
      token += n;
    }
  }
}

}  // namespace
}  // namespace duet
