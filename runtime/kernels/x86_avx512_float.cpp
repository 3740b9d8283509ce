// AVX-512 (F, BW, DQ, VL): float kernels and attention.
#include <immintrin.h>

#include "runtime/kernels/attention_ops.h"
#include "runtime/kernels/float_ops.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

struct Avx512 {
  using Arch = xsimd::avx512f;
  using Batch = xsimd::batch<float, Arch>;
  static constexpr size_t kRegisters = 32;

  static DUET_INLINE __m256i load16x16(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static DUET_INLINE Batch load_f16(const void* p) { return _mm512_cvtph_ps(load16x16(p)); }
  static DUET_INLINE Batch load_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16x16(p)), 16));
  }
  static DUET_INLINE Batch fma(Batch a, Batch b, Batch c) { return _mm512_fmadd_ps(a, b, c); }
  static DUET_INLINE void store_f16(void* p, Batch v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(__mmask16{0xffff}, v, _MM_FROUND_TO_NEAREST_INT));
  }
  // 16-bit integers, two to a lane. A vector of int, as the sums are: of __m512i, which is one of
  // long long, GCC 12 keeps sums twice and spills them.
  using Int [[gnu::vector_size(64)]] = int32_t;
  static DUET_INLINE Int zero() { return Int{}; }
  static DUET_INLINE Int pair(int32_t two) { return Int(_mm512_set1_epi32(two)); }
  static DUET_INLINE Int widen(const void* p) { return Int(_mm512_cvtepi8_epi16(load16x16(p))); }
  static DUET_INLINE Int dot(Int acc, Int a, Int b) {
    return Int(_mm512_dpwssd_epi32(__m512i(acc), __m512i(a), __m512i(b)));
  }
  static DUET_INLINE Batch to_float(Int v) { return _mm512_cvtepi32_ps(__m512i(v)); }
  static DUET_INLINE void store_low16(void* p, __m512 a, __m512 b) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                          30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(_mm512_castps_si512(a), even, _mm512_castps_si512(b)));
  }
  static DUET_INLINE float lane_max(__m512 v) { return _mm512_reduce_max_ps(v); }
  // (a, b) -> (a c - b s, b c + a s)
  static DUET_INLINE Batch rotate_pairs(__m512 x, __m512 cs) {
    const __m512 swapped = _mm512_permute_ps(x, 0xb1);
    return _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(cs),
                              _mm512_mul_ps(swapped, _mm512_movehdup_ps(cs)));
  }
  static DUET_INLINE float lane_sum(__m512 v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 w = _mm256_add_ps(_mm512_castps512_ps256(v), high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

}  // namespace

void add_avx512_float(KernelTable& table) {
  FloatOps<Avx512>::add_to(table);
  AttentionOps<Avx512>::add_to(table);
}

}  // namespace duet
