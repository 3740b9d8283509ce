// The loop over rows of a few tokens ("decode", small batches).
#pragma once

#include "runtime/kernels/x86_avx512_panel.h"

namespace duet {
namespace {

// half(i), half-precision bits, for i = 0 .. 15 (7), as floats. Put together by integer units, which have
// nothing else to do.
template <class Half>
DUET_INLINE int64_t four_halves(size_t first, Half half) {
  const uint64_t low = half(first) | static_cast<uint32_t>(half(first + 1)) << 16;
  const uint64_t high = half(first + 2) | static_cast<uint32_t>(half(first + 3)) << 16;
  return static_cast<int64_t>(low | high << 32);
}
template <class Half>
DUET_INLINE __m512 sixteen_halves(Half half) {
  return _mm512_cvtph_ps(_mm256_setr_epi64x(four_halves(0, half), four_halves(4, half),
                                            four_halves(8, half), four_halves(12, half)));
}
template <class Half>
DUET_INLINE __m256 eight_halves(Half half) {
  return _mm256_cvtph_ps(_mm_set_epi64x(four_halves(4, half), four_halves(0, half)));
}

// ---- quads ---------------------------------------------------------------------------------------
// A register with sixteen bytes of each of four rows, one row per 128-bit lane, is multiplied by sixteen
// activations that are broadcast: the sums of a row end up in the four places of its lane.
DUET_INLINE __m512i dot4(__m512i q, __m512i x) { return _mm512_dpbusd_epi32(__m512i{}, q, x); }
DUET_INLINE __m512i lanes_of(const void* p) { return _mm512_broadcast_i32x4(load128(p)); }
// Lane i of each 128 bits of the result: those of v[i] added up.
DUET_INLINE __m512i fold_rows32(const __m512i (&v)[4]) {
  const auto fold = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i ab = fold(v[0], v[1]), cd = fold(v[2], v[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// ---- the loop ------------------------------------------------------------------------------------
template <class Kernel, size_t T = Kernel::kTokens>
DUET_INLINE void decode(const MatmulArgs& a, const std::byte* const* rows, const Ahead& ahead, float* y) {
  if (a.n_tokens == T) return Kernel::template decode<T>(rows, a.x, a.x_stride, a.cols, ahead, y);
  if constexpr (T > 1) decode<Kernel, T - 1>(a, rows, ahead, y);
}

// Kernel::decode<T>(rows, x, x_stride, cols, ahead, y): Kernel::kRows rows with T tokens, up to
// Kernel::kTokens; y[T][kRows].
template <class Kernel>
void matmul_rows(const MatmulArgs& a) noexcept {
  constexpr size_t kRows = Kernel::kRows, kAhead = kRows * Kernel::kGroupsAhead;
  alignas(64) float y[Kernel::kTokens * kRows];
  Ahead(a.w).fetch_all(kAhead * a.w_stride);
  for (size_t row = 0; row < a.n_rows; row += kRows) {
    const std::byte* rows[kRows];
    for (size_t r = 0; r < kRows; ++r)
      rows[r] = a.w + (row + r < a.n_rows ? row + r : a.n_rows - 1) * a.w_stride;
    decode<Kernel>(a, rows, Ahead(rows_from(a, row + kAhead)), y);
    const size_t n = a.n_rows - row < kRows ? a.n_rows - row : kRows;
    for (size_t t = 0; t < a.n_tokens; ++t)
      __builtin_memcpy(a.y + t * a.y_stride + row, y + t * kRows, n * sizeof(float));
  }
}

// One: for one token, also the panels. Few: for several, up to where unpacking a panel pays.
template <class One, class Few = One>
void matmul512(const MatmulArgs& a) noexcept {
  if (a.n_tokens <= One::kTokens) return matmul_rows<One>(a);
  a.n_tokens <= Few::kTokens ? matmul_rows<Few>(a) : matmul_panels<One>(a);
}

}  // namespace
}  // namespace duet
