// A few tokens times the 256-element formats with AVX-512 VNNI: eight rows, block after block.
//
// vpdpbusd adds four products of a row, a second one those of the other half of a group; sums of two
// groups are packed to 16 bits and multiplied by their scales (vpdpwssd).
#pragma once

#include <cstddef>
#include <type_traits>

#include "runtime/kernels/x86_avx512_k_panel.h"
#include "runtime/kernels/x86_avx512_rows.h"

namespace duet {
namespace {

// ---- by format ----------------------------------------------------------------------------------
// A block in four steps of four times sixteen columns.
// column(i, k): the first column of part k of step i. quants(b, i, q): part k of four rows in q[k].
template <class Block>
struct QuadFormat;

template <class Block>
DUET_INLINE __m512i chunk(const Block* const* b, size_t offset) {
  const auto at = [&](size_t r) { return reinterpret_cast<const std::byte*>(b[r]) + offset; };
  return four_lanes(at(0), at(1), at(2), at(3));
}
template <class Block>
DUET_INLINE void chunks(const Block* const* b, size_t offset, __m512i& v, __m512i& w) {
  const auto at = [&](size_t r) { return reinterpret_cast<const std::byte*>(b[r]) + offset; };
  four_lanes(at(0), at(1), at(2), at(3), v, w);
}
DUET_INLINE __m512i or_bits(__m512i v, __m512i bits, int left, int mask) {
  return or_bits(v, moved_left(bits, left), mask);
}
// Lower nibbles, then upper ones, of 32 bytes.
template <class Block>
DUET_INLINE void nibbles(const Block* const* b, size_t offset, __m512i (&q)[4]) {
  __m512i v, w;
  chunks(b, offset, v, w);
  q[0] = masked(v, 15), q[1] = masked(w, 15), q[2] = high_nibbles(v), q[3] = high_nibbles(w);
}

template <>
struct QuadFormat<BlockQ4_K> {
  static constexpr int column(int i, int k) { return 64 * i + 16 * k; }
  static DUET_INLINE void quants(const BlockQ4_K* const* b, int i, __m512i (&q)[4]) {
    nibbles(b, offsetof(BlockQ4_K, qs) + 32 * static_cast<size_t>(i), q);
  }
};

template <>
struct QuadFormat<BlockQ5_K> {
  static constexpr int column(int i, int k) { return 64 * i + 16 * k; }
  static DUET_INLINE void quants(const BlockQ5_K* const* b, int i, __m512i (&q)[4]) {
    nibbles(b, offsetof(BlockQ5_K, qs) + 32 * static_cast<size_t>(i), q);
    __m512i v, w;
    chunks(b, offsetof(BlockQ5_K, qh), v, w);
    q[0] = or_bits(q[0], v, 4 - 2 * i, 16), q[1] = or_bits(q[1], w, 4 - 2 * i, 16);
    q[2] = or_bits(q[2], v, 3 - 2 * i, 16), q[3] = or_bits(q[3], w, 3 - 2 * i, 16);
  }
};

template <>
struct QuadFormat<BlockQ6_K> {
  static constexpr int column(int i, int k) { return 128 * (i / 2) + 32 * (i % 2) + 64 * (k / 2) + 16 * (k % 2); }
  static DUET_INLINE void quants(const BlockQ6_K* const* b, int i, __m512i (&q)[4]) {
    nibbles(b, offsetof(BlockQ6_K, ql) + 32 * static_cast<size_t>(i), q);
    __m512i v, w;
    chunks(b, offsetof(BlockQ6_K, qh) + 32 * static_cast<size_t>(i / 2), v, w);
    const int at = 2 * (i % 2);  // of the bits
    q[0] = or_bits(q[0], v, 4 - at, 0x30), q[1] = or_bits(q[1], w, 4 - at, 0x30);
    q[2] = or_bits(q[2], v, -at, 0x30), q[3] = or_bits(q[3], w, -at, 0x30);
  }
};

// Sixteen bytes are sixteen columns of four groups.
struct TwoBitColumns {
  static constexpr int column(int i, int k) { return 128 * (i / 2) + 16 * (i % 2) + 32 * k; }
  static DUET_INLINE void quants(__m512i v, __m512i (&q)[4]) {
    q[0] = masked(v, 3), q[1] = masked(_mm512_srli_epi16(v, 2), 3);
    q[2] = masked(_mm512_srli_epi16(v, 4), 3), q[3] = masked(_mm512_srli_epi16(v, 6), 3);
  }
};
template <>
struct QuadFormat<BlockQ2_K> : TwoBitColumns {
  static DUET_INLINE void quants(const BlockQ2_K* const* b, int i, __m512i (&q)[4]) {
    TwoBitColumns::quants(chunk(b, offsetof(BlockQ2_K, qs) + 16 * static_cast<size_t>(i)), q);
  }
};
template <>
struct QuadFormat<BlockQ3_K> : TwoBitColumns {
  static DUET_INLINE void quants(const BlockQ3_K* const* b, int i, __m512i (&q)[4]) {
    TwoBitColumns::quants(chunk(b, offsetof(BlockQ3_K, qs) + 16 * static_cast<size_t>(i)), q);
    const __m512i bits = chunk(b, offsetof(BlockQ3_K, hmask) + 16 * static_cast<size_t>(i % 2));
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) q[k] = or_bits(q[k], bits, 2 - 4 * (i / 2) - k, 4);
  }
};

template <>
struct QuadFormat<BlockIQ4_XS> {
  static constexpr int column(int i, int k) { return 64 * i + 16 * k; }
  static DUET_INLINE void quants(const BlockIQ4_XS* const* b, int i, __m512i (&q)[4]) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128)));
    __m512i v, w;
    chunks(b, offsetof(BlockIQ4_XS, qs) + 32 * static_cast<size_t>(i), v, w);
    q[0] = masked(v, 15), q[1] = high_nibbles(v), q[2] = masked(w, 15), q[3] = high_nibbles(w);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) q[k] = _mm512_shuffle_epi8(table, q[k]);
  }
};

// ---- scales -------------------------------------------------------------------------------------
// 16 bits hold the sums of a group (of 16: of its four places), so that scales of two multiply at once.
template <class Block>
constexpr bool kPacked = !std::is_same_v<Block, BlockIQ4_XS>;

// Bytes a and b, each above a zero byte (-1 for the lower byte: unsigned below it) four times.
DUET_INLINE __m512i two_bytes(__m512i v, int a, int b, bool above) {
  const auto words = [&](int at) { return (above ? at * 0x1000100 | 0x800080 : at * 0x10001 | ~0x7fff7fff); };
  const int low = words(a), high = words(b);
  return _mm512_shuffle_epi8(v, every_lane(low, low, high, high));
}
// Factors of the sums of parts 2 p and 2 p + 1 of step i (groups of 32: all four, p = 0).
template <class Block>
DUET_INLINE __m512i factors(__m512i lanes, int i, int p) {
  using Format = QuadFormat<Block>;
  if constexpr (kGroup<Block> == 16) {
    const int a = Format::column(i, 2 * p) / 16, b = Format::column(i, 2 * p + 1) / 16;
    if constexpr (kHasMinimum<Block>) return two_bytes(masked(lanes, 15), a, b, false);
    return _mm512_srai_epi16(two_bytes(lanes, a, b, true), 8);
  } else if constexpr (kPacked<Block>) {
    return two_bytes(lanes, 2 * i, 2 * i + 1, false);
  } else {
    const int group = 2 * i + p, word = 0x1008080 + 0x2020000 * group;
    return _mm512_srai_epi32(_mm512_shuffle_epi8(lanes, every_lane(word, word, word, word)), 16);
  }
}
// What multiplies the sums of activations: minimums, or scales (for the offset of the quants).
struct SideFactors {
  __m512i v[2];
};
template <class Block>
DUET_INLINE SideFactors side_factors(__m512i lanes) {
  const __m512i zero = {};
  if constexpr (!kPacked<Block>) return {{lanes, zero}};
  else if constexpr (kGroup<Block> == 32) return {{_mm512_unpackhi_epi8(lanes, zero), zero}};
  else if constexpr (kHasMinimum<Block>)
    return {{_mm512_unpacklo_epi8(high_nibbles(lanes), zero), _mm512_unpackhi_epi8(high_nibbles(lanes), zero)}};
  else return {{_mm512_srai_epi16(_mm512_unpacklo_epi8(zero, lanes), 8), _mm512_srai_epi16(_mm512_unpackhi_epi8(zero, lanes), 8)}};
}

template <class Block>
DUET_INLINE __m512i add_side(const SideFactors& f, const BlockAct256& x) {
  if constexpr (kGroup<Block> == 32) return _mm512_madd_epi16(f.v[0], lanes_of(x.bsums32));
  return _mm512_dpwssd_epi32(_mm512_madd_epi16(f.v[0], lanes_of(x.bsums)), f.v[1], lanes_of(x.bsums + 8));
}

template <class Block>
DUET_INLINE __m512i add_parts(__m512i dot, const __m512i (&q)[4], const __m512i (&x)[4], const __m512i (&f)[2]) {
  if constexpr (kGroup<Block> == 16) {
    dot = _mm512_dpwssd_epi32(dot, _mm512_packs_epi32(dot4(q[0], x[0]), dot4(q[1], x[1])), f[0]);
    return _mm512_dpwssd_epi32(dot, _mm512_packs_epi32(dot4(q[2], x[2]), dot4(q[3], x[3])), f[1]);
  } else {
    const __m512i a = _mm512_dpbusd_epi32(dot4(q[0], x[0]), q[1], x[1]);
    const __m512i b = _mm512_dpbusd_epi32(dot4(q[2], x[2]), q[3], x[3]);
    if constexpr (kPacked<Block>) return _mm512_dpwssd_epi32(dot, _mm512_packs_epi32(a, b), f[0]);
    return _mm512_add_epi32(_mm512_add_epi32(dot, _mm512_mullo_epi32(a, f[0])), _mm512_mullo_epi32(b, f[1]));
  }
}

template <class Block>
struct KQuads {
  static constexpr size_t kTokens = 4, kRows = 8, kGroupsAhead = 1;

  template <size_t T>
  static void decode(const std::byte* const* rows, const std::byte* act, size_t x_stride, size_t cols, Ahead ahead,
                     float* y) {
    const BlockAct256* x[T];
    __m256 sum[T];
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) {
      x[t] = reinterpret_cast<const BlockAct256*>(act + t * x_stride);
      sum[t] = __m256{};
    }
    const Block* block[kRows];
    for (size_t b = 0; b < cols / 256; ++b) {
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) block[r] = reinterpret_cast<const Block*>(rows[r]) + b;
      add_block<T>(block, x, ahead, sum);
      ahead.next(kRows * sizeof(Block));
#pragma GCC unroll 4
      for (size_t t = 0; t < T; ++t) ++x[t];
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) _mm256_store_ps(y + t * kRows, sum[t]);
  }

  template <size_t T>
  static DUET_INLINE void add_block(const Block* const* b, const BlockAct256* const* x, const Ahead& ahead,
                                    __m256 (&sum)[T]) {
    const __m512i lanes[2] = {scale_lanes(b), scale_lanes(b + 4)};
    __m512i dot[2][T] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i q[2][4], f[2][2];
#pragma GCC unroll 2
      for (size_t r = 0; r < 2; ++r) {
        QuadFormat<Block>::quants(b + 4 * r, i, q[r]);
        f[r][0] = factors<Block>(lanes[r], i, 0);
        if constexpr (kGroup<Block> == 16 || !kPacked<Block>) f[r][1] = factors<Block>(lanes[r], i, 1);
      }
      ahead.fetch<kRows * sizeof(Block), 4>(static_cast<size_t>(i));
#pragma GCC unroll 4
      for (size_t t = 0; t < T; ++t) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) v[k] = lanes_of(x[t]->qs + QuadFormat<Block>::column(i, k));
        dot[0][t] = add_parts<Block>(dot[0][t], q[0], v, f[0]);
        dot[1][t] = add_parts<Block>(dot[1][t], q[1], v, f[1]);
      }
    }
    const SideFactors side[2] = {side_factors<Block>(lanes[0]), side_factors<Block>(lanes[1])};
    const __m256 d = eight_halves([&](size_t r) { return b[r]->d; });
    __m256 dmin = {};
    if constexpr (kHasMinimum<Block>) dmin = eight_halves([&](size_t r) { return b[r]->dmin; });
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) {
      const __m512i n[4] = {dot[0][t], dot[1][t], add_side<Block>(side[0], *x[t]), add_side<Block>(side[1], *x[t])};
      sum[t] = add_terms(fold_rows32(n), d, dmin, x[t]->d, sum[t]);
    }
  }

  // folded: in 128-bit lane i the sums of rows i and 4 + i, then their sides.
  static DUET_INLINE __m256 add_terms(__m512i folded, __m256 d, __m256 dmin, float x_d, __m256 sum) {
    const __m512i n = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), folded);
    const __m256 dx = _mm256_set1_ps(x_d);
    __m256i dots = _mm512_castsi512_si256(n);
    const __m256i sides = _mm512_extracti64x4_epi64(n, 1);
    if constexpr (kOffsetShift<Block> != 0) dots = _mm256_sub_epi32(dots, _mm256_slli_epi32(sides, kOffsetShift<Block>));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_mul_ps(d, dx), sum);
    if constexpr (kHasMinimum<Block>) sum = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(sides), _mm256_mul_ps(dmin, dx), sum);
    return sum;
  }
};

}  // namespace
}  // namespace duet
