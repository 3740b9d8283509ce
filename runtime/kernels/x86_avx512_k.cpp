// AVX-512 VNNI kernels of the 256-element formats (Q2_K .. Q6_K, IQ4_XS) times act256.
//
// vpdpbusd multiplies unsigned quants by activations and adds four; vpdpwssd multiplies such sums,
// where they fit 16 bits, by the scale of their group and accumulates, else vpmulld does. Quants
// carry an offset that makes them unsigned; the sums of activations take it out again.
#include <cstddef>
#include <type_traits>

#include "runtime/kernels/x86_avx512_k_panel.h"

namespace duet {
namespace {

// 32 bytes in both halves.
DUET_INLINE __m512i both_halves(const uint8_t* p) { return _mm512_broadcast_i64x4(load256(p)); }

// 16-bit lanes of the lower half shifted right by `low`, of the upper half by `high`.
DUET_INLINE __m512i shift_halves(__m512i v, int low, int high) {
  const __m256i l = _mm256_set1_epi16(static_cast<int16_t>(low)),
                h = _mm256_set1_epi16(static_cast<int16_t>(high));
  return _mm512_srlv_epi16(v, _mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1));
}

// Scales of one row as 16-bit lanes, from its 16 bytes.
template <class Block>
DUET_INLINE __m256i row_scales(const std::byte* p) {
  const __m128i v = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (std::is_same_v<Block, BlockIQ4_XS>) return _mm256_castsi128_si256(v);
  if constexpr (std::is_same_v<Block, BlockQ2_K>)
    return _mm256_cvtepu8_epi16(_mm_and_si128(v, _mm_set1_epi8(15)));
  return kGroup<Block> == 32 ? _mm256_cvtepu8_epi16(v) : _mm256_cvtepi8_epi16(v);
}

DUET_INLINE __m512i lanes_of(const int16_t* p) { return _mm512_broadcast_i32x4(load128(p)); }

// Lane r: four sums that add up to sum of scale * (sum of activations) over the groups of row r.
template <class Block>
DUET_INLINE __m512i sums_dot(__m512i lanes, const BlockAct256& x) {
  if constexpr (kGroup<Block> == 32) return _mm512_madd_epi16(lanes, lanes_of(x.bsums32));
  const __m512i low = _mm512_srai_epi16(_mm512_unpacklo_epi8(lanes, lanes), 8);
  const __m512i high = _mm512_srai_epi16(_mm512_unpackhi_epi8(lanes, lanes), 8);
  return _mm512_dpwssd_epi32(_mm512_madd_epi16(low, lanes_of(x.bsums)), high,
                             lanes_of(x.bsums + 8));
}
template <class Block>
DUET_INLINE __m512i mins_dot(__m512i lanes, const BlockAct256& x) {
  if constexpr (kGroup<Block> == 32)
    return _mm512_madd_epi16(_mm512_unpackhi_epi8(lanes, __m512i{}), lanes_of(x.bsums32));
  const __m512i mins = high_nibbles(lanes);
  return _mm512_dpwssd_epi32(
      _mm512_madd_epi16(_mm512_unpacklo_epi8(mins, __m512i{}), lanes_of(x.bsums)),
      _mm512_unpackhi_epi8(mins, __m512i{}), lanes_of(x.bsums + 8));
}

// ---- quants of decode ------------------------------------------------------------------------------
// A block as four registers, in the order that takes the fewest shifts; the token's 256 activations
// are arranged alike, once for all rows. Lane l of register i: group_of<Block>(i, l) of the scales.
constexpr unsigned group_in_two_bits(unsigned i, unsigned lane) {
  return 2 * i + lane % 2 + 8 * (lane / 2);
}
constexpr unsigned group_in_nibbles(unsigned i, unsigned lane) {
  return 4 * (i / 2) + i % 2 + 2 * (lane / 2);
}
template <class Block>
constexpr unsigned group_of(unsigned i, unsigned lane) {
  if (std::is_same_v<Block, BlockQ2_K> || std::is_same_v<Block, BlockQ3_K>)
    return group_in_two_bits(i, lane);
  if (std::is_same_v<Block, BlockQ6_K>) return 4 * i + lane;
  return group_in_nibbles(i, lane);
}

DUET_INLINE void two_bit_registers(const uint8_t* qs, __m512i (&q)[4]) {
  const __m512i v = load512(qs);
  q[0] = masked(v, 3);
  q[1] = masked(_mm512_srli_epi16(v, 2), 3);
  q[2] = masked(_mm512_srli_epi16(v, 4), 3);
  q[3] = masked(_mm512_srli_epi16(v, 6), 3);
}
DUET_INLINE void decode_quants(const BlockQ2_K& b, __m512i (&q)[4]) { two_bit_registers(b.qs, q); }
DUET_INLINE void decode_quants(const BlockQ3_K& b, __m512i (&q)[4]) {
  two_bit_registers(b.qs, q);
  // Bit i of the lower half and 4 + i of the upper half become bit 2 of register i.
  const __m512i bits = shift_halves(both_halves(b.hmask), 0, 4), four = _mm512_set1_epi8(4);
  const auto or_bit = [&](__m512i to, __m512i v) {
    return _mm512_ternarylogic_epi32(to, v, four, 0xf8);  // to | (v & four)
  };
  q[0] = or_bit(q[0], _mm512_slli_epi16(bits, 2));
  q[1] = or_bit(q[1], _mm512_slli_epi16(bits, 1));
  q[2] = or_bit(q[2], bits);
  q[3] = or_bit(q[3], _mm512_srli_epi16(bits, 1));
}

DUET_INLINE void decode_quants(const BlockQ4_K& b, __m512i (&q)[4]) {
  for (int p = 0; p < 2; ++p) {
    const __m512i v = load512(b.qs + 64 * p);
    q[2 * p] = masked(v, 15);
    q[2 * p + 1] = high_nibbles(v);
  }
}
DUET_INLINE void decode_quants(const BlockQ5_K& b, __m512i (&q)[4]) {
  // Register i takes bits i % 2 + 4 (i / 2) and two above it, for its halves.
  const __m512i bits = shift_halves(both_halves(b.qh), 0, 2), high = _mm512_set1_epi8(16);
  const auto or_bit = [&](__m512i to, __m512i v) {
    return _mm512_ternarylogic_epi32(to, v, high, 0xf8);
  };
  for (int p = 0; p < 2; ++p) {
    const __m512i v = load512(b.qs + 64 * p);
    q[2 * p] = or_bit(masked(v, 15), p == 0 ? _mm512_slli_epi16(bits, 4) : bits);
    q[2 * p + 1] = or_bit(high_nibbles(v),
                          p == 0 ? _mm512_slli_epi16(bits, 3) : _mm512_srli_epi16(bits, 1));
  }
}

DUET_INLINE void decode_quants(const BlockQ6_K& b, __m512i (&q)[4]) {
  const __m512i two = _mm512_set1_epi8(0x30);
  for (int p = 0; p < 2; ++p) {
    const __m512i v = load512(b.ql + 64 * p), bits = both_halves(b.qh + 32 * p);
    // Bits 0 and 2 of the halves, then 4 and 6, come to bit 4.
    const __m256i left4 = _mm256_set1_epi16(4), left2 = _mm256_set1_epi16(2);
    const __m512i left = _mm512_inserti64x4(_mm512_castsi256_si512(left4), left2, 1);
    q[2 * p] = _mm512_ternarylogic_epi32(masked(v, 15), _mm512_sllv_epi16(bits, left), two, 0xf8);
    q[2 * p + 1] = _mm512_ternarylogic_epi32(high_nibbles(v),
                                             shift_halves(bits, 0, 2), two, 0xf8);
  }
}

// Low and high nibbles of a lane belong to the same group: registers 2 p and 2 p + 1 share scales.
DUET_INLINE void decode_quants(const BlockIQ4_XS& b, __m512i (&q)[4]) {
  const __m128i levels = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
  const __m512i table = _mm512_broadcast_i32x4(levels);
  for (int p = 0; p < 2; ++p) {
    const __m512i v = load512(b.qs + 64 * p);
    q[2 * p] = _mm512_shuffle_epi8(table, masked(v, 15));
    q[2 * p + 1] = _mm512_shuffle_epi8(table, high_nibbles(v));
  }
}

// The activations in the order of decode_quants.
template <class Block>
DUET_INLINE void arrange(const BlockAct256& x, __m512i (&out)[4]) {
  const __m512i a = load512(x.qs), b = load512(x.qs + 64), c = load512(x.qs + 128),
                d = load512(x.qs + 192);
  const auto low_halves = [](__m512i u, __m512i v) { return _mm512_shuffle_i64x2(u, v, 0x44); };
  const auto high_halves = [](__m512i u, __m512i v) { return _mm512_shuffle_i64x2(u, v, 0xee); };
  if constexpr (std::is_same_v<Block, BlockQ6_K>) {
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
  } else if constexpr (std::is_same_v<Block, BlockIQ4_XS>) {
    out[0] = _mm512_shuffle_i32x4(a, b, 0x88), out[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    out[2] = _mm512_shuffle_i32x4(c, d, 0x88), out[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
  } else if constexpr (kGroup<Block> == 32) {
    out[0] = low_halves(a, b), out[1] = high_halves(a, b);
    out[2] = low_halves(c, d), out[3] = high_halves(c, d);
  } else {
    out[0] = low_halves(a, c), out[1] = high_halves(a, c);
    out[2] = low_halves(b, d), out[3] = high_halves(b, d);
  }
}

// Scales of registers 2 p and 2 p + 1 after their sums of four are packed to 16 bits: each lane
// holds four sums of the one, then four of the other.
struct Spread {
  alignas(64) uint16_t at[2][32];
};
template <class Block>
constexpr Spread make_spread() {
  Spread s{};
  for (unsigned p = 0; p < 2; ++p) {
    for (unsigned k = 0; k < 32; ++k)
      s.at[p][k] = static_cast<uint16_t>(group_of<Block>(2 * p + k % 8 / 4, k / 8));
  }
  return s;
}
template <class Block>
constexpr Spread kSpread = make_spread<Block>();

DUET_INLINE __m512i row_dot_packed(const __m512i (&q)[4], const __m512i (&x)[4], __m256i scales,
                                   const Spread& spread) {
  const auto dot = [&](int i) { return _mm512_dpbusd_epi32(__m512i{}, q[i], x[i]); };
  __m512i sum = {};
  for (int p = 0; p < 2; ++p) {
    const __m512i f = _mm512_permutexvar_epi16(_mm512_load_si512(spread.at[p]),
                                               _mm512_castsi256_si512(scales));
    sum = _mm512_dpwssd_epi32(sum, _mm512_packs_epi32(dot(2 * p), dot(2 * p + 1)), f);
  }
  return sum;
}

template <class Block>
DUET_INLINE __m512i row_dot(const Block& block, __m256i scales, const __m512i (&x)[4]) {
  __m512i q[4];
  decode_quants(block, q);
  return row_dot_packed(q, x, scales, kSpread<Block>);
}

// Sums exceed 16 bits: lane l of pair p times scale 4 p + l in 32 bits.
template <>
DUET_INLINE __m512i row_dot(const BlockIQ4_XS& block, __m256i scales, const __m512i (&x)[4]) {
  __m512i q[4];
  decode_quants(block, q);
  const __m512i wide = _mm512_cvtepi16_epi32(scales);
  const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512i sum[2];
  for (int p = 0; p < 2; ++p) {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(__m512i{}, q[2 * p], x[2 * p]),
                                            q[2 * p + 1], x[2 * p + 1]);
    const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(4 * p));
    sum[p] = _mm512_mullo_epi32(dot, _mm512_permutexvar_epi32(at, wide));
  }
  return _mm512_add_epi32(sum[0], sum[1]);
}

// Decode takes four rows at a time, a 128-bit lane of scales each.
template <class Block>
struct KKernel : KPanel<Block> {
  static constexpr size_t kRows = 4;

  static size_t n_steps(size_t cols) { return cols / 256; }
  static void decode(const std::byte* const* rows, const std::byte* act, size_t cols,
                     NextRows& next, float* y) {
    const size_t n_blocks = cols / 256;
    __m128 sum = {};
    for (size_t b = 0; b < n_blocks; ++b) {
      const Block* block[4];
      for (size_t r = 0; r < 4; ++r) block[r] = reinterpret_cast<const Block*>(rows[r]) + b;
      next.fetch_share();
      const BlockAct256& x = reinterpret_cast<const BlockAct256*>(act)[b];
      sum = add_block(block, x, sum);
    }
    _mm_store_ps(y, sum);
  }

  static DUET_INLINE __m128 add_block(const Block* const* block, const BlockAct256& x, __m128 sum) {
    const __m512i lanes = scale_lanes(block);
    alignas(64) std::byte stored[64];
    _mm512_store_si512(stored, lanes);
    __m512i arranged[4], dot[4];
    arrange<Block>(x, arranged);
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r)
      dot[r] = row_dot(*block[r], row_scales<Block>(stored + 16 * r), arranged);
    __m512i d = rows_to_lanes(dot);
    if constexpr (kOffsetShift<Block> != 0)
      d = _mm512_sub_epi32(d, _mm512_slli_epi32(sums_dot<Block>(lanes, x), kOffsetShift<Block>));
    d = sum_lane(d);
    // Lanes 0, 4, 8, 12 of the sums of the scales, then of the minimums.
    const __m512i pick = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256 scale = _mm256_mul_ps(block_factors(block), _mm256_set1_ps(x.d));
    if constexpr (kHasMinimum<Block>) {
      const __m512i m = sum_lane(mins_dot<Block>(lanes, x));
      const __m256 both = _mm256_cvtepi32_ps(
          _mm512_castsi512_si256(_mm512_permutex2var_epi32(d, pick, m)));
      sum = _mm_fmadd_ps(_mm256_castps256_ps128(both), _mm256_castps256_ps128(scale), sum);
      return _mm_fnmadd_ps(_mm256_extractf128_ps(both, 1), _mm256_extractf128_ps(scale, 1), sum);
    }
    const __m128i one = _mm512_castsi512_si128(_mm512_permutexvar_epi32(pick, d));
    return _mm_fmadd_ps(_mm_cvtepi32_ps(one), _mm256_castps256_ps128(scale), sum);
  }

  // Lane r of the result: four sums of row r.
  static DUET_INLINE __m512i rows_to_lanes(const __m512i (&v)[4]) {
    const auto fold = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
    };
    const __m512i low = fold(v[0], v[1]), high = fold(v[2], v[3]);
    return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88),
                            _mm512_shuffle_i32x4(low, high, 0xdd));
  }
  static DUET_INLINE __m512i sum_lane(__m512i v) {
    v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  }

  // d of the four rows, then their dmin.
  static DUET_INLINE __m256 block_factors(const Block* const* block) {
    alignas(16) uint16_t halves[8] = {};
    for (size_t r = 0; r < 4; ++r) {
      halves[r] = block[r]->d;
      if constexpr (kHasMinimum<Block>) halves[4 + r] = block[r]->dmin;
    }
    return _mm256_cvtph_ps(_mm_setr_epi16(
        static_cast<int16_t>(halves[0]), static_cast<int16_t>(halves[1]),
        static_cast<int16_t>(halves[2]), static_cast<int16_t>(halves[3]),
        static_cast<int16_t>(halves[4]), static_cast<int16_t>(halves[5]),
        static_cast<int16_t>(halves[6]), static_cast<int16_t>(halves[7])));
  }
};

}  // namespace

void add_avx512_k(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul512<KKernel<BlockQ2_K>>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul512<KKernel<BlockQ3_K>>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] = matmul512<KKernel<BlockQ4_K>>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul512<KKernel<BlockQ5_K>>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul512<KKernel<BlockQ6_K>>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul512<KKernel<BlockIQ4_XS>>;
}

}  // namespace duet
