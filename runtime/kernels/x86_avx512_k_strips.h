// A few tokens times the 256-element formats with AVX-512 VNNI, one times Q2_K and Q3_K: sixteen rows, block
// after block.
//
// Lanes are rows, as in panels: sixteen bytes of 16 rows are transposed, so that a register holds some bits
// of four columns of each, and multiplied at once by the activations of all tokens, broadcast from memory.
// Nothing is stored between: on Zen 4 a store of 64 bytes takes two cycles, in which nothing is multiplied,
// while shuffles, masks and shifts run beside multiplications. So up to 8 tokens pass in the time that
// their multiplications take, and unpacking again for the next 8 costs no more than a panel.
#pragma once

#include <cstddef>
#include <type_traits>

#include "runtime/kernels/x86_avx512_k_panel.h"
#include "runtime/kernels/x86_avx512_k_rows.h"

namespace duet {
namespace {

// Sixteen rows, `stride` bytes apart: an address is one of four registers plus 0 .. 3 strides. (GCC is kept from
// seeing how they depend on each other: it would take 16 registers, more than there are.)
struct Rows16 {
  const std::byte* four[4];
  size_t stride, stride3;

  DUET_INLINE Rows16(const std::byte* first, size_t row_bytes) : stride(row_bytes), stride3(3 * row_bytes) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) four[i] = opaque(first + i * (4 * row_bytes));
    stride3 = opaque(stride3);
  }
  template <class V>
  static DUET_INLINE V opaque(V v) {
    __asm__("" : "+r"(v));
    return v;
  }
  DUET_INLINE const std::byte* operator[](size_t r) const { return four[r / 4] + (r % 4 == 3 ? stride3 : r % 4 * stride); }
  DUET_INLINE void next(size_t n_bytes) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) four[i] = opaque(four[i] + n_bytes);
  }
  // Sixteen bytes of each.
  DUET_INLINE Quad bytes(size_t offset) const {
    const Rows16& row = *this;
    const auto at = [&](size_t i) __attribute__((always_inline)) {
      return four_lanes(row[i] + offset, row[4 + i] + offset, row[8 + i] + offset, row[12 + i] + offset);
    };
    return {{at(0), at(1), at(2), at(3)}};
  }
  DUET_INLINE Quad columns(size_t offset) const { return bytes(offset).transposed(); }
  DUET_INLINE __m512 halves(size_t offset) const {
    return sixteen_halves([&](size_t r) {
      uint16_t bits;
      __builtin_memcpy(&bits, (*this)[r] + offset, 2);
      return bits;
    });
  }
};

// Integer parts of the sums of 16 rows with T tokens.
template <size_t T>
struct StripSums {
  const BlockAct256* x[T];
  __m512i dot[T] = {};

  // Four columns of quants, from `column` on.
  DUET_INLINE void multiply(__m512i (&part)[T], __m512i q, size_t column) const {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) part[t] = _mm512_dpbusd_epi32(part[t], q, broadcast4(x[t]->qs + column));
  }
  // Sums of a group, times its scale.
  DUET_INLINE void add(const __m512i (&part)[T], __m512i scale) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) dot[t] = _mm512_add_epi32(dot[t], _mm512_mullo_epi32(part[t], scale));
  }
  // Sums of two groups that fit 16 bits, those of the second 2^shift times as large, times pairs of scales.
  DUET_INLINE void add_pair(const __m512i (&low)[T], const __m512i (&high)[T], unsigned shift, __m512i scales) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) dot[t] = _mm512_dpwssd_epi32(dot[t], word_pairs(low[t], high[t], 16 - shift), scales);
  }
  DUET_INLINE void divide(unsigned bits) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) dot[t] = _mm512_srai_epi32(dot[t], bits);
  }
};

// Bits of `mask` from a, the others from b.
DUET_INLINE __m512i selected(__m512i a, __m512i b, int mask) {
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(mask)), 0xe4);
}

// What the offset of the quants adds to the sum of a group, negated: where sums begin.
template <size_t T, size_t kGroups>
struct StripStarts {
  alignas(64) int32_t at[T][kGroups];

  // shift: of each group. To be read from memory, which costs nothing: GCC would shuffle them out of a register.
  DUET_INLINE StripStarts(const BlockAct256* const* x, __m512i shift) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      const __m512i sums = _mm512_cvtepi16_epi32(load256(x[t]->bsums));
      _mm512_store_si512(at[t], _mm512_sub_epi32(__m512i{}, _mm512_sllv_epi32(sums, shift)));
    }
    __asm__("" : "+m"(at));
  }
  DUET_INLINE StripStarts(const BlockAct256* const* x, int shift) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      if constexpr (kGroups == 16) {
        const __m512i sums = _mm512_cvtepi16_epi32(load256(x[t]->bsums));
        _mm512_store_si512(at[t], _mm512_sub_epi32(__m512i{}, _mm512_slli_epi32(sums, static_cast<unsigned>(shift))));
      } else {
        const __m256i sums = _mm256_cvtepi16_epi32(load128(x[t]->bsums32));
        _mm256_store_si256(reinterpret_cast<__m256i*>(at[t]), _mm256_sub_epi32(__m256i{}, _mm256_slli_epi32(sums, shift)));
      }
    }
  }
  DUET_INLINE void set(__m512i (&part)[T], size_t group) const {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) part[t] = broadcast4(&at[t][group]);
  }
};

// d * x.d * dot, and for formats with minimums -dmin * x.d * min, added to sums.
template <size_t T>
DUET_INLINE void add_terms(const StripSums<T>& s, __m512 d, __m512 (&sum)[T]) {
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t)
    sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s.dot[t]), _mm512_mul_ps(d, _mm512_set1_ps(s.x[t]->d)), sum[t]);
}
// pair(p): minimums of groups 2 p and 2 p + 1.
template <int kPairs, size_t T, class Pair>
DUET_INLINE void subtract_minimums(const StripSums<T>& s, __m512 dmin, Pair pair, __m512 (&sum)[T]) {
  __m512i min[T] = {};
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p) {
    const __m512i two = pair(p);
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t)
      min[t] = _mm512_dpwssd_epi32(min[t], two, broadcast4((kPairs == 8 ? s.x[t]->bsums : s.x[t]->bsums32) + 2 * p));
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t)
    sum[t] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(min[t]), _mm512_mul_ps(dmin, _mm512_set1_ps(s.x[t]->d)), sum[t]);
}

// ---- by format ----------------------------------------------------------------------------------
// add_block(rows, x, fetch, sum): one block of 16 rows; fetch(i, v): part i of kFetches, once v is there.
constexpr size_t kFetches = 32;
template <class Block>
struct StripFormat;

// Half-precision bits in the lower 16 of each lane.
DUET_INLINE __m512 low_halves_as_floats(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }

// Q4_K, Q5_K: d, dmin and scales are the first 16 bytes.
struct SixBitHead {
  Quad scales;  // words 0, 1: scales, 2, 3: minimums, four bytes each
  __m512 d, dmin;
  explicit DUET_INLINE SixBitHead(const Rows16& rows) {
    const Quad head = rows.bytes(0);
    scales = head.map([](__m512i v) { return six_bit_lanes(v); }).transposed();
    const __m512i both = _mm512_unpacklo_epi64(_mm512_unpacklo_epi32(head.v[0], head.v[1]), _mm512_unpacklo_epi32(head.v[2], head.v[3]));
    d = low_halves_as_floats(both);
    dmin = low_halves_as_floats(_mm512_srli_epi32(both, 16));
  }
  DUET_INLINE __m512i scale(int g) const {
    return _mm512_and_si512(_mm512_srli_epi32(scales.v[g / 4], static_cast<unsigned>(8 * (g % 4))), _mm512_set1_epi32(255));
  }
  DUET_INLINE __m512i scale_pair(int p) const { return byte_pair(scales.v[p / 2], p % 2); }
  template <size_t T>
  DUET_INLINE void finish(const StripSums<T>& s, __m512 (&sum)[T]) const {
    add_terms(s, d, sum);
    subtract_minimums<4>(s, dmin, [&](int p) { return byte_pair(scales.v[2 + p / 2], p % 2); }, sum);
  }
};

template <>
struct StripFormat<BlockQ4_K> {
  template <size_t T, class Fetch>
  static DUET_INLINE void add_block(const Rows16& rows, StripSums<T>& s, Fetch fetch, __m512 (&sum)[T]) {
    const SixBitHead head(rows);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const size_t n = static_cast<size_t>(i), column = 64 * (n / 2) + 16 * (n % 2);
      const Quad w = rows.columns(offsetof(BlockQ4_K, qs) + 16 * n);
      __m512i low[T] = {}, high[T] = {};
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) {
        s.multiply(low, masked(w.v[j], 15), column + 4 * j);
        s.multiply(high, masked(w.v[j], 0xf0), column + 32 + 4 * j);
        fetch(4 * n + j, high[0]);
      }
      s.add_pair(low, high, 4, head.scale_pair(i / 2));
    }
    head.finish(s, sum);
  }
};

template <>
struct StripFormat<BlockQ5_K> {
  template <size_t T, class Fetch>
  static DUET_INLINE void add_block(const Rows16& rows, StripSums<T>& s, Fetch fetch, __m512 (&sum)[T]) {
    const SixBitHead head(rows);
    const Quad bits[2] = {rows.columns(offsetof(BlockQ5_K, qh)), rows.columns(offsetof(BlockQ5_K, qh) + 16)};
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      __m512i low[T] = {}, high[T] = {};
#pragma GCC unroll 2
      for (size_t h = 0; h < 2; ++h) {
        const size_t n = 2 * static_cast<size_t>(p) + h, column = 32 * (n - h) + 16 * h;
        const Quad w = rows.columns(offsetof(BlockQ5_K, qs) + 16 * n);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) {
          s.multiply(low, or_bits(masked(w.v[j], 15), moved_left(bits[h].v[j], 4 - 2 * p), 16), column + 4 * j);
          s.multiply(high, or_bits(high_nibbles(w.v[j]), moved_left(bits[h].v[j], 3 - 2 * p), 16), column + 32 + 4 * j);
          fetch(4 * n + j, high[0]);
        }
      }
      s.add(low, head.scale(2 * p));
      s.add(high, head.scale(2 * p + 1));
    }
    head.finish(s, sum);
  }
};

// Scales of 16 rows, a word of them each.
template <class Block>
DUET_INLINE Quad strip_scales(const Rows16& rows) {
  Quad lanes;
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const Block* four[4];
    for (size_t l = 0; l < 4; ++l) four[l] = reinterpret_cast<const Block*>(rows[4 * l + i]);
    lanes.v[i] = scale_lanes(four);
  }
  return lanes.transposed();
}
// Signed scale g of kBits bits.
template <unsigned kBits>
DUET_INLINE __m512i signed_scale(const Quad& words, int g) {
  constexpr int kPerWord = 32 / static_cast<int>(kBits);
  const auto at = kBits * static_cast<unsigned>(g % kPerWord);
  return _mm512_srai_epi32(_mm512_slli_epi32(words.v[g / kPerWord], 32 - kBits - at), 32 - kBits);
}

template <>
struct StripFormat<BlockQ6_K> {
  template <size_t T, class Fetch>
  static DUET_INLINE void add_block(const Rows16& rows, StripSums<T>& s, Fetch fetch, __m512 (&sum)[T]) {
    const Quad scales = strip_scales<BlockQ6_K>(rows);
    const StripStarts<T, 16> starts(s.x, kOffsetShift<BlockQ6_K>);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const auto half = static_cast<size_t>(part);
      const Quad bits[2] = {rows.columns(offsetof(BlockQ6_K, qh) + 32 * half), rows.columns(offsetof(BlockQ6_K, qh) + 32 * half + 16)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // groups 8 part + i and four after it
        const auto n = static_cast<size_t>(i);
        const Quad w = rows.columns(offsetof(BlockQ6_K, ql) + 64 * half + 16 * n), two = bits[i % 2];
        const int at = 2 * (i / 2);  // of the two bits
        const auto fetch_low = [&](size_t j, __m512i& v) __attribute__((always_inline)) { fetch(16 * half + 4 * n + j, v); };
        const auto fetch_high = [&](size_t j, __m512i& v) __attribute__((always_inline)) { fetch(16 * half + 4 * n + 2 + j, v); };
        add_group(s, starts, 8 * half + n, signed_scale<8>(scales, 8 * part + i), fetch_low, [&](size_t j) {
          return or_bits(masked(w.v[j], 15), moved_left(two.v[j], 4 - at), 0x30);
        });
        add_group(s, starts, 8 * half + 4 + n, signed_scale<8>(scales, 8 * part + 4 + i), fetch_high, [&](size_t j) {
          return or_bits(high_nibbles(w.v[j]), moved_left(two.v[j], -at), 0x30);
        });
      }
    }
    add_terms(s, rows.halves(offsetof(BlockQ6_K, d)), sum);
  }
  // Columns 16 group .. 16 group + 15; fetch(0), fetch(1) meanwhile.
  template <size_t T, class Fetch, class Quants>
  static DUET_INLINE void add_group(StripSums<T>& s, const StripStarts<T, 16>& starts, size_t group, __m512i scale, Fetch fetch, Quants quants) {
    __m512i part[T];
    starts.set(part, group);
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      s.multiply(part, quants(j), 16 * group + 4 * j);
      if (j % 2 == 1) fetch(j / 2, part[0]);
    }
    s.add(part, scale);
  }
};

template <>
struct StripFormat<BlockIQ4_XS> {
  template <size_t T, class Fetch>
  static DUET_INLINE void add_block(const Rows16& rows, StripSums<T>& s, Fetch fetch, __m512 (&sum)[T]) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128)));
    const Quad scales = strip_scales<BlockIQ4_XS>(rows);
    const StripStarts<T, 8> starts(s.x, kOffsetShift<BlockIQ4_XS>);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const auto n = static_cast<size_t>(i);
      const Quad w = rows.columns(offsetof(BlockIQ4_XS, qs) + 16 * n);
      __m512i part[T];
      starts.set(part, n);
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) {
        s.multiply(part, _mm512_shuffle_epi8(table, masked(w.v[j], 15)), 32 * n + 4 * j);
        s.multiply(part, _mm512_shuffle_epi8(table, high_nibbles(w.v[j])), 32 * n + 16 + 4 * j);
        fetch(4 * n + j, part[0]);
      }
      s.add(part, signed_scale<16>(scales, i));
    }
    add_terms(s, rows.halves(offsetof(BlockIQ4_XS, d)), sum);
  }
};

// Q2_K, Q3_K: bits 2 s, 2 s + 1 of sixteen bytes i belong to group 8 (i / 2) + 2 s + i % 2. They stay where they
// are, or nearly so: s = k in the lower and s = k + 2 in the upper nibbles, whose sums are 16 times as large. For
// k = 1 both are four times (Q3_K: twice) as large as for k = 0, whose scales make up for it; the sum is divided.
template <>
struct StripFormat<BlockQ2_K> {
  template <size_t T, class Fetch>
  static DUET_INLINE void add_block(const Rows16& rows, StripSums<T>& s, Fetch fetch, __m512 (&sum)[T]) {
    // Groups in pairs as their sums are.
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    const Quad scales = rows.bytes(0).map([&](__m512i v) { return _mm512_shuffle_epi8(v, order); }).transposed();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto n = static_cast<size_t>(i);
      const Quad w = rows.columns(offsetof(BlockQ2_K, qs) + 16 * n);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const size_t column = 128 * (n / 2) + 16 * (n % 2) + 32 * static_cast<size_t>(k);
        __m512i low[T] = {}, high[T] = {};
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) {
          s.multiply(low, masked(w.v[j], 3 << 2 * k), column + 4 * j);
          s.multiply(high, masked(w.v[j], 0x30 << 2 * k), column + 64 + 4 * j);
          fetch(8 * n + 4 * static_cast<size_t>(k) + j, high[0]);
        }
        const int left = 2 - 2 * k;
        const __m512i pair = moved_left(scales.v[2 * (i / 2) + k], left - 8 * (i % 2));
        s.add_pair(low, high, 4, _mm512_and_si512(pair, _mm512_set1_epi16(static_cast<int16_t>(15 << left))));
      }
    }
    s.divide(2);
    const Quad end = rows.bytes(sizeof(BlockQ2_K) - 16);  // d, dmin are the last word
    const __m512i both = _mm512_unpackhi_epi64(_mm512_unpackhi_epi32(end.v[0], end.v[1]), _mm512_unpackhi_epi32(end.v[2], end.v[3]));
    add_terms(s, low_halves_as_floats(both), sum);
    const auto minimums = [&](int p) {
      const int q = p / 4 * 4 + p % 2 * 2 + p / 2 % 2;
      return byte_pair(high_nibbles(scales.v[q / 2]), q % 2);
    };
    subtract_minimums<8>(s, low_halves_as_floats(_mm512_srli_epi32(both, 16)), minimums, sum);
  }
};

template <>
struct StripFormat<BlockQ3_K> {
  template <size_t T, class Fetch>
  static DUET_INLINE void add_block(const Rows16& rows, StripSums<T>& s, Fetch fetch, __m512 (&sum)[T]) {
    const Quad bits[2] = {rows.columns(offsetof(BlockQ3_K, hmask)), rows.columns(offsetof(BlockQ3_K, hmask) + 16)};
    const Head head(rows);
    const StripStarts<T, 16> starts(s.x, _mm512_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7, 2, 2, 3, 3, 6, 6, 7, 7));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto n = static_cast<size_t>(i);
      const Quad w = rows.columns(offsetof(BlockQ3_K, qs) + 16 * n);
      const Quad third = bits[i % 2].map([&](__m512i v) { return third_bits(v, i / 2); });
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const size_t column = 128 * (n / 2) + 16 * (n % 2) + 32 * static_cast<size_t>(k);
        __m512i low[T], high[T];
        starts.set(low, column / 16);
        starts.set(high, column / 16 + 4);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) {
          const __m512i q = selected(moved_left(w.v[j], -k), third.v[j], 0x33 << k);
          s.multiply(low, masked(q, 7 << k), column + 4 * j);
          s.multiply(high, masked(q, 0x70 << k), column + 64 + 4 * j);
          fetch(8 * n + 4 * static_cast<size_t>(k) + j, high[0]);
        }
        const __m512i pair = head.scales[i / 2][k];
        s.add_pair(low, high, 4, _mm512_srai_epi16(i % 2 == 0 ? _mm512_slli_epi16(pair, 8) : pair, 9 + k));
      }
    }
    s.divide(1);
    add_terms(s, head.d, sum);
  }
  // The bits of s = 0, 1 to 2 and 3, of s = 2, 3 to 6 and 7.
  static DUET_INLINE __m512i third_bits(__m512i v, int half) {
    return selected(moved_left(v, 2 - 4 * half), moved_left(v, 4 - 4 * half), 0x0f);
  }

  struct Head {
    __m512i scales[2][2];  // [g / 8][k]; six bits are the upper ones of a byte
    __m512 d;
    explicit DUET_INLINE Head(const Rows16& rows) {
      const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1));
      const Quad v = rows.bytes(offsetof(BlockQ3_K, scales) - 2).map([&](__m512i u) { return _mm512_shuffle_epi8(u, order); }).transposed();
      d = low_halves_as_floats(v.v[3]);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        // Groups g and g + 1, then g + 4 and g + 5, for which the two upper bits stand two higher.
        const __m512i twice = _mm512_shuffle_epi8(v.v[2], byte_words(k));
        scales[0][k] = with_upper_bits(moved_left(v.v[k], 2), _mm512_sllv_epi16(twice, _mm512_set1_epi32(0x40006)));
        scales[1][k] = with_upper_bits(moved_left(v.v[k], -2), _mm512_sllv_epi16(twice, _mm512_set1_epi32(2)));
      }
    }
    static DUET_INLINE __m512i byte_words(int k) {
      const int twice = 0x01000100 + 0x02020202 * k;
      return every_lane(twice, twice + 0x04040404, twice + 0x08080808, twice + 0x0c0c0c0c);
    }
    // (low & 0x3c | 0x80) ^ (high & 0xc0): turning round the topmost bit takes 32 away.
    static DUET_INLINE __m512i with_upper_bits(__m512i low, __m512i high) {
      const __m512i v = _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(0x3c), _mm512_set1_epi8(-128), 0xea);
      return _mm512_ternarylogic_epi32(v, high, _mm512_set1_epi8(-64), 0x78);
    }
  };
};

// ---- the loop -----------------------------------------------------------------------------------
constexpr size_t kStripRows = 16;
// Tokens of a pass, as far as their sums fit the registers.
template <class Block>
constexpr size_t kPassTokens = 8;
template <>
constexpr size_t kPassTokens<BlockQ3_K> = 6;
template <>
constexpr size_t kPassTokens<BlockQ5_K> = 7;
template <>
constexpr size_t kPassTokens<BlockQ6_K> = 5;
// Tokens from which on strips are faster than KRows, up to which they are faster than panels (Zen 4).
template <class Block>
constexpr size_t kFewestTokens = std::is_same_v<Block, BlockQ2_K> || std::is_same_v<Block, BlockQ3_K> ? 1 : 2;
template <class Block>
constexpr size_t kStripTokens = kPassTokens<Block>;
template <>
constexpr size_t kStripTokens<BlockQ2_K> = 16;
template <>
constexpr size_t kStripTokens<BlockQ4_K> = 16;

// One strip, or one row as if it were sixteen (a.n_rows), with T tokens. Meanwhile one of kPasses equal parts of
// what follows is fetched.
template <class Block, size_t T, size_t kPasses>
void multiply_strip(const MatmulArgs& a, Ahead ahead) {
  constexpr size_t kFetched = kStripRows * sizeof(Block) / kPasses;
  __m512 sum[T] = {};
  StripSums<T> s;
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) s.x[t] = reinterpret_cast<const BlockAct256*>(a.x + t * a.x_stride);
  Rows16 rows(a.w, a.n_rows == 1 ? 0 : a.w_stride);
  for (size_t b = 0; b < a.cols / 256; ++b) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) s.dot[t] = __m512i{};
    StripFormat<Block>::add_block(rows, s, [&](size_t i, __m512i& v) __attribute__((always_inline)) { ahead.fetch_after<kFetched, kFetches>(i, v); }, sum);
    ahead.next(kFetched);
    rows.next(sizeof(Block));
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) ++s.x[t];
  }
  const __mmask16 stored = a.n_rows == 1 ? 1 : 0xffff;
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) _mm512_mask_storeu_ps(a.y + t * a.y_stride, stored, sum[t]);
}

template <class Block, size_t kPasses, size_t T = kPassTokens<Block>>
DUET_INLINE void multiply_tokens(const MatmulArgs& a, size_t n_tokens, const Ahead& ahead) {
  if (n_tokens == T) return multiply_strip<Block, T, kPasses>(a, ahead);
  if constexpr (T > kFewestTokens<Block>) multiply_tokens<Block, kPasses, T - 1>(a, n_tokens, ahead);
}

// Tokens are dealt out evenly to passes; rows that fill no strip come one at a time.
template <class Block>
void matmul_strips(const MatmulArgs& a) noexcept {
  constexpr size_t kMostPasses = (kStripTokens<Block> + kPassTokens<Block> - 1) / kPassTokens<Block>;
  static_assert(kMostPasses <= 2);
  Ahead(a.w).fetch_all(kStripRows * a.w_stride);
  for (size_t row = 0, n_rows; row < a.n_rows; row += n_rows) {
    n_rows = a.n_rows - row < kStripRows ? 1 : kStripRows;
    Ahead ahead(rows_from(a, row + n_rows));
    const auto strip = [&](size_t token) {
      MatmulArgs out = sub_problem(a, row, token);
      out.n_rows = n_rows;
      return out;
    };
    if (a.n_tokens <= kPassTokens<Block>) {
      multiply_tokens<Block, 1>(strip(0), a.n_tokens, ahead);
    } else if constexpr (kMostPasses == 2) {
      const size_t n = a.n_tokens / 2;
      multiply_tokens<Block, 2>(strip(0), n, ahead);
      ahead.next(n_rows * a.w_stride / 2);
      multiply_tokens<Block, 2>(strip(n), a.n_tokens - n, ahead);
    }
  }
}

template <class Block, bool kMulld = true>
void matmul_k(const MatmulArgs& a) noexcept {
  if constexpr (kFewestTokens<Block> > 1)
    if (a.n_tokens == 1) return matmul_rows<KRows<Block>>(a);
  a.n_tokens <= kStripTokens<Block> ? matmul_strips<Block>(a) : matmul_panels<KPanel<Block, kMulld>>(a);
}

}  // namespace
}  // namespace duet
