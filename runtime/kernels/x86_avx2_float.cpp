// AVX2 + FMA + F16C: float kernels and attention.
#include <immintrin.h>

#include "runtime/kernels/attention_ops.h"
#include "runtime/kernels/float_ops.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

struct Avx2 {
  using Arch = xsimd::fma3<xsimd::avx2>;
  using Batch = xsimd::batch<float, Arch>;
  static constexpr size_t kRegisters = 16;

  static DUET_INLINE __m128i load16x8(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static DUET_INLINE Batch load_f16(const void* p) { return _mm256_cvtph_ps(load16x8(p)); }
  static DUET_INLINE Batch load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16x8(p)), 16));
  }
  static DUET_INLINE Batch fma(Batch a, Batch b, Batch c) { return _mm256_fmadd_ps(a, b, c); }
  static DUET_INLINE void store_f16(void* p, Batch v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // 16-bit integers, two to a lane. A vector of int, as the additions are: of __m256i, which is one of
  // long long, GCC 12 keeps sums twice and spills them.
  using Int [[gnu::vector_size(32)]] = int32_t;
  static DUET_INLINE Int zero() { return Int{}; }
  static DUET_INLINE Int pair(int32_t two) { return Int(_mm256_set1_epi32(two)); }
  static DUET_INLINE Int widen(const void* p) { return Int(_mm256_cvtepi8_epi16(load16x8(p))); }
  static DUET_INLINE Int dot(Int acc, Int a, Int b) {
    return acc + Int(_mm256_madd_epi16(__m256i(a), __m256i(b)));
  }
  static DUET_INLINE Batch to_float(Int v) { return _mm256_cvtepi32_ps(__m256i(v)); }
  static DUET_INLINE void store_low16(void* p, __m256 a, __m256 b) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(a), low),
                                               _mm256_and_si256(_mm256_castps_si256(b), low));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  static DUET_INLINE float lane_max(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // (a, b) -> (a c - b s, b c + a s)
  static DUET_INLINE Batch rotate_pairs(__m256 x, __m256 cs) {
    const __m256 swapped = _mm256_permute_ps(x, 0xb1);
    return _mm256_fmaddsub_ps(x, _mm256_moveldup_ps(cs),
                              _mm256_mul_ps(swapped, _mm256_movehdup_ps(cs)));
  }
  static DUET_INLINE float lane_sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

}  // namespace

void add_avx2_float(KernelTable& table) {
  FloatOps<Avx2>::add_to(table);
  AttentionOps<Avx2>::add_to(table);
}

}  // namespace duet
