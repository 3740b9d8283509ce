// AVX2 + FMA + F16C: formats with blocks of 32, activation blocks.
#include "runtime/kernels/x86_avx2_block32.h"

namespace duet {
namespace {

DUET_INLINE __m256i load_bits(const float* p) { return load256(p); }

// max |x| of n values (a multiple of 8) by the bits without sign: NaN and infinity come out on top.
DUET_INLINE uint32_t max_magnitude_bits(const float* x, size_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i max = {};
  for (size_t i = 0; i < n; i += 8)
    max = _mm256_max_epu32(max, _mm256_and_si256(load_bits(x + i), magnitude));
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

struct BlockScale {
  float d, inverse;  // inverse 0: all quants are 0
};

DUET_INLINE BlockScale block_scale(const float* x, size_t n) {
  const uint32_t bits = max_magnitude_bits(x, n);
  float max;
  __builtin_memcpy(&max, &bits, 4);
  if (bits >= 0x7f800000u) return {__builtin_nanf(""), 0.0f};
  if (max < kActFloor) return {0.0f, 0.0f};
  return {max / 127.0f, 127.0f / max};
}

// 32 values as bytes, rounded to nearest even.
DUET_INLINE __m256i quantize32(const float* x, float inverse) {
  if (inverse == 0.0f) return __m256i{};
  const __m256 scale = _mm256_set1_ps(inverse);
  const auto eight = [&](int i) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), scale));
  };
  const __m256i low = _mm256_packs_epi32(eight(0), eight(1)),
                high = _mm256_packs_epi32(eight(2), eight(3));
  // The packs work within 128-bit halves: put the groups of four back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}

// Sum of bytes: the lower and the upper 16.
DUET_INLINE void sum_halves(__m256i q, int* low, int* high) {
  const __m256i sums =
      _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
  __m256i s = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
  s = _mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0xb1));
  *low = _mm_cvtsi128_si32(_mm256_castsi256_si128(s));
  *high = _mm_cvtsi128_si32(_mm256_extracti128_si256(s, 1));
}

void quantize_act32(const float* x, void* dst, size_t n) noexcept {
  auto* out = static_cast<BlockAct32*>(dst);
  for (size_t b = 0; b < n / 32; ++b) {
    const BlockScale scale = block_scale(x + 32 * b, 32);
    const __m256i q = quantize32(x + 32 * b, scale.inverse);
    int low, high;
    sum_halves(q, &low, &high);
    out[b].d = scale.d;
    out[b].sum = low + high;
    store256(out[b].qs, q);
  }
}

void quantize_act256(const float* x, void* dst, size_t n) noexcept {
  auto* out = static_cast<BlockAct256*>(dst);
  for (size_t b = 0; b < n / 256; ++b) {
    const BlockScale scale = block_scale(x + 256 * b, 256);
    out[b].d = scale.d;
    for (size_t i = 0; i < 8; ++i) {
      const __m256i q = quantize32(x + 256 * b + 32 * i, scale.inverse);
      int low, high;
      sum_halves(q, &low, &high);
      store256(out[b].qs + 32 * i, q);
      out[b].bsums[2 * i] = static_cast<int16_t>(low);
      out[b].bsums[2 * i + 1] = static_cast<int16_t>(high);
      out[b].bsums32[i] = static_cast<int16_t>(low + high);
    }
  }
}

}  // namespace

void add_avx2_block32(KernelTable& table) {
  set_block32_256(table);
  table.quantize_act32 = quantize_act32;
  table.quantize_act256 = quantize_act256;
}

}  // namespace duet
