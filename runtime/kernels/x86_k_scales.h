// Scales and minimums of the 256-element formats as 16-bit lanes, one per group of 16 elements;
// shared by the AVX2 and the AVX-512 file. Bit layouts: docs/kernels.md.
#pragma once

#include "quant/iq_blocks.h"
#include "runtime/kernels/x86_blocks.h"

namespace duet {
namespace {

struct KScales {
  __m256i scale;  // 16 x int16
  __m256i min;    // 16 x int16; only where kHasMinimum
};

template <class Block>
constexpr bool kHasMinimum = requires(Block b) {
  b.dmin;
};

// Unsigned quants carry this much above their value, so that they fit vpdpbusd and vpmaddubsw.
template <class Block>
constexpr int kOffsetShift = 0;
template <>
constexpr int kOffsetShift<BlockQ3_K> = 2;  // quants 0..7 for -4..3
template <>
constexpr int kOffsetShift<BlockQ6_K> = 5;  // quants 0..63 for -32..31
template <>
constexpr int kOffsetShift<WideBlock> = 6;  // quants 2..126 for -62..62

// Columns that share a scale.
template <class Block>
constexpr int kGroup = 16;
template <>
constexpr int kGroup<BlockQ4_K> = 32;
template <>
constexpr int kGroup<BlockQ5_K> = 32;
template <>
constexpr int kGroup<BlockIQ4_XS> = 32;

// The largest unsigned quant: decides how many products add up to no more than 16 bits.
template <class Block>
constexpr int kLargest = 0;
template <>
constexpr int kLargest<BlockQ2_K> = 3;
template <>
constexpr int kLargest<BlockQ3_K> = 7;
template <>
constexpr int kLargest<BlockQ4_K> = 15;
template <>
constexpr int kLargest<BlockQ5_K> = 31;
template <>
constexpr int kLargest<BlockQ6_K> = 63;
template <>
constexpr int kLargest<WideBlock> = kWideLargest + 64;
template <>
constexpr int kLargest<BlockIQ4_XS> = 241;  // 128 above the level

DUET_INLINE KScales load_scales(const BlockQ2_K& b) {
  const __m128i v = load128(b.scales), low = _mm_set1_epi8(15);
  return {_mm256_cvtepu8_epi16(_mm_and_si128(v, low)),
          _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(v, 4), low))};
}

DUET_INLINE KScales load_scales(const BlockQ3_K& b) {
  // Four bytes before the scales are quants: the words are ., s0, s1, s2.
  const __m128i v = load128(b.scales - 4);
  const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(v, 0x99), _mm_setr_epi32(0, 0, 4, 4));  // s0 s1 s0 s1
  const __m128i high = _mm_srlv_epi32(_mm_shuffle_epi32(v, 0xff), _mm_setr_epi32(0, 2, 4, 6));
  const __m128i six = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(15)),
                                   _mm_slli_epi32(_mm_and_si128(high, _mm_set1_epi8(3)), 4));
  return {_mm256_cvtepi8_epi16(_mm_sub_epi8(six, _mm_set1_epi8(32))), __m256i{}};
}

// Eight bytes, each of which serves two neighbouring groups of 16.
DUET_INLINE __m256i twice_each(uint32_t first4, uint32_t last4) {
  const __m128i v = _mm_setr_epi32(static_cast<int>(first4), static_cast<int>(last4), 0, 0);
  return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(v, v));
}

DUET_INLINE KScales load_scales_6bit(const uint8_t* packed) {
  uint32_t s[3];
  __builtin_memcpy(s, packed, 12);
  const uint32_t scale_high = (s[2] & 0x0f0f0f0fu) | (((s[0] >> 6) & 0x03030303u) << 4);
  const uint32_t min_high = ((s[2] >> 4) & 0x0f0f0f0fu) | (((s[1] >> 6) & 0x03030303u) << 4);
  return {twice_each(s[0] & 0x3f3f3f3fu, scale_high), twice_each(s[1] & 0x3f3f3f3fu, min_high)};
}

DUET_INLINE KScales load_scales(const BlockQ4_K& b) { return load_scales_6bit(b.scales); }
DUET_INLINE KScales load_scales(const BlockQ5_K& b) { return load_scales_6bit(b.scales); }

DUET_INLINE KScales load_scales(const BlockQ6_K& b) {
  return {_mm256_cvtepi8_epi16(load128(b.scales)), __m256i{}};
}

DUET_INLINE KScales load_scales(const WideBlock& b) {
  return {_mm256_cvtepi8_epi16(load128(b.scale)), __m256i{}};
}

// Eight scales, each for 32 elements.
DUET_INLINE __m128i load_scales8(const BlockIQ4_XS& b) {
  int32_t packed;
  __builtin_memcpy(&packed, b.scales_l, 4);
  const __m128i bytes = _mm_cvtsi32_si128(packed), low4 = _mm_set1_epi8(15);
  const __m128i low = _mm_cvtepu8_epi16(
      _mm_unpacklo_epi8(_mm_and_si128(bytes, low4), _mm_and_si128(_mm_srli_epi16(bytes, 4), low4)));
  // Lane j: bits 2j, 2j+1 of scales_h moved to the top by a multiplication, then down to bits 4, 5.
  const __m128i to_top =
      _mm_setr_epi16(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1);
  const __m128i top = _mm_mullo_epi16(_mm_set1_epi16(static_cast<int16_t>(b.scales_h)), to_top);
  const __m128i high = _mm_slli_epi16(_mm_srli_epi16(top, 14), 4);
  return _mm_sub_epi16(_mm_or_si128(low, high), _mm_set1_epi16(32));
}

DUET_INLINE KScales load_scales(const BlockIQ4_XS& b) {
  const __m128i v = load_scales8(b);
  return {_mm256_set_m128i(_mm_unpackhi_epi16(v, v), _mm_unpacklo_epi16(v, v)), __m256i{}};
}

}  // namespace
}  // namespace duet
