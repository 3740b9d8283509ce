// AVX2 kernels of the 256-element formats (Q2_K .. Q6_K, IQ4_XS) times act256.
//
// 32 elements at a time: vpmaddubsw multiplies quants by activations and adds pairs (no saturation:
// 63 * 127 * 2 < 2^15), vpmaddwd multiplies by the scale and adds pairs again.
#include "runtime/kernels/x86_k_scales.h"

namespace duet {
namespace {

// quants(block, i): elements 32 i .. 32 i + 31, unsigned with kOffsetShift, or signed (IQ4_XS).
DUET_INLINE __m256i nibbles_of(const uint8_t* qs, bool high) {
  const __m256i v = load256(qs);
  return _mm256_and_si256(high ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}

// Bits moved left by `left` (right if negative), then masked.
DUET_INLINE __m256i shifted_bits(__m256i v, int left, int mask) {
  const __m256i moved = left >= 0 ? _mm256_slli_epi16(v, left) : _mm256_srli_epi16(v, -left);
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
}

DUET_INLINE __m256i quants(const BlockQ2_K& b, int i) {
  return shifted_bits(load256(b.qs + 32 * (i / 4)), -2 * (i % 4), 3);
}

DUET_INLINE __m256i quants(const BlockQ3_K& b, int i) {
  const __m256i low = shifted_bits(load256(b.qs + 32 * (i / 4)), -2 * (i % 4), 3);
  return _mm256_or_si256(low, shifted_bits(load256(b.hmask), 2 - i, 4));
}

DUET_INLINE __m256i quants(const BlockQ4_K& b, int i) {
  return nibbles_of(b.qs + 32 * (i / 2), i % 2 == 1);
}

DUET_INLINE __m256i quants(const BlockQ5_K& b, int i) {
  return _mm256_or_si256(nibbles_of(b.qs + 32 * (i / 2), i % 2 == 1),
                         shifted_bits(load256(b.qh), 4 - i, 16));
}

DUET_INLINE __m256i quants(const BlockQ6_K& b, int i) {
  const int half = i / 4, j = i % 4;
  const __m256i low = nibbles_of(b.ql + 64 * half + 32 * (j % 2), j >= 2);
  return _mm256_or_si256(low, shifted_bits(load256(b.qh + 32 * half), 4 - 2 * j, 0x30));
}

DUET_INLINE __m256i quants(const BlockIQ4_XS& b, int i) {
  const __m256i levels = _mm256_broadcastsi128_si256(load128(kIq4Levels));
  return _mm256_shuffle_epi8(levels, nibbles(b.qs + 16 * i));
}

template <class Block>
constexpr bool kSignedQuants = false;
template <>
constexpr bool kSignedQuants<BlockIQ4_XS> = true;

// 16 scales in order -> even ones in the lower half, odd ones in the upper, where the products of
// group 2 i and of group 2 i + 1 are.
DUET_INLINE __m256i even_odd(__m256i scale) {
  const __m256i split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(scale, split), 0xd8);
}

DUET_INLINE __m256i splat_pair(__m256i scale_even_odd, int i) {
  return _mm256_shuffle_epi8(scale_even_odd,
                             _mm256_set1_epi16(static_cast<int16_t>(0x0100 + 0x0202 * i)));
}

template <class Block>
struct KKernel {
  static constexpr size_t kRows = 2, kTokens = 4;

  template <size_t R, size_t T>
  static void tile(const MatmulArgs& a) noexcept {
    __m256 acc[R][T] = {};
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
  static DUET_INLINE void add_block(const Block& block, const BlockAct256* const* x, __m256* acc) {
    const KScales s = load_scales(block);
    const __m256i scale = even_odd(s.scale);
    __m256i sum[T];
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) sum[t] = offset_sum(s, *x[t]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i q = quants(block, i);
      const __m256i factor = splat_pair(scale, i);
#pragma GCC unroll 8
      for (size_t t = 0; t < T; ++t) {
        sum[t] = _mm256_add_epi32(
            sum[t], _mm256_madd_epi16(products(q, load256(x[t]->qs + 32 * i)), factor));
      }
    }
    const float d = _cvtsh_ss(block.d);
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), _mm256_set1_ps(d * x[t]->d), acc[t]);
      if constexpr (kHasMinimum<Block>) {
        const __m256i mins = _mm256_madd_epi16(s.min, load256(x[t]->bsums));
        const __m256 scale_min = _mm256_set1_ps(_cvtsh_ss(block.dmin) * x[t]->d);
        acc[t] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(mins), scale_min, acc[t]);
      }
    }
  }

  // Pairs of products as 16-bit lanes.
  static DUET_INLINE __m256i products(__m256i q, __m256i x) {
    if constexpr (kSignedQuants<Block>)
      return _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
    return _mm256_maddubs_epi16(q, x);
  }

  // What the offset of the quants adds to the sum, negated.
  static DUET_INLINE __m256i offset_sum(const KScales& s, const BlockAct256& x) {
    if constexpr (kOffsetShift<Block> == 0) return __m256i{};
    const __m256i offset = _mm256_slli_epi16(s.scale, kOffsetShift<Block>);
    return _mm256_sub_epi32(__m256i{}, _mm256_madd_epi16(offset, load256(x.bsums)));
  }
};

}  // namespace

void add_avx2_k(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul_tiled<KKernel<BlockQ2_K>>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul_tiled<KKernel<BlockQ3_K>>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] = matmul_tiled<KKernel<BlockQ4_K>>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul_tiled<KKernel<BlockQ5_K>>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul_tiled<KKernel<BlockQ6_K>>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul_tiled<KKernel<BlockIQ4_XS>>;
}

}  // namespace duet
