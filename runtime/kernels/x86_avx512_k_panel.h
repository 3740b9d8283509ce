// Prefill of the 256-element formats with AVX-512 VNNI: unpacking of panels and the tile over them.
#pragma once

#include <cstddef>
#include <type_traits>

#include "runtime/kernels/x86_avx512_k_scales.h"

namespace duet {
namespace {

// unpack_columns(block, load, store): quants of 16 rows, 16 columns with each store(column, quad), from
// sixteen bytes of the rows at a time, load(offset).
// Bits moved left by `left` (right if negative), then masked.
DUET_INLINE Quad shifted_bits(const Quad& q, int left, int mask) {
  return q.map([&](__m512i v) { return masked(moved_left(v, left), mask); });
}
DUET_INLINE Quad either(const Quad& a, const Quad& b) {
  return a.zip(b, [](__m512i u, __m512i v) { return _mm512_or_si512(u, v); });
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const BlockQ2_K*, Load load, Store store) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const Quad q = load(offsetof(BlockQ2_K, qs) + 16 * i);
    for (int s = 0; s < 4; ++s)
      store(128 * (i / 2) + 32 * static_cast<size_t>(s) + 16 * (i % 2), shifted_bits(q, -2 * s, 3));
  }
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const BlockQ3_K*, Load load, Store store) {
  const Quad high[2] = {load(offsetof(BlockQ3_K, hmask)), load(offsetof(BlockQ3_K, hmask) + 16)};
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const Quad q = load(offsetof(BlockQ3_K, qs) + 16 * i);
    for (int s = 0; s < 4; ++s) {
      const int bit = 4 * static_cast<int>(i / 2) + s;
      store(128 * (i / 2) + 32 * static_cast<size_t>(s) + 16 * (i % 2),
            either(shifted_bits(q, -2 * s, 3), shifted_bits(high[i % 2], 2 - bit, 4)));
    }
  }
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const BlockQ4_K*, Load load, Store store) {
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const Quad q = load(offsetof(BlockQ4_K, qs) + 16 * i);
    const size_t column = 64 * (i / 2) + 16 * (i % 2);
    store(column, shifted_bits(q, 0, 15));
    store(column + 32, shifted_bits(q, -4, 15));
  }
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const BlockQ5_K*, Load load, Store store) {
  const Quad high[2] = {load(offsetof(BlockQ5_K, qh)), load(offsetof(BlockQ5_K, qh) + 16)};
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const Quad q = load(offsetof(BlockQ5_K, qs) + 16 * i);
    const size_t column = 64 * (i / 2) + 16 * (i % 2);
    const int bit = 2 * static_cast<int>(i / 2);
    store(column, either(shifted_bits(q, 0, 15), shifted_bits(high[i % 2], 4 - bit, 16)));
    store(column + 32, either(shifted_bits(q, -4, 15), shifted_bits(high[i % 2], 3 - bit, 16)));
  }
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const BlockQ6_K*, Load load, Store store) {
#pragma GCC unroll 2
  for (size_t part = 0; part < 2; ++part) {
    const size_t at = offsetof(BlockQ6_K, qh) + 32 * part;
    const Quad high[2] = {load(at), load(at + 16)};
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {  // 16 of the 64 columns of a nibble
      const Quad q = load(offsetof(BlockQ6_K, ql) + 64 * part + 16 * j);
      const int bit = 2 * static_cast<int>(j / 2);
      store(128 * part + 16 * j, either(shifted_bits(q, 0, 15), shifted_bits(high[j % 2], 4 - bit, 0x30)));
      store(128 * part + 64 + 16 * j, either(shifted_bits(q, -4, 15), shifted_bits(high[j % 2], -bit, 0x30)));
    }
  }
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const BlockIQ4_XS*, Load load, Store store) {
  const __m128i levels = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
  const __m512i table = _mm512_broadcast_i32x4(levels);
  const auto look_up = [&](__m512i v) { return _mm512_shuffle_epi8(table, v); };
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const Quad q = load(offsetof(BlockIQ4_XS, qs) + 16 * i);
    store(32 * i, shifted_bits(q, 0, 15).map(look_up));
    store(32 * i + 16, shifted_bits(q, -4, 15).map(look_up));
  }
}

template <class Load, class Store>
DUET_INLINE void unpack_columns(const WideBlock*, Load load, Store store) {
  const __m512i offset = _mm512_set1_epi8(64);
#pragma GCC unroll 4
  for (size_t i = 0; i < 16; ++i)
    store(16 * i, load(offsetof(WideBlock, q) + 16 * i).map([&](__m512i v) {
      return _mm512_add_epi8(v, offset);
    }));
}

// Bytes 2 i and 2 i + 1 of each word as 16-bit lanes.
DUET_INLINE __m512i byte_pair(__m512i v, int i) {
  const auto first = static_cast<char>(2 * i), second = static_cast<char>(2 * i + 1);
  // In word k of a lane: bytes 4 k + first and 4 k + second, each below a zero (-1).
  const __m128i word = _mm_setr_epi8(first, -1, second, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i at = _mm512_or_si512(_mm512_broadcastd_epi32(word),
                                     every_lane(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  return _mm512_shuffle_epi8(v, at);
}

// Quants of 2 and 3 bits are multiplied by their scales when they are unpacked: the products fit a
// byte (scale * q of Q2_K up to 45; scale * (4 - q) of Q3_K, -128 .. 124, plus 128). Sums of them
// need no scales.
template <class Block>
constexpr bool kScaled = std::is_same_v<Block, BlockQ2_K> || std::is_same_v<Block, BlockQ3_K>;
// The sums come out negated.
template <class Block>
constexpr bool kNegated = std::is_same_v<Block, BlockQ3_K>;

// For vpshufb: a[g] * lower factor + b[g] * upper factor for eight words of factors, for g = first,
// then g = first + 1; a and b: a signed byte for each group in every lane.
DUET_INLINE __m512i pair_products(__m512i a, __m512i b, int first, __m512i factors) {
  const __m512i words = first < 8 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
  const auto word = [&](int g) {
    const int at = 2 * (g % 8);
    const __m512i everywhere = _mm512_set1_epi16(static_cast<int16_t>(at | (at + 1) << 8));
    return _mm512_maddubs_epi16(factors, _mm512_shuffle_epi8(words, everywhere));
  };
  return _mm512_packs_epi16(word(first), word(first + 1));
}
DUET_INLINE __m512i products(const BlockQ2_K*, __m512i lanes, int pair) {
  const __m512i factors = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 0, 0, 0, 0));
  return pair_products(masked(lanes, 15), __m512i{}, 2 * pair, factors);
}
DUET_INLINE __m512i products(const BlockQ3_K*, __m512i lanes, int pair) {
  const __m512i minus = _mm512_sub_epi8(__m512i{}, lanes);
  const __m512i factors = _mm512_broadcast_i32x4(
      _mm_setr_epi16(0x400, 0x401, 0x402, 0x403, 0x404, 0x405, 0x406, 0x407));
  return _mm512_xor_si512(pair_products(minus, lanes, 2 * pair, factors), _mm512_set1_epi8(-128));
}

// kMulld: vpmulld is as cheap as vpdpwssd (AMD; on Intel it costs two), so that all columns of a
// group are multiplied by the scale at once; else 16 at a time, whose sums fit 16 bits (Q4_K).
template <class Block, bool kMulld>
struct KPanel {
  static constexpr bool kNarrow = !kMulld && std::is_same_v<Block, BlockQ4_K>;
  static constexpr int kRun = kNarrow ? 16 : kGroup<Block>;  // columns
  static constexpr size_t kStepBytes = sizeof(BlockAct256), kWeightBytes = sizeof(Block);
  static constexpr int kGroups = 256 / kGroup<Block>, kPairs = kGroups / 2;
  static constexpr bool kBytes = !std::is_same_v<Block, BlockIQ4_XS>;  // scale_lanes of bytes
  static constexpr const Block* kTag = nullptr;

  static void unpack(const PanelRowsAt& rows, size_t step, size_t, Panel& panel) {
    for (size_t half = 0; half < 2; ++half) {
      const std::byte* row[16];
      for (size_t r = 0; r < 16; ++r) row[r] = rows.row[16 * half + r] + step * sizeof(Block);
      const Quad scales = load_scale_lanes(row);
      if constexpr (kScaled<Block>) unpack_scaled(row, scales, half, panel);
      else unpack_columns(
          kTag, [&](size_t offset) { return load_quad(row, offset).transposed(); },
          [&](size_t column, const Quad& q) { store_words(panel, half, column, q); });
      unpack_scales(scales.transposed(), half, panel);
      store_halves(panel.d[0], half, row, offsetof(Block, d));
      if constexpr (kHasMinimum<Block>) store_halves(panel.m[0], half, row, offsetof(Block, dmin));
    }
  }

  // Two groups share a table, so the quants of the second one point to its upper half.
  static DUET_INLINE void unpack_scaled(const std::byte* const* row, const Quad& scales,
                                        size_t half, Panel& panel) {
    Quad tables[8];
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p)
      tables[p] = scales.map([p](__m512i lanes) { return products(kTag, lanes, p); });
    const auto load = [&](size_t offset) { return load_quad(row, offset); };
    unpack_columns(kTag, load, [&](size_t column, const Quad& q) {
      const __m512i upper = _mm512_set1_epi8(static_cast<char>(column % 32 / 2));
      const Quad scaled = q.zip(tables[column / 32], [&](__m512i v, __m512i table) {
        return _mm512_shuffle_epi8(table, _mm512_or_si512(v, upper));
      });
      store_words(panel, half, column, scaled.transposed());
    });
  }

  static DUET_INLINE Quad load_scale_lanes(const std::byte* const* row) {
    Quad lanes;
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      const Block* four[4];
      for (size_t l = 0; l < 4; ++l) four[l] = reinterpret_cast<const Block*>(row[4 * l + i]);
      lanes.v[i] = scale_lanes(four);
    }
    return lanes;
  }

  static DUET_INLINE void unpack_scales(const Quad& words, size_t half, Panel& panel) {
    const auto store = [half](int32_t* to, __m512i value) {
      _mm512_store_si512(to + 16 * half, value);
    };
#pragma GCC unroll 16
    for (int g = 0; g < kGroups && !kScaled<Block>; ++g) store(panel.scale[g], scale_of(words, g));
#pragma GCC unroll 8
    for (int p = 0; p < kPairs && kHasMinimum<Block>; ++p) {
      // Q2_K: the upper nibbles; Q4_K, Q5_K: the upper eight bytes.
      const __m512i v = kGroup<Block> == 16 ? high_nibbles(words.v[p / 2]) : words.v[2 + p / 2];
      store(panel.min[p], byte_pair(v, p % 2));
    }
  }

  // Scale g of the rows.
  static DUET_INLINE __m512i scale_of(const Quad& words, int g) {
    constexpr int kPerWord = kBytes ? 4 : 2, kBits = 32 / kPerWord;
    const __m512i word = words.v[g / kPerWord];
    const auto at = static_cast<unsigned>(kBits * (g % kPerWord));
    constexpr auto kAbove = static_cast<unsigned>(32 - kBits);
    if constexpr (kHasMinimum<Block>)
      return _mm512_and_si512(_mm512_srli_epi32(word, at), _mm512_set1_epi32(255));
    return _mm512_srai_epi32(_mm512_slli_epi32(word, kAbove - at), kAbove);
  }

  template <size_t T>
  static void tile(const Panel& panel, const std::byte* x0, size_t x_stride, size_t, float* sums) {
    const BlockAct256* x[T];
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t)
      x[t] = reinterpret_cast<const BlockAct256*>(x0 + t * x_stride);
    __m512i dot[2][T] = {};
    if constexpr (kScaled<Block>) scaled_dots<T>(panel, x, x_stride, dot);
    else group_dots<T>(panel, x, x_stride, dot);
    add_step<kNegated<Block>, T>(panel.d[0], x, dot, sums);
    if constexpr (kHasMinimum<Block>) {
      __m512i mins[2][T] = {};
      add_pairs<T>(panel.min, x, mins);
      add_step<true, T>(panel.m[0], x, mins, sums);
    }
  }

  // The activations of the next tile, into the L1 cache: tokens are too far apart for the hardware to follow.
  template <size_t T>
  static DUET_INLINE void fetch_next(const BlockAct256* const* x, int column, size_t x_stride) {
    if (column % 64 != 0) return;
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t)
      _mm_prefetch(reinterpret_cast<const char*>(x[t]->qs + column) + T * x_stride, _MM_HINT_T0);
  }

  // part += products of kColumns columns
  template <int kColumns, size_t T>
  static DUET_INLINE void add_columns(const Panel& panel, const BlockAct256* const* x, int column,
                                      size_t x_stride, __m512i (&part)[2][T]) {
    fetch_next<T>(x, column, x_stride);
#pragma GCC unroll 8
    for (int c = column; c < column + kColumns; c += 4) {
      const uint8_t* q = panel.q[c / 4];
      const __m512i q0 = _mm512_load_si512(q), q1 = _mm512_load_si512(q + 64);
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t) {
        const __m512i four = broadcast4(x[t]->qs + c);
        part[0][t] = _mm512_dpbusd_epi32(part[0][t], q0, four);
        part[1][t] = _mm512_dpbusd_epi32(part[1][t], q1, four);
      }
    }
  }

  // Quants that carry their scales.
  template <size_t T>
  static DUET_INLINE void scaled_dots(const Panel& panel, const BlockAct256* const* x, size_t x_stride,
                                      __m512i (&dot)[2][T]) {
    if constexpr (kNegated<Block>) {
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t) dot[0][t] = dot[1][t] = minus_128(*x[t]);
    }
#pragma GCC unroll 1
    for (int column = 0; column < 256; column += 32) add_columns<32, T>(panel, x, column, x_stride, dot);
  }
  // -128 * sum of the activations
  static DUET_INLINE __m512i minus_128(const BlockAct256& x) {
    __m128i v = _mm_madd_epi16(load128(x.bsums32), _mm_set1_epi16(-128));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm512_broadcastd_epi32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
  }

  // What the offset of the quants adds to the sums of each group, negated.
  static DUET_INLINE void minus_offsets(const BlockAct256& x, int32_t* out) {
    constexpr int kShift = kOffsetShift<Block>;
    if constexpr (kGroups == 16) {
      const __m512i sums = _mm512_cvtepi16_epi32(load256(x.bsums));
      _mm512_store_si512(out, _mm512_sub_epi32(__m512i{}, _mm512_slli_epi32(sums, kShift)));
    } else {
      const __m256i sums = _mm256_cvtepi16_epi32(load128(x.bsums32));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                         _mm256_sub_epi32(__m256i{}, _mm256_slli_epi32(sums, kShift)));
    }
  }

  // Sums of a group at a time, times its scale.
  template <size_t T>
  static DUET_INLINE void group_dots(const Panel& panel, const BlockAct256* const* x, size_t x_stride,
                                     __m512i (&dot)[2][T]) {
    alignas(64) int32_t start[T][static_cast<size_t>(kGroups)];
    if constexpr (kOffsetShift<Block> != 0) {
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t) minus_offsets(*x[t], start[t]);
    }
#pragma GCC unroll 1
    for (int column = 0; column < 256; column += kRun) {
      const int g = column / kGroup<Block>;
      __m512i part[2][T] = {};
      if constexpr (kOffsetShift<Block> != 0) {
#pragma GCC unroll 6
        for (size_t t = 0; t < T; ++t) part[0][t] = part[1][t] = broadcast4(&start[t][g]);
      }
      add_columns<kRun, T>(panel, x, column, x_stride, part);
#pragma GCC unroll 2
      for (size_t r = 0; r < 2; ++r) {
        const __m512i scale = _mm512_load_si512(panel.scale[g] + 16 * r);
#pragma GCC unroll 6
        for (size_t t = 0; t < T; ++t)
          dot[r][t] = kNarrow ? _mm512_dpwssd_epi32(dot[r][t], part[r][t], scale)
                              : _mm512_add_epi32(dot[r][t], _mm512_mullo_epi32(part[r][t], scale));
      }
    }
  }

  // dot += pairs of minimums times pairs of sums of activations
  template <size_t T>
  static DUET_INLINE void add_pairs(const int32_t (*pairs)[kPanelRows],
                                    const BlockAct256* const* x, __m512i (&dot)[2][T]) {
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      const __m512i f0 = _mm512_load_si512(pairs[p]), f1 = _mm512_load_si512(pairs[p] + 16);
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t) {
        const int16_t* bsums = kGroup<Block> == 16 ? x[t]->bsums : x[t]->bsums32;
        const __m512i two = broadcast4(bsums + 2 * p);
        dot[0][t] = _mm512_dpwssd_epi32(dot[0][t], f0, two);
        dot[1][t] = _mm512_dpwssd_epi32(dot[1][t], f1, two);
      }
    }
  }

  // One step of the float chains: sums +- (d * d_x) * dot.
  template <bool kSubtract, size_t T>
  static DUET_INLINE void add_step(const float* d, const BlockAct256* const* x,
                                   const __m512i (&dot)[2][T], float* sums) {
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (size_t r = 0; r < 2; ++r) {
        float* sum = sums + t * kPanelRows + 16 * r;
        const __m512 scale = _mm512_mul_ps(_mm512_load_ps(d + 16 * r), _mm512_set1_ps(x[t]->d));
        const __m512 n = _mm512_cvtepi32_ps(dot[r][t]), before = _mm512_load_ps(sum);
        _mm512_store_ps(sum, kSubtract ? _mm512_fnmadd_ps(n, scale, before)
                                       : _mm512_fmadd_ps(n, scale, before));
      }
    }
  }
};

}  // namespace
}  // namespace duet
