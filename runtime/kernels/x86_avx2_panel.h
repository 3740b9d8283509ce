// Pieces of the 256-bit matmul kernels: how weights and sums move between "one register is part of
// a row" (how files store them) and "one lane is one row" (how the tiles and the float chains of
// kernels.h want them).
#pragma once

#include "runtime/kernels/x86_blocks.h"

namespace duet {
namespace {

#if defined(__AVXVNNI__)
constexpr bool kVnni = true;
DUET_INLINE __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
  return _mm256_dpbusd_avx_epi32(sum, u, s);
}
DUET_INLINE __m256i dpwssd(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpwssd_avx_epi32(sum, a, b);
}
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr bool kVnni = true;
DUET_INLINE __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
  return _mm256_dpbusd_epi32(sum, u, s);
}
DUET_INLINE __m256i dpwssd(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpwssd_epi32(sum, a, b);
}
#else
constexpr bool kVnni = false;
// Sums of 4 products u * s, in 32 bits; pairs of them must fit 16 bits.
DUET_INLINE __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
  const __m256i pairs = _mm256_maddubs_epi16(u, s);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
DUET_INLINE __m256i dpwssd(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#endif

// Products of quants up to `largest` and bytes, to be added in 16 bits and then multiplied by a
// factor with dpwssd: sums of 4 in dwords ("quads", the factor's upper half must be 0) or sums of 2
// in 16 bits (the factor in both halves). vpdpbusd saves additions, but large quants leave 16 bits
// sooner by quads, and dpwssd competes for the same units.
constexpr bool has_quads(int largest) { return kVnni && largest <= 15; }

template <bool kQuads>
DUET_INLINE __m256i multiply_bytes(__m256i u, __m256i s) {
  return kQuads ? dpbusd(__m256i{}, u, s) : _mm256_maddubs_epi16(u, s);
}
template <bool kQuads>
DUET_INLINE __m256i add_multiplied(__m256i sum, __m256i u, __m256i s) {
  return kQuads ? dpbusd(sum, u, s) : _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s));
}
// How many of them add up to no more than 16 bits (at most 8).
constexpr int steps_in_16_bits(int largest) {
  int steps = 8;
  while (steps * (has_quads(largest) ? 4 : 2) * 127 * largest > 32767) steps /= 2;
  return steps;
}

constexpr size_t kPanelRows = 32, kVectors = kPanelRows / 8;  // rows as vectors of 8
// Tokens that share one unpacking of the weights: their activations stay in the L2 cache.
constexpr size_t kPanelTokens = 128;

DUET_INLINE void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// 16 bytes -> 32 values 0..15; the copy to both halves is part of the load.
DUET_INLINE __m256i nibbles32(const uint8_t* qs) {
  const __m256i both = _mm256_broadcastsi128_si256(load128(qs));
  const __m256i moved = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return _mm256_and_si256(moved, _mm256_set1_epi8(15));
}

// Eight rows of eight dwords -> eight vectors: dword i of every row.
DUET_INLINE void transpose8(__m256i v[8]) {
  __m256i pair[8], quad[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    pair[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
    quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
    quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
  }
}

// v[i]: four parts of sum i in the lower half, of sum i + 4 in the upper -> the eight sums.
DUET_INLINE __m256i sum_quads(const __m256i v[4]) {
  const __m256i a =
      _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
  const __m256i b =
      _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// Lane i of the result: the sum of the lanes of v[i].
DUET_INLINE __m256i sum_lanes(const __m256i v[8]) {
  __m256i half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    half[i] = _mm256_add_epi32(_mm256_permute2x128_si256(v[i], v[i + 4], 0x20),
                               _mm256_permute2x128_si256(v[i], v[i + 4], 0x31));
  return sum_quads(half);
}

// Four bytes (or two int16) of an activation in every lane: a load, no arithmetic.
DUET_INLINE __m256i splat32(const void* p) {
  int v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// Keeps GCC from rearranging a chain of additions into a tree, whose leaves would all have to be
// held at once: far more than there are registers.
DUET_INLINE __m256i in_order(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

// Up to 256 activations as 16 bits, for weights whose products overflow vpmaddubsw.
struct WideAct {
  alignas(32) int16_t q[256];

  DUET_INLINE void set(const BlockAct256* x, size_t) {
    for (size_t i = 0; i < 256; i += 16) store256(q + i, widen16(x->qs + i));
  }
  DUET_INLINE void set(const BlockAct32* x, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; ++b) {
      store256(q + 32 * b, widen16(x[b].qs));
      store256(q + 32 * b + 16, widen16(x[b].qs + 16));
    }
  }

 private:
  static DUET_INLINE __m256i widen16(const int8_t* x) { return _mm256_cvtepi8_epi16(load128(x)); }
};

// ---- a few tokens: eight rows at a time ------------------------------------------------------------
// The first eight rows of a problem; past the last one that row again, not stored.
struct RowsOf8 {
  const MatmulArgs& a;
  const std::byte* at[8];

  explicit DUET_INLINE RowsOf8(const MatmulArgs& args) : a(args) {
    for (size_t r = 0; r < 8; ++r) at[r] = a.w + (r < a.n_rows ? r : a.n_rows - 1) * a.w_stride;
  }
  DUET_INLINE void store(__m256 y, size_t token = 0) const {
    alignas(32) float v[8];
    _mm256_store_ps(v, y);
    __builtin_memcpy(a.y + token * a.y_stride, v, (a.n_rows < 8 ? a.n_rows : 8) * sizeof(float));
  }
};

DUET_INLINE void for_eight_rows(const MatmulArgs& a, MatmulFn run) {
  for (size_t r = 0; r < a.n_rows; r += 8) {
    MatmulArgs rest = sub_problem(a, r, 0);
    rest.n_rows = a.n_rows - r;
    run(rest);
  }
}

// ---- several tokens: panels ---------------------------------------------------------------------
// Sums of a panel, [token][row]: the float chains between blocks.
struct PanelSums {
  alignas(64) float v[kPanelTokens][kPanelRows];
};

// Panel: what the formats provide.
//   Block, Act         weights and activations; kActCols columns per Act
//   kWide              tiles read WideAct
//   unpack(rows, v, n) n columns of 8 rows become vector v
//   tile<R, T>(v, x, x16, n, acc)   vectors v .. v + R - 1 times T tokens, on top of acc[T][32]

// Tokens t, t + T, ... as long as T are left.
template <size_t R, size_t T, class Panel>
DUET_INLINE size_t run_tiles(const Panel& panel, const MatmulArgs& a, size_t c, size_t n_cols,
                             size_t t, PanelSums& sums) {
  using Act = typename Panel::Act;
  for (; t + T <= a.n_tokens; t += T) {
    const Act* x[T];
    WideAct x16[T];
    for (size_t i = 0; i < T; ++i) {
      x[i] = reinterpret_cast<const Act*>(a.x + (t + i) * a.x_stride) + c / Panel::kActCols;
      if constexpr (Panel::kWide) x16[i].set(x[i], n_cols / Panel::kActCols);
    }
    for (size_t v = 0; v < kVectors && 8 * v < a.n_rows; v += R)
      panel.template tile<R, T>(v, x, x16, n_cols, sums.v[t] + 8 * v);
  }
  return t;
}

// 8 rows of 256 columns or what is left of them. Past the last row that row again: its sums are
// not stored.
template <class Panel>
DUET_INLINE void unpack_vector(Panel& panel, const MatmulArgs& a, size_t c, size_t n_cols,
                               size_t v, Ahead& ahead) {
  using Block = typename Panel::Block;
  const Block* rows[8];
  for (size_t j = 0; j < 8; ++j) {
    const size_t r = 8 * v + j < a.n_rows ? 8 * v + j : a.n_rows - 1;
    rows[j] = reinterpret_cast<const Block*>(a.w + r * a.w_stride) + c / Panel::kBlockCols;
    ahead.fetch_all(n_cols / Panel::kBlockCols * sizeof(Block));
    ahead.next(n_cols / Panel::kBlockCols * sizeof(Block));
  }
  panel.unpack(rows, v, n_cols);
}

// The first kPanelRows rows times up to kPanelTokens tokens.
template <class Panel>
void run_panel(const MatmulArgs& a) noexcept {
  Panel panel;
  PanelSums sums;
  __builtin_memset(&sums, 0, a.n_tokens * sizeof sums.v[0]);
  Ahead ahead(rows_from(a, kPanelRows));
  for (size_t c = 0; c < a.cols; c += 256) {
    const size_t n_cols = a.cols - c < 256 ? a.cols - c : 256;
    for (size_t v = 0; v < kVectors; ++v) unpack_vector(panel, a, c, n_cols, v, ahead);
    size_t t = run_tiles<2, 4>(panel, a, c, n_cols, 0, sums);
    t = run_tiles<4, 2>(panel, a, c, n_cols, t, sums);
    run_tiles<4, 1>(panel, a, c, n_cols, t, sums);
  }
  const size_t n_rows = a.n_rows < kPanelRows ? a.n_rows : kPanelRows;
  for (size_t t = 0; t < a.n_tokens; ++t)
    __builtin_memcpy(a.y + t * a.y_stride, sums.v[t], n_rows * sizeof(float));
}

template <class Panel>
DUET_INLINE void matmul_panels(const MatmulArgs& a) {
  for (size_t t = 0; t < a.n_tokens; t += kPanelTokens) {
    for (size_t r = 0; r < a.n_rows; r += kPanelRows) {
      MatmulArgs rest = sub_problem(a, r, t);
      rest.n_rows = a.n_rows - r;
      rest.n_tokens = a.n_tokens - t < kPanelTokens ? a.n_tokens - t : kPanelTokens;
      if (t + kPanelTokens < a.n_tokens) rest.next = a.w;
      run_panel<Panel>(rest);
    }
  }
}

// ---- tiles: R vectors of 8 rows x T tokens ------------------------------------------------------
template <size_t R, size_t T>
using TileSums = __m256i[R][T];

// parts = products of kSteps dwords of w (128 bytes apart) and x, added as multiply_bytes has them.
template <bool kQuads, int kSteps, size_t R, size_t T>
DUET_INLINE void multiply_columns(const uint8_t* w, const int8_t* const x[T],
                                  TileSums<R, T>& parts) {
#pragma GCC unroll 8
  for (int k = 0; k < kSteps; ++k) {
    __m256i q[R];
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) q[r] = load256(w + 128 * k + 32 * r);
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) {
      const __m256i v = splat32(x[t] + 4 * k);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r)
        parts[r][t] = k == 0 ? multiply_bytes<kQuads>(q[r], v)
                             : in_order(add_multiplied<kQuads>(parts[r][t], q[r], v));
    }
  }
}

// sum += products of n_dwords dwords of 16-bit weights and activations, from activation `at`.
template <size_t R, size_t T>
DUET_INLINE void add_wide(const uint8_t* w, const WideAct* x, size_t at, size_t n_dwords,
                          TileSums<R, T>& sum) {
#pragma GCC unroll 8
  for (size_t k = 0; k < n_dwords; ++k) {
    __m256i q[R];
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) q[r] = load256(w + 128 * k + 32 * r);
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) {
      const __m256i v = splat32(x[t].q + at + 2 * k);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r)
        sum[r][t] = in_order(dpwssd(sum[r][t], q[r], v));
    }
  }
}

}  // namespace
}  // namespace duet
