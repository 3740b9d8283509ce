// The 256-element formats (Q2_K .. Q6_K, IQ4_XS) times act256 in 256-bit registers.
#pragma once

#include <type_traits>

#include "runtime/kernels/x86_avx2_panel.h"
#include "runtime/kernels/x86_k_scales.h"

namespace duet {
namespace {

// ---- unpacking: elements 32 i .. 32 i + 31, unsigned (kOffsetShift) or signed (IQ4_XS) ----------
DUET_INLINE __m256i nibbles_of(const uint8_t* qs, bool high) {
  const __m256i v = load256(qs);
  return _mm256_and_si256(high ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}

// Bits moved left by `left` (right if negative), then masked.
DUET_INLINE __m256i shifted_bits(__m256i v, int left, int mask) {
  const __m256i moved = left >= 0 ? _mm256_slli_epi16(v, left) : _mm256_srli_epi16(v, -left);
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
}

DUET_INLINE __m256i quants(const BlockQ2_K& b, int i) {
  return shifted_bits(load256(b.qs + 32 * (i / 4)), -2 * (i % 4), 3);
}

DUET_INLINE __m256i quants(const BlockQ3_K& b, int i) {
  const __m256i low = shifted_bits(load256(b.qs + 32 * (i / 4)), -2 * (i % 4), 3);
  return _mm256_or_si256(low, shifted_bits(load256(b.hmask), 2 - i, 4));
}

DUET_INLINE __m256i quants(const BlockQ4_K& b, int i) {
  return nibbles_of(b.qs + 32 * (i / 2), i % 2 == 1);
}

DUET_INLINE __m256i quants(const BlockQ5_K& b, int i) {
  return _mm256_or_si256(nibbles_of(b.qs + 32 * (i / 2), i % 2 == 1),
                         shifted_bits(load256(b.qh), 4 - i, 16));
}

DUET_INLINE __m256i quants(const BlockQ6_K& b, int i) {
  const int half = i / 4, j = i % 4;
  const __m256i low = nibbles_of(b.ql + 64 * half + 32 * (j % 2), j >= 2);
  return _mm256_or_si256(low, shifted_bits(load256(b.qh + 32 * half), 4 - 2 * j, 0x30));
}

DUET_INLINE __m256i quants(const BlockIQ4_XS& b, int i) {
  const __m256i levels = _mm256_broadcastsi128_si256(load128(kIq4Levels));
  return _mm256_shuffle_epi8(levels, nibbles32(b.qs + 16 * i));
}

DUET_INLINE __m256i quants(const WideBlock& b, int i) {
  return _mm256_add_epi8(load256(b.q + 32 * i), _mm256_set1_epi8(64));
}

template <class Block>
constexpr bool kSignedQuants = false;
template <>
constexpr bool kSignedQuants<BlockIQ4_XS> = true;

template <class Block>
constexpr bool kQuads = has_quads(kLargest<Block>) && !kSignedQuants<Block>;

// ---- scales -------------------------------------------------------------------------------------
// The first 16 bytes of a Q4_K or Q5_K block (d, dmin, 12 bytes) -> 8 scales, 8 minimums.
DUET_INLINE __m128i scales_and_mins(__m128i head) {
  const __m128i base = _mm_srlv_epi32(_mm_shuffle_epi32(head, 0xed), _mm_setr_epi32(0, 0, 0, 4));
  const __m128i top = _mm_srli_epi16(_mm_shuffle_epi32(head, 0xa5), 2);
  return _mm_or_si128(
      _mm_and_si128(base, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)),
      _mm_and_si128(top, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030)));
}

template <class Block>
constexpr bool kSixBitPairs = false;  // scales and minimums as in scales_and_mins
template <>
constexpr bool kSixBitPairs<BlockQ4_K> = true;
template <>
constexpr bool kSixBitPairs<BlockQ5_K> = true;

// ---- a few tokens -------------------------------------------------------------------------------
// Eight rows, super-block after super-block: their sums reduce together into one lane per row, and
// the chains of floats of eight rows are one chain of vectors. Tokens share the unpacked quants.
struct TokenSums {
  __m256i dot[8];
  __m128i mins[8];
};

// Scales as int16, of which one shuffle makes the factors of 32 elements (for multiply_bytes): the
// even of 16 in the lower half and the odd in the upper, or all of 8 in both halves.
DUET_INLINE __m256i even_odd(__m256i scale) {
  const __m256i split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(scale, split), 0xd8);
}

template <bool kLowHalf>
DUET_INLINE __m256i factor_of(__m256i scales, int i) {
  const int both = 0x01000100 + 0x02020202 * i, low = (both & 0xffff) - 0x7f800000;
  return _mm256_shuffle_epi8(scales, _mm256_set1_epi32(kLowHalf ? low : both));
}

// factors: for factor_of. side: 16-bit factors of the sums of activations: minimums (8 or 16), or what the
// offset of the quants adds.
struct RowScales {
  __m256i factors, side;
};
template <class Block>
DUET_INLINE RowScales row_scales(const Block& b) {
  if constexpr (kSixBitPairs<Block>) {
    const __m128i packed = scales_and_mins(load128(&b));
    return {_mm256_broadcastsi128_si256(_mm_unpacklo_epi8(packed, __m128i{})),
            _mm256_castsi128_si256(_mm_unpackhi_epi8(packed, __m128i{}))};
  } else if constexpr (kGroup<Block> == 32) {
    return {_mm256_broadcastsi128_si256(load_scales8(b)), __m256i{}};
  } else {
    const KScales s = load_scales(b);
    return {even_odd(s.scale), kHasMinimum<Block> ? s.min : _mm256_slli_epi16(s.scale, kOffsetShift<Block>)};
  }
}

// What does not depend on the quants.
template <class Block>
DUET_INLINE __m256i start_sums(const RowScales& s, const BlockAct256& x, __m128i* mins) {
  if constexpr (kSixBitPairs<Block>) {
    *mins = _mm_madd_epi16(_mm256_castsi256_si128(s.side), load128(x.bsums32));
  } else if constexpr (kGroup<Block> == 16) {
    const __m256i all = _mm256_madd_epi16(s.side, load256(x.bsums));
    if constexpr (!kHasMinimum<Block>) return _mm256_sub_epi32(__m256i{}, all);
    *mins = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
  return __m256i{};
}

// Rows r .. r + R - 1 of the sums of T tokens. As many bytes as they take in the file are fetched ahead.
template <size_t kRowBytes, class Block, size_t R, size_t T>
DUET_INLINE void decode_block(const Block* const (&b)[R], const BlockAct256* const (&x)[T], size_t r, Ahead& ahead, TokenSums* sums) {
  __m256i factors[R], dot[R][T];
#pragma GCC unroll 2
  for (size_t j = 0; j < R; ++j) {
    const RowScales scales = row_scales(*b[j]);
    factors[j] = scales.factors;
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) dot[j][t] = start_sums<Block>(scales, *x[t], &sums[t].mins[r + j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
    for (size_t j = 0; j < R; ++j) {
      const __m256i q = quants(*b[j], i), factor = factor_of<kQuads<Block>>(factors[j], i);
#pragma GCC unroll 4
      for (size_t t = 0; t < T; ++t) {
        const __m256i v = load256(x[t]->qs + 32 * i);
        const __m256i parts = kSignedQuants<Block>
                                  ? _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(v, q))
                                  : multiply_bytes<kQuads<Block>>(q, v);
        dot[j][t] = dpwssd(dot[j][t], parts, factor);
      }
    }
    ahead.fetch_after<R * kRowBytes, 8>(static_cast<size_t>(i), dot[0][0]);
  }
  ahead.next(R * kRowBytes);
#pragma GCC unroll 2
  for (size_t j = 0; j < R; ++j)
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) sums[t].dot[r + j] = dot[j][t];
}

// One step of the float chains of a token.
template <class Block>
DUET_INLINE __m256 add_sums(const TokenSums& sums, __m256 d, __m256 dmin, float x_d, __m256 y) {
  const __m256 dx = _mm256_set1_ps(x_d);
  y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum_lanes(sums.dot)), _mm256_mul_ps(d, dx), y);
  if constexpr (kHasMinimum<Block>) {
    __m256i mins[4];
    for (size_t i = 0; i < 4; ++i) mins[i] = _mm256_set_m128i(sums.mins[i + 4], sums.mins[i]);
    y = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(sum_quads(mins)), _mm256_mul_ps(dmin, dx), y);
  }
  return y;
}

DUET_INLINE __m256 eight_floats(const uint16_t* halves) { return _mm256_cvtph_ps(load128(halves)); }
DUET_INLINE __m256 eight_floats(const float* floats) { return _mm256_loadu_ps(floats); }

// Rows that share the loads of one token's activations: where scales leave registers for it.
template <class Block, size_t T>
constexpr size_t kRowsAtOnce = T == 1 && kGroup<Block> == 32 ? 2 : 1;

// The first eight rows times T tokens. Panel::form: a block as it is multiplied.
template <class Panel, size_t T>
void decode_rows(const MatmulArgs& a) noexcept {
  using Block = typename Panel::Block;
  using Form = typename Panel::Form;
  constexpr size_t R = kRowsAtOnce<Form, T>;
  const RowsOf8 rows(a);
  Ahead ahead(rows_from(a, 8));
  __m256 y[T] = {};
  for (size_t b = 0; b < a.cols / 256; ++b) {
    const BlockAct256* x[T];
    for (size_t t = 0; t < T; ++t) x[t] = reinterpret_cast<const BlockAct256*>(a.x + t * a.x_stride) + b;
    TokenSums sums[T];
    alignas(32) decltype(Form::d) d[8], dmin[8] = {};
#pragma GCC unroll 1
    for (size_t r = 0; r < 8; r += R) {
      Form unpacked[R];
      const Form* block[R];
#pragma GCC unroll 2
      for (size_t j = 0; j < R; ++j) {
        block[j] = &Panel::form(reinterpret_cast<const Block*>(rows.at[r + j])[b], unpacked[j]);
        d[r + j] = block[j]->d;
        if constexpr (kHasMinimum<Form>) dmin[r + j] = block[j]->dmin;
      }
      decode_block<sizeof(Block)>(block, x, r, ahead, sums);
    }
    const __m256 scale = eight_floats(d), min_scale = eight_floats(dmin);
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) y[t] = add_sums<Form>(sums[t], scale, min_scale, x[t]->d, y[t]);
  }
  for (size_t t = 0; t < T; ++t) rows.store(y[t], t);
}

// ---- several tokens -----------------------------------------------------------------------------
// The lower or upper int16 of every dword as a factor for multiply_bytes.
template <bool kLowHalf>
DUET_INLINE __m256i factor_low(__m256i v) {
  return _mm256_blend_epi16(kLowHalf ? __m256i{} : _mm256_slli_epi32(v, 16), v, 0x55);
}
template <bool kLowHalf>
DUET_INLINE __m256i factor_high(__m256i v) {
  return _mm256_blend_epi16(_mm256_srli_epi32(v, 16), kLowHalf ? __m256i{} : v, 0xaa);
}

// 32 rows x one super-block, unpacked.
template <class Weights>
struct KPanel {
  using Block = Weights;
  using Form = Weights;
  using Act = BlockAct256;
  static constexpr size_t kBlockCols = 256, kActCols = 256;
  static constexpr bool kWide = kSignedQuants<Block>;  // int16 scale * level instead of bytes
  static constexpr size_t kGroups = 256 / kGroup<Block>;
  // Factors of the sums of activations: minimums, or what the offset of the quants adds, negated.
  static constexpr size_t kPairs = kSixBitPairs<Block> ? 4 : 8;
  static constexpr bool kHasPairs = kHasMinimum<Block> || kOffsetShift<Block> != 0;

  alignas(64) uint8_t q[256 * kPanelRows * (kWide ? 2 : 1)];  // [dword of the row][32 rows][4]
  __m256i scale[kGroups][kVectors];                           // factors for multiply_bytes
  __m256i pair[kPairs][kVectors];  // factors of groups 2 i, 2 i + 1 (of 16, or 32) per row
  __m256 d[kVectors], dmin[kVectors];

  static DUET_INLINE const Form& form(const Block& stored, Form&) { return stored; }

  void unpack(const Block* const rows[8], size_t v, size_t) {
    if constexpr (kWide) {
      unpack_products(rows, v);
    } else {
      unpack_quants(rows, v);
      unpack_scales(rows, v);
    }
    alignas(32) decltype(Block::d) of_row[8], min_of_row[8] = {};
    for (size_t j = 0; j < 8; ++j) {
      of_row[j] = rows[j]->d;
      if constexpr (kHasMinimum<Block>) min_of_row[j] = rows[j]->dmin;
    }
    d[v] = eight_floats(of_row);
    dmin[v] = eight_floats(min_of_row);
  }

  template <size_t R, size_t T>
  void tile(size_t v, const BlockAct256* const* x, const WideAct* x16, size_t, float* acc) const {
    TileSums<R, T> sum = {};
    if constexpr (kOffsetShift<Block> != 0) add_pairs<R, T>(v, x, sum);
    if constexpr (kWide)
      add_wide<R, T>(q + 32 * v, x16, 0, 128, sum);
    else
      add_dots<R, T>(v, x, sum);
    add_to_chain<false, R, T>(d + v, x, sum, acc);
    if constexpr (kHasMinimum<Block>) {
      TileSums<R, T> mins = {};
      add_pairs<R, T>(v, x, mins);
      add_to_chain<true, R, T>(dmin + v, x, mins, acc);
    }
  }

 private:
  DUET_INLINE void store_dwords(__m256i t[8], size_t first, size_t v) {
    transpose8(t);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) store256(q + ((first + i) * kPanelRows + 8 * v) * 4, t[i]);
  }

  DUET_INLINE void unpack_quants(const Block* const rows[8], size_t v) {
    __m256i t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 8
      for (size_t j = 0; j < 8; ++j) t[j] = quants(*rows[j], i);
      store_dwords(t, 8 * static_cast<size_t>(i), v);
    }
  }

  // scale * level is at most 32 * 127.
  DUET_INLINE void unpack_products(const Block* const rows[8], size_t v) {
    alignas(32) int32_t factor[8][8];
    for (size_t j = 0; j < 8; ++j) store256(factor[j], load_scales(*rows[j]).scale);
    for (int i = 0; i < 8; ++i) {
      __m256i low[8], high[8];
#pragma GCC unroll 8
      for (size_t j = 0; j < 8; ++j) {
        const __m256i level = quants(*rows[j], i), by = splat32(factor[j] + i);
        low[j] = _mm256_mullo_epi16(by, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(level)));
        high[j] = _mm256_mullo_epi16(by, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(level, 1)));
      }
      store_dwords(low, 16 * static_cast<size_t>(i), v);
      store_dwords(high, 16 * static_cast<size_t>(i) + 8, v);
    }
  }

  DUET_INLINE void unpack_scales(const Block* const rows[8], size_t v) {
    __m256i t[8], min[8];
    for (size_t j = 0; j < 8; ++j) {
      if constexpr (kSixBitPairs<Block>) {
        t[j] = _mm256_cvtepu8_epi16(scales_and_mins(load128(rows[j])));
      } else {
        const KScales s = load_scales(*rows[j]);
        t[j] = s.scale;
        min[j] = s.min;
      }
    }
    transpose8(t);
    for (size_t i = 0; i < kGroups / 2; ++i) {
      scale[2 * i][v] = factor_low<kQuads<Block>>(t[i]);
      scale[2 * i + 1][v] = factor_high<kQuads<Block>>(t[i]);
    }
    if constexpr (kHasMinimum<Block> && !kSixBitPairs<Block>) transpose8(min);
    for (size_t i = 0; i < kPairs; ++i) {
      if constexpr (kSixBitPairs<Block>)
        pair[i][v] = t[4 + i];
      else if constexpr (kHasMinimum<Block>)
        pair[i][v] = min[i];
      else
        pair[i][v] = _mm256_sub_epi16(__m256i{}, _mm256_slli_epi16(t[i], kOffsetShift<Block>));
    }
  }

  template <size_t R, size_t T>
  DUET_INLINE void add_dots(size_t v, const BlockAct256* const* x, TileSums<R, T>& sum) const {
    constexpr int kFit = steps_in_16_bits(kLargest<Block>);
    constexpr int kSteps = kFit < static_cast<int>(kGroup<Block> / 4) ? kFit : kGroup<Block> / 4;
    for (size_t g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (size_t c = 0; c < kGroup<Block>; c += 4 * kSteps) {
        const size_t column = g * kGroup<Block> + c;
        const int8_t* at[T];
#pragma GCC unroll 4
        for (size_t t = 0; t < T; ++t) at[t] = x[t]->qs + column;
        TileSums<R, T> parts;
        multiply_columns<kQuads<Block>, kSteps, R, T>(q + 32 * (column + v), at, parts);
#pragma GCC unroll 4
        for (size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (size_t t = 0; t < T; ++t)
            sum[r][t] = in_order(dpwssd(sum[r][t], parts[r][t], scale[g][v + r]));
        }
      }
    }
  }

  template <size_t R, size_t T>
  DUET_INLINE void add_pairs(size_t v, const BlockAct256* const* x, TileSums<R, T>& sum) const {
#pragma GCC unroll 8
    for (size_t i = 0; i < kPairs; ++i) {
#pragma GCC unroll 4
      for (size_t t = 0; t < T; ++t) {
        const __m256i s = splat32((kSixBitPairs<Block> ? x[t]->bsums32 : x[t]->bsums) + 2 * i);
#pragma GCC unroll 4
        for (size_t r = 0; r < R; ++r)
          sum[r][t] = in_order(dpwssd(sum[r][t], pair[i][v + r], s));
      }
    }
  }

  template <bool kSubtract, size_t R, size_t T>
  static DUET_INLINE void add_to_chain(const __m256* w_d, const BlockAct256* const* x,
                                       const TileSums<R, T>& sum, float* acc) {
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r) {
        float* at = acc + t * kPanelRows + 8 * r;
        const __m256 scale_d = _mm256_mul_ps(w_d[r], _mm256_broadcast_ss(&x[t]->d));
        const __m256 n = _mm256_cvtepi32_ps(sum[r][t]), y = _mm256_load_ps(at);
        _mm256_store_ps(at, kSubtract ? _mm256_fnmadd_ps(n, scale_d, y)
                                      : _mm256_fmadd_ps(n, scale_d, y));
      }
    }
  }
};

template <class Panel>
void matmul_k(const MatmulArgs& a) noexcept {
  // From 4 tokens on unpacking a panel pays.
  switch (a.n_tokens) {
    case 1: return for_eight_rows(a, decode_rows<Panel, 1>);
    case 2: return for_eight_rows(a, decode_rows<Panel, 2>);
    case 3: return for_eight_rows(a, decode_rows<Panel, 3>);
    default: return matmul_panels<Panel>(a);
  }
}

void set_k_256(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul_k<KPanel<BlockQ2_K>>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul_k<KPanel<BlockQ3_K>>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] = matmul_k<KPanel<BlockQ4_K>>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul_k<KPanel<BlockQ5_K>>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul_k<KPanel<BlockQ6_K>>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul_k<KPanel<BlockIQ4_XS>>;
}

}  // namespace
}  // namespace duet
