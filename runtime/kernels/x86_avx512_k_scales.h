// Scales of the 256-element formats, four rows at a time; shared by decode and prefill of AVX-512.
#pragma once

#include "runtime/kernels/x86_avx512_panel.h"
#include "runtime/kernels/x86_k_scales.h"

namespace duet {
namespace {

template <>
constexpr int kOffsetShift<BlockIQ4_XS> = 7;

// scale_lanes: 16 bytes per row. Q4_K, Q5_K: 8 scales, 8 minimums; Q2_K: as stored; Q3_K, Q6_K: 16
// signed scales; IQ4_XS: 8 scales of 16 bits.
DUET_INLINE __m512i every_lane(int a, int b, int c, int d) {
  return _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
}

// The first 16 bytes are d, dmin and 12 bytes of scales: words s0, s1, s2 (docs/kernels.md).
DUET_INLINE __m512i six_bit_lanes(__m512i v) {
  const __m512i low = _mm512_srlv_epi32(_mm512_shuffle_epi32(v, _MM_PERM_DCDB),  // s0 s2 s1 s2
                                        every_lane(0, 0, 0, 4));
  const __m512i high = _mm512_srli_epi32(_mm512_shuffle_epi32(v, _MM_PERM_CABA), 2);  // . s0 . s1
  return _mm512_or_si512(
      _mm512_and_si512(low, every_lane(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)),
      _mm512_and_si512(high, every_lane(0, 0x30303030, 0, 0x30303030)));
}
DUET_INLINE __m512i scale_lanes(const BlockQ4_K* const* b) {
  return six_bit_lanes(four_lanes(b[0], b[1], b[2], b[3]));
}
DUET_INLINE __m512i scale_lanes(const BlockQ5_K* const* b) {
  return six_bit_lanes(four_lanes(b[0], b[1], b[2], b[3]));
}

DUET_INLINE __m512i scale_lanes(const BlockQ2_K* const* b) {
  return four_lanes(b[0]->scales, b[1]->scales, b[2]->scales, b[3]->scales);
}
DUET_INLINE __m512i scale_lanes(const BlockQ6_K* const* b) {
  return four_lanes(b[0]->scales, b[1]->scales, b[2]->scales, b[3]->scales);
}

DUET_INLINE __m512i scale_lanes(const BlockQ3_K* const* b) {
  // Four bytes before the scales are quants: the words are ., s0, s1, s2.
  const auto at = [&](int r) { return b[r]->scales - 4; };
  const __m512i v = four_lanes(at(0), at(1), at(2), at(3));
  const __m512i low = _mm512_srlv_epi32(_mm512_shuffle_epi32(v, _MM_PERM_CBCB),  // s0 s1 s0 s1
                                        every_lane(0, 0, 4, 4));
  const __m512i high = _mm512_srlv_epi32(_mm512_shuffle_epi32(v, _MM_PERM_DDDD),
                                         every_lane(0, 2, 4, 6));
  const __m512i six = _mm512_or_si512(masked(low, 15), _mm512_slli_epi32(masked(high, 3), 4));
  return _mm512_sub_epi8(six, _mm512_set1_epi8(32));
}

DUET_INLINE __m512i scale_lanes(const BlockIQ4_XS* const* b) {
  // d, scales_h, 4 bytes of low nibbles, then quants.
  const __m512i v = four_lanes(b[0], b[1], b[2], b[3]);
  const __m512i low_at = _mm512_broadcast_i32x4(
      _mm_setr_epi8(4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1));
  const __m512i low = _mm512_srlv_epi16(
      _mm512_shuffle_epi8(v, low_at),
      _mm512_broadcast_i32x4(_mm_setr_epi16(0, 4, 0, 4, 0, 4, 0, 4)));
  const __m512i high = _mm512_srlv_epi16(
      _mm512_shuffle_epi8(v, _mm512_set1_epi16(0x0302)),
      _mm512_broadcast_i32x4(_mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14)));
  const __m512i six = _mm512_or_si512(
      _mm512_and_si512(low, _mm512_set1_epi16(15)),
      _mm512_slli_epi16(_mm512_and_si512(high, _mm512_set1_epi16(3)), 4));
  return _mm512_sub_epi16(six, _mm512_set1_epi16(32));
}

DUET_INLINE __m512i scale_lanes(const WideBlock* const* b) {
  return four_lanes(b[0]->scale, b[1]->scale, b[2]->scale, b[3]->scale);
}

}  // namespace
}  // namespace duet
