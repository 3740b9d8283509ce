// The codebook formats (IQ1_S .. IQ3_S) and the ternary ones times act256 with AVX-512 VNNI: blocks are
// unpacked to WideBlock by portable code; quants get 64 more, so that they are unsigned.
#pragma once

#include <cmath>

#include "runtime/kernels/x86_avx512_k_panel.h"
#include "runtime/kernels/x86_avx512_rows.h"

namespace duet {
namespace {

// sum of scale * quant * activation
DUET_INLINE int32_t wide_dot(const WideBlock& w, const BlockAct256& x) {
  const __m128i scales = load128(w.scale);
  __m512i sum = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i u = _mm512_add_epi8(load512(w.q + 64 * i), _mm512_set1_epi8(64));
    const __m512i part = _mm512_dpbusd_epi32(__m512i{}, u, load512(x.qs + 64 * i));
    const __m128i four = _mm_shuffle_epi8(scales, _mm_add_epi8(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), _mm_set1_epi8(static_cast<char>(4 * i))));
    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(part, _mm512_cvtepi8_epi32(four)));
  }
  const __m256i offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), load256(x.bsums));
  const __m512i minus = _mm512_zextsi256_si512(_mm256_slli_epi32(offset, 6));
  return _mm512_reduce_add_epi32(_mm512_sub_epi32(sum, minus));
}

template <class Block>
struct WideRows : KPanel<WideBlock, true> {
  static constexpr size_t kWeightBytes = sizeof(Block);
  static constexpr size_t kTokens = 4, kRows = 16, kGroupsAhead = 0;

  // Row after row: one stream, which the hardware fetches ahead.
  template <size_t T>
  static void decode(const std::byte* const* rows, const std::byte* x, size_t x_stride, size_t cols, const Ahead&, float* y) {
    for (size_t r = 0; r < kRows; ++r) {
      float sum[T] = {};
      for (size_t b = 0; b < cols / 256; ++b) {
        WideBlock wide;
        duet::unpack(reinterpret_cast<const Block*>(rows[r])[b], wide);
        for (size_t t = 0; t < T; ++t) {
          const auto& act = reinterpret_cast<const BlockAct256*>(x + t * x_stride)[b];
          sum[t] = std::fma(static_cast<float>(wide_dot(wide, act)), wide.d * act.d, sum[t]);
        }
      }
      for (size_t t = 0; t < T; ++t) y[t * kRows + r] = sum[t];
    }
  }

  static void unpack(const PanelRowsAt& rows, size_t step, size_t, Panel& panel) {
    for (size_t half = 0; half < 2; ++half) {
      WideBlock wide[16];
      const std::byte* at[16];
      for (size_t r = 0; r < 16; ++r) {
        duet::unpack(reinterpret_cast<const Block*>(rows.row[16 * half + r])[step], wide[r]);
        at[r] = reinterpret_cast<const std::byte*>(&wide[r]);
        panel.d[0][16 * half + r] = wide[r].d;
      }
      unpack_columns(
          kTag, [&](size_t offset) { return load_quad(at, offset).transposed(); },
          [&](size_t column, const Quad& q) { store_words(panel, half, column, q); });
      unpack_scales(load_scale_lanes(at).transposed(), half, panel);
    }
  }
};

}  // namespace
}  // namespace duet
