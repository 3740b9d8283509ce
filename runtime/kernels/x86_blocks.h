// What all x86 files read blocks with.
#pragma once

#include <immintrin.h>

#include "quant/format.h"
#include "runtime/kernels/matmul_tiles.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

DUET_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
DUET_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// 32 bits -> 32 bytes, 16 where the bit is set.
DUET_INLINE __m256i fifth_bits(const uint8_t* qh) {
  int32_t bits;
  __builtin_memcpy(&bits, qh, 4);
  const __m256i byte_of =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

// Rows computed side by side are more streams than hardware prefetchers follow. While a group of
// rows is computed, the bytes that follow it are fetched into the L2 cache in address order; at the
// end of a call those of MatmulArgs::next, or the rows behind.
class Ahead {
 public:
  explicit DUET_INLINE Ahead(const std::byte* p) : at_(reinterpret_cast<uintptr_t>(p)) {}

  // Part i of n of a step that reads kBytes, once v (a vector) is there and before it is used: compilers
  // gather prefetches at the start of a step, and a burst of them holds up the loads of the step.
  // (GCC even drops those in functions that do nothing else, as calls without an effect.)
  template <size_t kBytes, size_t n, class V>
  DUET_INLINE void fetch_after(size_t i, V& v) const {
    constexpr size_t kLines = (kBytes + 63) / 64;
#pragma GCC unroll 32
    for (size_t line = i * kLines / n; line < (i + 1) * kLines / n; ++line)
#if defined(__AVX512F__)
      __asm__ volatile("prefetcht1 %1" : "+v"(v) : "m"(*address(64 * line)));
#else
      __asm__ volatile("prefetcht1 %1" : "+x"(v) : "m"(*address(64 * line)));
#endif
  }
  DUET_INLINE void fetch_all(size_t n_bytes) const {
#pragma GCC unroll 32
    for (size_t i = 0; i < n_bytes; i += 64) _mm_prefetch(address(i), _MM_HINT_T1);
  }
  DUET_INLINE void next(size_t n_bytes) { at_ += n_bytes; }

 private:
  DUET_INLINE const char* address(size_t i) const { return reinterpret_cast<const char*>(at_ + i); }  // need not exist
  uintptr_t at_;
};

}  // namespace
}  // namespace duet
