// Prefill of the 256-element formats with AVX-512 VNNI: unpacking of panels and the tile over them.
#pragma once

#include <cstddef>
#include <type_traits>

#include "runtime/kernels/x86_avx512_k_scales.h"

namespace duet {
namespace {

// unpack_columns(block, rows, store): quants of 16 rows, 16 columns with each store(column, quad).
// Bits moved left by `left` (right if negative), then masked.
DUET_INLINE Quad shifted_bits(const Quad& q, int left, int mask) {
  return q.map([&](__m512i v) {
    return masked(left >= 0 ? _mm512_slli_epi16(v, left) : _mm512_srli_epi16(v, -left), mask);
  });
}
DUET_INLINE Quad either(const Quad& a, const Quad& b) {
  return a.zip(b, [](__m512i u, __m512i v) { return _mm512_or_si512(u, v); });
}

template <class Store>
DUET_INLINE void unpack_columns(const BlockQ2_K*, const std::byte* const* rows, Store store) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const Quad q = load_quad(rows, offsetof(BlockQ2_K, qs) + 16 * i);
    for (int s = 0; s < 4; ++s)
      store(128 * (i / 2) + 32 * static_cast<size_t>(s) + 16 * (i % 2), shifted_bits(q, -2 * s, 3));
  }
}

template <class Store>
DUET_INLINE void unpack_columns(const BlockQ3_K*, const std::byte* const* rows, Store store) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const Quad q = load_quad(rows, offsetof(BlockQ3_K, qs) + 16 * i);
    const Quad high = load_quad(rows, offsetof(BlockQ3_K, hmask) + 16 * (i % 2));
    for (int s = 0; s < 4; ++s) {
      const int bit = 4 * static_cast<int>(i / 2) + s;
      store(128 * (i / 2) + 32 * static_cast<size_t>(s) + 16 * (i % 2),
            either(shifted_bits(q, -2 * s, 3), shifted_bits(high, 2 - bit, 4)));
    }
  }
}

template <class Store>
DUET_INLINE void unpack_columns(const BlockQ4_K*, const std::byte* const* rows, Store store) {
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const Quad q = load_quad(rows, offsetof(BlockQ4_K, qs) + 16 * i);
    const size_t column = 64 * (i / 2) + 16 * (i % 2);
    store(column, shifted_bits(q, 0, 15));
    store(column + 32, shifted_bits(q, -4, 15));
  }
}

template <class Store>
DUET_INLINE void unpack_columns(const BlockQ5_K*, const std::byte* const* rows, Store store) {
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const Quad q = load_quad(rows, offsetof(BlockQ5_K, qs) + 16 * i);
    const Quad high = load_quad(rows, offsetof(BlockQ5_K, qh) + 16 * (i % 2));
    const size_t column = 64 * (i / 2) + 16 * (i % 2);
    const int bit = 2 * static_cast<int>(i / 2);
    store(column, either(shifted_bits(q, 0, 15), shifted_bits(high, 4 - bit, 16)));
    store(column + 32, either(shifted_bits(q, -4, 15), shifted_bits(high, 3 - bit, 16)));
  }
}

template <class Store>
DUET_INLINE void unpack_columns(const BlockQ6_K*, const std::byte* const* rows, Store store) {
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const size_t part = i / 4, j = i % 4;  // 16 of the 64 columns of a nibble
    const Quad q = load_quad(rows, offsetof(BlockQ6_K, ql) + 16 * i);
    const Quad high = load_quad(rows, offsetof(BlockQ6_K, qh) + 32 * part + 16 * (j % 2));
    const int bit = 2 * static_cast<int>(j / 2);
    store(128 * part + 16 * j, either(shifted_bits(q, 0, 15), shifted_bits(high, 4 - bit, 0x30)));
    store(128 * part + 64 + 16 * j,
          either(shifted_bits(q, -4, 15), shifted_bits(high, -bit, 0x30)));
  }
}

template <class Store>
DUET_INLINE void unpack_columns(const BlockIQ4_XS*, const std::byte* const* rows, Store store) {
  const __m128i levels = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
  const __m512i table = _mm512_broadcast_i32x4(levels);
  const auto look_up = [&](__m512i v) { return _mm512_shuffle_epi8(table, v); };
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const Quad q = load_quad(rows, offsetof(BlockIQ4_XS, qs) + 16 * i);
    store(32 * i, shifted_bits(q, 0, 15).map(look_up));
    store(32 * i + 16, shifted_bits(q, -4, 15).map(look_up));
  }
}

// Bytes 2 i and 2 i + 1 of each word as 16-bit lanes.
template <bool kSigned>
DUET_INLINE __m512i byte_pair(__m512i v, int i) {
  const auto first = static_cast<char>(2 * i), second = static_cast<char>(2 * i + 1);
  // In word k of a lane: bytes 4 k + first and 4 k + second, each below or above a zero (-1).
  const __m128i word = kSigned ? _mm_setr_epi8(-1, first, -1, second, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
                               : _mm_setr_epi8(first, -1, second, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i at = _mm512_or_si512(
      _mm512_broadcastd_epi32(word),
      every_lane(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  const __m512i pair = _mm512_shuffle_epi8(v, at);
  return kSigned ? _mm512_srai_epi16(pair, 8) : pair;
}

constexpr bool fits16(int largest, int n) { return largest * 127 * n < 32768; }

template <class Block>
struct KPanel {
  static constexpr size_t kStepBytes = sizeof(BlockAct256), kWeightBytes = sizeof(Block);
  static constexpr bool kWide = !fits16(kLargest<Block>, 16);  // 32-bit multiplication by the scale
  // Columns between multiplications by a scale: as many as share it and fit.
  static constexpr int kRun = kWide ? kGroup<Block> : 16;
  static constexpr int kPairs = 128 / kGroup<Block>;
  static constexpr bool kBytes = !std::is_same_v<Block, BlockIQ4_XS>;  // scale_lanes of bytes

  static void unpack(const PanelRowsAt& rows, size_t step, size_t, Panel& panel) {
    for (size_t half = 0; half < 2; ++half) {
      const std::byte* row[16];
      for (size_t r = 0; r < 16; ++r) row[r] = rows.row[16 * half + r] + step * sizeof(Block);
      unpack_columns(static_cast<const Block*>(nullptr), row,
                     [&](size_t column, const Quad& q) {
                       store_words(panel, half, column, q.transposed());
                     });
      unpack_scales(row, half, panel);
      store_halves(panel.d[0], half, row, offsetof(Block, d));
      if constexpr (kHasMinimum<Block>) store_halves(panel.m[0], half, row, offsetof(Block, dmin));
    }
  }

  static DUET_INLINE void unpack_scales(const std::byte* const* row, size_t half, Panel& panel) {
    Quad lanes;
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      const Block* four[4];
      for (size_t l = 0; l < 4; ++l) four[l] = reinterpret_cast<const Block*>(row[4 * l + i]);
      lanes.v[i] = scale_lanes(four);
    }
    const Quad words = lanes.transposed();
    const auto store = [half](int32_t* to, __m512i value) {
      _mm512_store_si512(to + 16 * half, value);
    };
    constexpr int kScales = 256 / kGroup<Block>;
#pragma GCC unroll 16
    for (int g = 0; g < kScales; ++g) store(panel.scale[g], scale_of(words, g));
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      if constexpr (kOffsetShift<Block> != 0) {
        const __m512i pair = kBytes ? byte_pair<true>(words.v[p / 2], p % 2) : words.v[p];
        const __m512i offset = _mm512_slli_epi16(pair, kOffsetShift<Block>);
        store(panel.offset[p], _mm512_sub_epi16(__m512i{}, offset));
      }
      if constexpr (kHasMinimum<Block>) {
        // Q2_K: the upper nibbles; Q4_K, Q5_K: the upper eight bytes.
        const __m512i v = kGroup<Block> == 16 ? high_nibbles(words.v[p / 2]) : words.v[2 + p / 2];
        store(panel.min[p], byte_pair<false>(v, p % 2));
      }
    }
  }

  // Scale g of the rows: in the lower 16 bits for vpdpwssd, with its sign for vpmulld.
  static DUET_INLINE __m512i scale_of(const Quad& words, int g) {
    constexpr int kPerWord = kBytes ? 4 : 2, kBits = 32 / kPerWord;
    const __m512i word = words.v[g / kPerWord];
    const auto at = static_cast<unsigned>(kBits * (g % kPerWord));
    constexpr auto kAbove = static_cast<unsigned>(32 - kBits);
    if constexpr (std::is_same_v<Block, BlockQ2_K>)
      return _mm512_and_si512(_mm512_srli_epi32(word, at), _mm512_set1_epi32(15));
    if constexpr (kGroup<Block> == 32 && kBytes)
      return _mm512_and_si512(_mm512_srli_epi32(word, at), _mm512_set1_epi32(255));
    const __m512i scale = _mm512_srai_epi32(_mm512_slli_epi32(word, kAbove - at), kAbove);
    return kWide ? scale : _mm512_and_si512(scale, _mm512_set1_epi32(0xffff));
  }

  template <size_t T>
  static void tile(const Panel& panel, const std::byte* x0, size_t x_stride, size_t, float* sums) {
    const BlockAct256* x[T];
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t)
      x[t] = reinterpret_cast<const BlockAct256*>(x0 + t * x_stride);
    __m512i dot[2][T] = {};
#pragma GCC unroll 1
    for (int column = 0; column < 256; column += kRun) {
      __m512i part[2][T] = {};
#pragma GCC unroll 8
      for (int c = 0; c < kRun; c += 4) {
        const uint8_t* q = panel.q[(column + c) / 4];
        const __m512i q0 = _mm512_load_si512(q), q1 = _mm512_load_si512(q + 64);
#pragma GCC unroll 6
        for (size_t t = 0; t < T; ++t) {
          const __m512i four = broadcast4(x[t]->qs + column + c);
          part[0][t] = _mm512_dpbusd_epi32(part[0][t], q0, four);
          part[1][t] = _mm512_dpbusd_epi32(part[1][t], q1, four);
        }
      }
#pragma GCC unroll 2
      for (size_t r = 0; r < 2; ++r) {
        const __m512i scale = _mm512_load_si512(panel.scale[column / kGroup<Block>] + 16 * r);
#pragma GCC unroll 6
        for (size_t t = 0; t < T; ++t) {
          dot[r][t] = kWide ? _mm512_add_epi32(dot[r][t], _mm512_mullo_epi32(part[r][t], scale))
                            : _mm512_dpwssd_epi32(dot[r][t], part[r][t], scale);
        }
      }
    }
    if constexpr (kOffsetShift<Block> != 0) add_pairs<T>(panel.offset, x, dot);
    add_step<false, T>(panel.d[0], x, dot, sums);
    if constexpr (kHasMinimum<Block>) {
      __m512i mins[2][T] = {};
      add_pairs<T>(panel.min, x, mins);
      add_step<true, T>(panel.m[0], x, mins, sums);
    }
  }

  // dot += pairs of factors times pairs of sums of activations
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
