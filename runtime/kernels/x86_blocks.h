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

}  // namespace
}  // namespace duet
