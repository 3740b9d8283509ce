// AVX-512 VNNI kernels of the 256-element formats (Q2_K .. Q6_K, IQ4_XS) times act256.
//
// 64 elements at a time: vpdpbusd multiplies unsigned quants by activations and adds four, vpdpwssd
// multiplies that sum, which fits 16 bits (4 * 63 * 127 < 2^15), by the scale and accumulates.
#include "runtime/kernels/x86_k_scales.h"

namespace duet {
namespace {

// 32 bytes in both halves.
DUET_INLINE __m512i both_halves(const uint8_t* p) { return _mm512_broadcast_i64x4(load256(p)); }

// 16-bit lanes of the lower half shifted right by `low`, of the upper half by `high`.
DUET_INLINE __m512i shift_halves(__m512i v, int low, int high) {
  const __m256i l = _mm256_set1_epi16(static_cast<int16_t>(low)),
                h = _mm256_set1_epi16(static_cast<int16_t>(high));
  return _mm512_srlv_epi16(v, _mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1));
}

DUET_INLINE __m512i masked(__m512i v, int mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Adds `value` where bit 2 i (lower half) or 2 i + 1 (upper half) of the 32 bytes is set.
DUET_INLINE __m512i add_high_bit(__m512i q, const uint8_t* bits, int i, int value) {
  const __m256i low = _mm256_set1_epi8(static_cast<char>(1 << (2 * i)));
  const __m256i high = _mm256_set1_epi8(static_cast<char>(2 << (2 * i)));
  const __m512i select = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  const __mmask64 set = _mm512_test_epi8_mask(both_halves(bits), select);
  return _mm512_mask_add_epi8(q, set, q, _mm512_set1_epi8(static_cast<char>(value)));
}

// quants(block, i): elements 64 i .. 64 i + 63, unsigned, above their value by the format's offset.
DUET_INLINE __m512i two_bits(const uint8_t* qs, int i) {
  const int shift = 4 * (i % 2);
  return masked(shift_halves(both_halves(qs + 32 * (i / 2)), shift, shift + 2), 3);
}

DUET_INLINE __m512i four_bits(const uint8_t* qs, int i) {
  return masked(shift_halves(both_halves(qs + 32 * i), 0, 4), 15);
}

DUET_INLINE __m512i quants(const BlockQ2_K& b, int i) { return two_bits(b.qs, i); }
DUET_INLINE __m512i quants(const BlockQ3_K& b, int i) {
  return add_high_bit(two_bits(b.qs, i), b.hmask, i, 4);
}
DUET_INLINE __m512i quants(const BlockQ4_K& b, int i) { return four_bits(b.qs, i); }
DUET_INLINE __m512i quants(const BlockQ5_K& b, int i) {
  return add_high_bit(four_bits(b.qs, i), b.qh, i, 16);
}

DUET_INLINE __m512i quants(const BlockQ6_K& b, int i) {
  const __m512i v = _mm512_loadu_si512(b.ql + 64 * (i / 2));
  const __m512i low = masked(i % 2 == 1 ? _mm512_srli_epi16(v, 4) : v, 15);
  const int shift = 4 * (i % 2);
  const __m512i high = masked(shift_halves(both_halves(b.qh + 32 * (i / 2)), shift, shift + 2), 3);
  return _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
}

DUET_INLINE __m512i quants(const BlockIQ4_XS& b, int i) {
  // 16 bytes per 32 elements: low nibbles are the first 16, high nibbles the last.
  const __m512i v = both_halves(b.qs + 32 * i);
  const __m512i twice = _mm512_shuffle_i64x2(v, v, 0x50);
  const __m512i shifts = _mm512_broadcast_i64x4(_mm256_set_m128i(_mm_set1_epi16(4), __m128i{}));
  const __m512i levels = _mm512_broadcast_i32x4(load128(kIq4Levels));
  const __m512i value = _mm512_shuffle_epi8(levels, masked(_mm512_srlv_epi16(twice, shifts), 15));
  return _mm512_xor_si512(value, _mm512_set1_epi8(-128));  // + 128
}

// Sums of four products of 8-bit levels exceed 16 bits: 32-bit multiplication by the scale.
template <class Block>
constexpr bool kWideQuants = false;
template <>
constexpr bool kWideQuants<BlockIQ4_XS> = true;
template <>
constexpr int kOffsetShift<BlockIQ4_XS> = 7;

// For 64 elements: lane k takes the scale of group 4 i + k / 4 in its lower 16 bits.
struct Spread {
  alignas(64) uint16_t at[4][32];
};
constexpr Spread make_spread() {
  Spread s{};
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 16; ++k) s.at[i][2 * k] = static_cast<uint16_t>(4 * i + k / 4);
  }
  return s;
}
constexpr Spread kSpread = make_spread();

template <class Block>
DUET_INLINE __m512i spread_scale(__m256i scale, int i) {
  const __m512i v = _mm512_castsi256_si512(scale), at = _mm512_load_si512(kSpread.at[i]);
  const __m512i low16 = _mm512_maskz_permutexvar_epi16(0x55555555u, at, v);
  if constexpr (!kWideQuants<Block>) return low16;
  return _mm512_srai_epi32(_mm512_slli_epi32(low16, 16), 16);
}

DUET_INLINE float lane_sum(__m512 v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  return lane_sum(_mm256_add_ps(_mm512_castps512_ps256(v), high));
}

template <class Block>
struct KKernel512 {
  static constexpr size_t kRows = 2, kTokens = 8;

  template <size_t R, size_t T>
  static void tile(const MatmulArgs& a) noexcept {
    __m512 acc[R][T] = {};
    const size_t n_blocks = a.cols / 256;
    for (size_t b = 0; b < n_blocks; ++b) {
#pragma GCC unroll 8
      for (size_t r = 0; r < R; ++r) {
        const BlockAct256* x[T];
#pragma GCC unroll 8
        for (size_t t = 0; t < T; ++t)
          x[t] = reinterpret_cast<const BlockAct256*>(a.x + t * a.x_stride) + b;
        add_block<T>(reinterpret_cast<const Block*>(a.w + r * a.w_stride)[b], x, acc[r]);
      }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (size_t t = 0; t < T; ++t) a.y[t * a.y_stride + r] = lane_sum(acc[r][t]);
    }
  }

  template <size_t T>
  static DUET_INLINE void add_block(const Block& block, const BlockAct256* const* x, __m512* acc) {
    const KScales s = load_scales(block);
    __m512i sum[T];
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) sum[t] = offset_sum(s, *x[t]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i q = quants(block, i);
      const __m512i factor = spread_scale<Block>(s.scale, i);
#pragma GCC unroll 8
      for (size_t t = 0; t < T; ++t) {
        const __m512i dot =
            _mm512_dpbusd_epi32(__m512i{}, q, _mm512_loadu_si512(x[t]->qs + 64 * i));
        sum[t] = kWideQuants<Block> ? _mm512_add_epi32(sum[t], _mm512_mullo_epi32(dot, factor))
                                    : _mm512_dpwssd_epi32(sum[t], dot, factor);
      }
    }
    const float d = _cvtsh_ss(block.d);
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_set1_ps(d * x[t]->d), acc[t]);
      if constexpr (kHasMinimum<Block>) {
        const __m512i mins = _mm512_zextsi256_si512(_mm256_madd_epi16(s.min, load256(x[t]->bsums)));
        const __m512 scale_min = _mm512_set1_ps(_cvtsh_ss(block.dmin) * x[t]->d);
        acc[t] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins), scale_min, acc[t]);
      }
    }
  }

  // What the offset of the quants adds to the sum, negated.
  static DUET_INLINE __m512i offset_sum(const KScales& s, const BlockAct256& x) {
    if constexpr (kOffsetShift<Block> == 0) return __m512i{};
    const __m256i offset = _mm256_slli_epi16(s.scale, kOffsetShift<Block>);
    return _mm512_zextsi256_si512(
        _mm256_sub_epi32(__m256i{}, _mm256_madd_epi16(offset, load256(x.bsums))));
  }
};

}  // namespace

void add_avx512_k(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul_tiled<KKernel512<BlockQ2_K>>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul_tiled<KKernel512<BlockQ3_K>>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] = matmul_tiled<KKernel512<BlockQ4_K>>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul_tiled<KKernel512<BlockQ5_K>>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul_tiled<KKernel512<BlockQ6_K>>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul_tiled<KKernel512<BlockIQ4_XS>>;
}

}  // namespace duet
