// One token times Q4_K, Q5_K, Q6_K and IQ4_XS with AVX-512 VNNI: four rows by four blocks at a time, so that
// memory is read in few streams: floats are added along a row, four rows side by side.
//
// vpdpbusd adds four products of a row. Before anything is multiplied by a scale, the sums of two
// groups share a register as 16-bit halves of its lanes, and four rows are added up within 128-bit
// lanes, so that lane i of each belongs to row i: scales and their products then cost a quarter.
#pragma once

#include <cstddef>
#include <type_traits>

#include "runtime/kernels/x86_avx512_k_panel.h"
#include "runtime/kernels/x86_avx512_rows.h"

namespace duet {
namespace {

// Two rows of 16-bit sums, or two of 32 bits, added up within 128-bit lanes: a b a b.
DUET_INLINE __m512i fold_two16(__m512i a, __m512i b) {
  return _mm512_add_epi16(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
DUET_INLINE __m512i fold_two32(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
// The same with rows a b a b and c d c d: a b c d.
DUET_INLINE __m512i fold_pairs32(__m512i ab, __m512i cd) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
// Lane i of each 128 bits of the result: those of v[i] added up.
DUET_INLINE __m512i fold_rows16(const __m512i (&v)[4]) {
  const __m512i ab = fold_two16(v[0], v[1]), cd = fold_two16(v[2], v[3]);
  return _mm512_add_epi16(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
// 128-bit lane i of the result: the lanes of v[i] added up.
DUET_INLINE __m512i fold_lanes(const __m512i (&v)[4]) {
  const auto fold = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  };
  const __m512i low = fold(v[0], v[1]), high = fold(v[2], v[3]);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88),
                          _mm512_shuffle_i32x4(low, high, 0xdd));
}
// Lane 4 l + i <- lane 4 i + l.
DUET_INLINE __m512i transpose4(__m512i v) {
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}

// The lower 16 bits of `low`, above them `high` moved left.
DUET_INLINE __m512i word_pairs(__m512i low, __m512i high, unsigned left) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, left));
}
DUET_INLINE __m512i add_scaled(__m512i v0, __m512i f0, __m512i v1, __m512i f1) {
  return _mm512_dpwssd_epi32(_mm512_madd_epi16(v0, f0), v1, f1);
}

// 32 bytes in both halves.
DUET_INLINE __m512i both_halves(const uint8_t* p) { return _mm512_broadcast_i64x4(load256(p)); }
// 16-bit lanes of the lower half shifted right by `low`, of the upper half by `high`.
DUET_INLINE __m512i shift_halves(__m512i v, int low, int high) {
  const __m256i l = _mm256_set1_epi16(static_cast<int16_t>(low)),
                h = _mm256_set1_epi16(static_cast<int16_t>(high));
  return _mm512_srlv_epi16(v, _mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1));
}
// A block of the token: activations in the order of the quants, and their sums in the order of the
// scales, the same in all 128-bit lanes.
struct TokenBlock {
  __m512i q[4], sums[2];
};
// Four rows. dot: lane i of each 128 bits is a part of row i. side: 128-bit lane i holds four parts of
// row i of what minimums or the offset of the quants take away. head: where d and dmin are, if it is
// in the first 16 bytes of a block.
struct FourRows {
  __m512i dot, side, head;
};

// ---- by format ----------------------------------------------------------------------------------
// arrange(x): the token. four(blocks, x, fetch): as above; fetch(r, v) once row r is in v.
template <class Block>
struct RowFormat;

DUET_INLINE __m512i low_halves(__m512i u, __m512i v) { return _mm512_shuffle_i64x2(u, v, 0x44); }
DUET_INLINE __m512i high_halves(__m512i u, __m512i v) { return _mm512_shuffle_i64x2(u, v, 0xee); }
DUET_INLINE __m512i permuted_sums(const BlockAct256& x, __m128i order) {
  const __m512i at = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(order));
  const __m512i twice = _mm512_shuffle_i64x2(at, at, 0x44);
  return _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(load256(x.bsums)));
}

// Q4_K, Q5_K: lower nibbles of 64 bytes are groups 4 i, 4 i + 2, the upper 4 i + 1, 4 i + 3.
DUET_INLINE TokenBlock arrange_nibbles(const BlockAct256& x) {
  TokenBlock t;
  for (int i = 0; i < 2; ++i) {
    const __m512i a = load512(x.qs + 128 * i), b = load512(x.qs + 128 * i + 64);
    t.q[2 * i] = low_halves(a, b);
    t.q[2 * i + 1] = high_halves(a, b);
  }
  t.sums[0] = lanes_of(x.bsums32);
  return t;
}

template <>
struct RowFormat<BlockQ4_K> {
  using Block = BlockQ4_K;
  static DUET_INLINE TokenBlock arrange(const BlockAct256& x) { return arrange_nibbles(x); }
  template <class Fetch>
  static DUET_INLINE FourRows four(const Block* const* b, const TokenBlock& x, const Fetch& fetch) {
    const __m512i head = four_lanes(b[0], b[1], b[2], b[3]), lanes = six_bit_lanes(head);
    __m512i pair[2][4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) {
#pragma GCC unroll 2
      for (size_t i = 0; i < 2; ++i) {
        const __m512i v = load512(b[r]->qs + 64 * i);
        pair[i][r] = word_pairs(dot4(masked(v, 15), x.q[2 * i]),
                                dot4(masked(v, 0xf0), x.q[2 * i + 1]), 12);
      }
      fetch(r, pair[1][r]);
    }
    const __m512i s = _mm512_unpacklo_epi8(lanes, __m512i{});
    const __m512i f0 = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 1, 5, 9, 13, 1, 5, 9, 13), s);
    const __m512i f1 = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(2, 6, 10, 14, 2, 6, 10, 14, 3, 7, 11, 15, 3, 7, 11, 15), s);
    return {add_scaled(fold_rows16(pair[0]), f0, fold_rows16(pair[1]), f1),
            _mm512_madd_epi16(_mm512_unpackhi_epi8(lanes, __m512i{}), x.sums[0]), head};
  }
};

// Sums of four fill 15 bits: two rows at most add up before the scales.
template <>
struct RowFormat<BlockQ5_K> {
  using Block = BlockQ5_K;
  static DUET_INLINE TokenBlock arrange(const BlockAct256& x) { return arrange_nibbles(x); }
  template <class Fetch>
  static DUET_INLINE FourRows four(const Block* const* b, const TokenBlock& x, const Fetch& fetch) {
    const __m512i head = four_lanes(b[0], b[1], b[2], b[3]), lanes = six_bit_lanes(head);
    const __m512i s = _mm512_unpacklo_epi8(lanes, __m512i{});
    __m512i two[2];
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      __m512i first[2], second[2];
      products(*b[2 * h], x, first);
      fetch(2 * h, first[1]);
      products(*b[2 * h + 1], x, second);
      fetch(2 * h + 1, second[1]);
      const __m512i at = _mm512_add_epi32(
          _mm512_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4, 1, 5, 1, 5, 1, 5, 1, 5), _mm512_set1_epi32(static_cast<int>(8 * h)));
      const __m512i f0 = _mm512_permutexvar_epi32(at, s);
      const __m512i f1 = _mm512_permutexvar_epi32(_mm512_add_epi32(at, _mm512_set1_epi32(2)), s);
      two[h] = add_scaled(fold_two16(first[0], second[0]), f0, fold_two16(first[1], second[1]), f1);
    }
    return {fold_pairs32(two[0], two[1]),
            _mm512_madd_epi16(_mm512_unpackhi_epi8(lanes, __m512i{}), x.sums[0]), head};
  }
  static DUET_INLINE void products(const Block& b, const TokenBlock& x, __m512i (&pair)[2]) {
    // Register i takes bits i % 2 + 4 (i / 2) and two above it, for its halves.
    const __m512i bits = shift_halves(both_halves(b.qh), 0, 2);
    const __m512i v = load512(b.qs), w = load512(b.qs + 64);
    pair[0] = word_pairs(
        dot4(or_bits(masked(v, 15), _mm512_slli_epi16(bits, 4), 16), x.q[0]),
        dot4(or_bits(high_nibbles(v), _mm512_slli_epi16(bits, 3), 16), x.q[1]), 16);
    pair[1] = word_pairs(
        dot4(or_bits(masked(w, 15), bits, 16), x.q[2]),
        dot4(or_bits(high_nibbles(w), _mm512_srli_epi16(bits, 1), 16), x.q[3]), 16);
  }
};

// Sums of four fill 16 bits: scales first. Lanes l of registers 2 p, 2 p + 1: groups 8 p + l, + 4.
template <>
struct RowFormat<BlockQ6_K> {
  using Block = BlockQ6_K;
  static DUET_INLINE TokenBlock arrange(const BlockAct256& x) {
    return {{load512(x.qs), load512(x.qs + 64), load512(x.qs + 128), load512(x.qs + 192)},
            {permuted_sums(x, _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 0, 4, 1, 5, 2, 6, 3, 7)),
             permuted_sums(x, _mm_setr_epi8(8, 12, 9, 13, 10, 14, 11, 15, 8, 12, 9, 13, 10, 14, 11,
                                            15))}};
  }
  template <class Fetch>
  static DUET_INLINE FourRows four(const Block* const* b, const TokenBlock& x, const Fetch& fetch) {
    const __m512i lanes = scale_lanes(b);
    const auto words = [&](__m128i at) {
      return _mm512_srai_epi16(_mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(at)), 8);
    };
    const __m512i s0 =
        words(_mm_setr_epi8(-1, 0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7));
    const __m512i s1 =
        words(_mm_setr_epi8(-1, 8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15));
    __m512i dot[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) {
      const __m512i at = _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                          _mm512_set1_epi32(static_cast<int>(4 * r)));
      dot[r] = add_scaled(products(*b[r], 0, x), _mm512_permutexvar_epi32(at, s0),
                          products(*b[r], 1, x), _mm512_permutexvar_epi32(at, s1));
      fetch(r, dot[r]);
    }
    return {fold_rows32(dot), add_scaled(s0, x.sums[0], s1, x.sums[1]), lanes};
  }
  static DUET_INLINE __m512i products(const Block& b, int p, const TokenBlock& x) {
    const __m512i v = load512(b.ql + 64 * p), bits = both_halves(b.qh + 32 * p);
    // Bits 0 and 2 of the halves, then 4 and 6, come to bit 4.
    const __m256i left4 = _mm256_set1_epi16(4), left2 = _mm256_set1_epi16(2);
    const __m512i left = _mm512_inserti64x4(_mm512_castsi256_si512(left4), left2, 1);
    return word_pairs(dot4(or_bits(masked(v, 15), _mm512_sllv_epi16(bits, left), 0x30), x.q[2 * p]),
                      dot4(or_bits(high_nibbles(v), shift_halves(bits, 0, 2), 0x30), x.q[2 * p + 1]),
                      16);
  }
};

// Sums exceed 16 bits. Low and high nibbles of a lane belong to the same group.
template <>
struct RowFormat<BlockIQ4_XS> {
  using Block = BlockIQ4_XS;
  static DUET_INLINE TokenBlock arrange(const BlockAct256& x) {
    TokenBlock t;
    for (int i = 0; i < 2; ++i) {
      const __m512i a = load512(x.qs + 128 * i), b = load512(x.qs + 128 * i + 64);
      t.q[2 * i] = _mm512_shuffle_i32x4(a, b, 0x88);
      t.q[2 * i + 1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
    t.sums[0] = lanes_of(x.bsums32);
    return t;
  }
  template <class Fetch>
  static DUET_INLINE FourRows four(const Block* const* b, const TokenBlock& x, const Fetch& fetch) {
    const __m128i levels = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
    const __m512i table = _mm512_broadcast_i32x4(levels);
    const __m512i head = four_lanes(b[0], b[1], b[2], b[3]), lanes = scale_lanes(b);
    __m512i sum[2][4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) {
#pragma GCC unroll 2
      for (size_t i = 0; i < 2; ++i) {
        const __m512i v = load512(b[r]->qs + 64 * i);
        sum[i][r] = _mm512_dpbusd_epi32(dot4(_mm512_shuffle_epi8(table, masked(v, 15)), x.q[2 * i]),
                                        _mm512_shuffle_epi8(table, high_nibbles(v)), x.q[2 * i + 1]);
      }
      fetch(r, sum[1][r]);
    }
    const __m512i s0 = _mm512_srai_epi32(_mm512_unpacklo_epi16(lanes, lanes), 16);
    const __m512i s1 = _mm512_srai_epi32(_mm512_unpackhi_epi16(lanes, lanes), 16);
    return {_mm512_add_epi32(_mm512_mullo_epi32(fold_rows32(sum[0]), transpose4(s0)),
                             _mm512_mullo_epi32(fold_rows32(sum[1]), transpose4(s1))),
            _mm512_madd_epi16(lanes, x.sums[0]), head};
  }
};

template <class Block>
struct KRows {
  static constexpr size_t kTokens = 1, kRows = 4, kBlocks = 4, kGroupsAhead = 2;

  template <size_t T>
  static void decode(const std::byte* const* rows, const std::byte* act, size_t, size_t cols, Ahead ahead,
                     float* y) {
    const auto* x = reinterpret_cast<const BlockAct256*>(act);
    const Block* block[kRows];
    for (size_t r = 0; r < kRows; ++r) block[r] = reinterpret_cast<const Block*>(rows[r]);
    const size_t n_blocks = cols / 256;
    __m128 sum = {};
    size_t b = 0;
    for (; b + kBlocks <= n_blocks; b += kBlocks) {
      sum = add_blocks(block, b, kBlocks, x + b, ahead, sum);
      ahead.next(kRows * kBlocks * sizeof(Block));
    }
    if (b < n_blocks) sum = add_blocks(block, b, n_blocks - b, x + b, ahead, sum);
    __builtin_memcpy(y, &sum, sizeof(sum));
  }

  // Blocks [first, first + n) of each row, n up to kBlocks: more are computed and left out.
  static DUET_INLINE __m128 add_blocks(const Block* const* rows, size_t first, size_t n, const BlockAct256* x,
                                       const Ahead& ahead, __m128 sum) {
    const Block* block[16];
    __m512i dot[4], side[4], head[4];
    __m128 dx = {};
#pragma GCC unroll 4
    for (size_t s = 0; s < 4; ++s) {
      const size_t b = s < n ? s : n - 1;
      const TokenBlock token = RowFormat<Block>::arrange(x[b]);
      dx[s] = x[b].d;
#pragma GCC unroll 4
      for (size_t r = 0; r < 4; ++r) block[4 * s + r] = rows[r] + first + b;
      const auto fetch = [&](size_t r, __m512i& v) {
        ahead.fetch_after<kRows * kBlocks * sizeof(Block), kRows * kBlocks>(4 * s + r, v);
      };
      const FourRows four = RowFormat<Block>::four(block + 4 * s, token, fetch);
      dot[s] = four.dot, side[s] = four.side, head[s] = four.head;
    }
    return add_terms(terms(block, dot, side, head, dx), n, sum);
  }

  // Lane 4 s + i: block s of row i.
  struct Terms {
    __m512 dot, scale, min, min_scale;
  };
  static DUET_INLINE Terms terms(const Block* const* block, const __m512i (&dot)[4], const __m512i (&side)[4],
                                 const __m512i (&head)[4], __m128 x_d) {
    const __m512 dx = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                            _mm512_castps128_ps512(x_d));
    const Factors f = factors(block, head);
    const __m512i m = transpose4(fold_rows32(side));
    __m512i d = fold_lanes(dot);
    if constexpr (kOffsetShift<Block> != 0)
      d = _mm512_sub_epi32(d, _mm512_slli_epi32(m, kOffsetShift<Block>));
    Terms t;
    t.dot = _mm512_cvtepi32_ps(d);
    t.scale = _mm512_mul_ps(f.d, dx);
    if constexpr (kHasMinimum<Block>) {
      t.min = _mm512_cvtepi32_ps(m);
      t.min_scale = _mm512_mul_ps(f.dmin, dx);
    }
    return t;
  }
  // The first n blocks, one after the other.
  template <int s = 0>
  static DUET_INLINE __m128 add_terms(const Terms& t, size_t n, __m128 sum) {
    if (s >= n) return sum;
    sum = _mm_fmadd_ps(_mm512_extractf32x4_ps(t.dot, s), _mm512_extractf32x4_ps(t.scale, s), sum);
    if constexpr (kHasMinimum<Block>)
      sum = _mm_fnmadd_ps(_mm512_extractf32x4_ps(t.min, s), _mm512_extractf32x4_ps(t.min_scale, s), sum);
    if constexpr (s < 3) return add_terms<s + 1>(t, n, sum);
    return sum;
  }

  struct Factors {
    __m512 d, dmin;
  };
  static DUET_INLINE Factors factors(const Block* const* block, const __m512i (&head)[4]) {
    if constexpr (std::is_same_v<Block, BlockQ4_K> || std::is_same_v<Block, BlockQ5_K>) {
      const __m512i at = _mm512_castsi256_si512(
          _mm256_setr_epi16(0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57));
      const __m256i a = _mm512_castsi512_si256(_mm512_permutex2var_epi16(head[0], at, head[1]));
      const __m256i b = _mm512_castsi512_si256(_mm512_permutex2var_epi16(head[2], at, head[3]));
      return {_mm512_cvtph_ps(_mm256_permute2x128_si256(a, b, 0x20)),
              _mm512_cvtph_ps(_mm256_permute2x128_si256(a, b, 0x31))};
    } else {
      Factors f;
      f.d = sixteen_halves([&](size_t i) { return block[i]->d; });
      if constexpr (kHasMinimum<Block>) f.dmin = sixteen_halves([&](size_t i) { return block[i]->dmin; });
      return f;
    }
  }
};

}  // namespace
}  // namespace duet
