// AVX-512 VNNI kernels of the formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL) times
// act32. Quants carry an offset that makes them unsigned, which vpdpbusd wants; the sum of the
// activations takes it out again.
#include <cstddef>

#include "runtime/kernels/x86_avx512_rows.h"

namespace duet {
namespace {

// ---- unpacking -----------------------------------------------------------------------------------
// Prefill takes two blocks in their order; decode takes four, the first 16 values of each in one
// register, the last 16 in another, which are added up in place. Values are unsigned: above their
// own by 1 << kOffsetShift (0: no offset but a minimum m).
struct Halves {
  __m512i first, last;
};

template <class Block>
DUET_INLINE Halves nibble_halves(const Block* const* b) {
  const __m512i v = four_lanes(b[0]->qs, b[1]->qs, b[2]->qs, b[3]->qs);
  return {masked(v, 15), high_nibbles(v)};
}

DUET_INLINE uint32_t word_at(const uint8_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
DUET_INLINE __m512i add_16(__m512i q, uint64_t where) {
  return _mm512_mask_add_epi8(q, where, q, _mm512_set1_epi8(16));
}
template <class Block>
DUET_INLINE Halves fifth_halves(Halves q, const Block* const* b) {
  const uint64_t w01 = word_at(b[0]->qh) | static_cast<uint64_t>(word_at(b[1]->qh)) << 32;
  const uint64_t w23 = word_at(b[2]->qh) | static_cast<uint64_t>(word_at(b[3]->qh)) << 32;
  const auto pack = [](uint64_t v) { return (v & 0xffff) | (v >> 16 & 0xffff0000); };
  return {add_16(q.first, pack(w01) | pack(w23) << 32),
          add_16(q.last, pack(w01 >> 16) | pack(w23 >> 16) << 32)};
}

// store(column, quad): 16 columns of 16 rows, of the block that starts `at` bytes behind them.
template <class B, int kShift>
struct Nibbles {
  using Block = B;
  static constexpr int kOffsetShift = kShift;
  static DUET_INLINE Halves halves(const Block* const* b) { return nibble_halves(b); }
  template <class Store>
  static DUET_INLINE void columns(const std::byte* const* rows, size_t at, Store store) {
    const Quad q = load_quad(rows, at + offsetof(Block, qs));
    store(0, q.map([](__m512i v) { return masked(v, 15); }).transposed());
    store(16, q.map(high_nibbles).transposed());
  }
};

template <class B, int kShift>
struct FiveBits {
  using Block = B;
  static constexpr int kOffsetShift = kShift;
  static DUET_INLINE Halves halves(const Block* const* b) {
    return fifth_halves(nibble_halves(b), b);
  }
  template <class Store>
  static DUET_INLINE void columns(const std::byte* const* rows, size_t at, Store store) {
    const __m512i bits = load_quad(rows, at + offsetof(Block, qh)).transposed().v[0];
    Nibbles<B, kShift>::columns(rows, at, [&](size_t column, Quad words) {
      for (size_t j = 0; j < 4; ++j) {
        const __m512i four = _mm512_srli_epi32(bits, static_cast<unsigned>(column + 4 * j));
        words.v[j] = _mm512_or_si512(words.v[j], fifth_bytes(four));
      }
      store(column, words);
    });
  }
  // The lower four bits of each word as bytes of 0 or 16.
  static DUET_INLINE __m512i fifth_bytes(__m512i bits) {
    const __m512i table = _mm512_setr_epi32(
        0, 0x10, 0x1000, 0x1010, 0x100000, 0x100010, 0x101000, 0x101010, 0x10000000, 0x10000010,
        0x10001000, 0x10001010, 0x10100000, 0x10100010, 0x10101000, 0x10101010);
    return _mm512_permutexvar_epi32(bits, table);  // uses four bits of the index
  }
};
using Q4_0 = Nibbles<BlockQ4_0, 3>;
using Q4_1 = Nibbles<BlockQ4_1, 0>;
using Q5_0 = FiveBits<BlockQ5_0, 4>;
using Q5_1 = FiveBits<BlockQ5_1, 0>;

struct Q8_0 {
  using Block = BlockQ8_0;
  static constexpr int kOffsetShift = 7;
  static DUET_INLINE __m512i above(__m512i v) {
    return _mm512_xor_si512(v, _mm512_set1_epi8(-128));
  }
  static DUET_INLINE Halves halves(const Block* const* b) {
    return {above(four_lanes(b[0]->qs, b[1]->qs, b[2]->qs, b[3]->qs)),
            above(four_lanes(b[0]->qs + 16, b[1]->qs + 16, b[2]->qs + 16, b[3]->qs + 16))};
  }
  template <class Store>
  static DUET_INLINE void columns(const std::byte* const* rows, size_t at, Store store) {
    for (size_t column = 0; column < 32; column += 16) {
      const Quad q = load_quad(rows, at + offsetof(Block, qs) + column);
      store(column, q.map(above).transposed());
    }
  }
};

struct IQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr int kOffsetShift = 7;
  static DUET_INLINE __m512i levels(__m512i q) {
    const __m128i table = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), q);
  }
  static DUET_INLINE Halves halves(const Block* const* b) {
    const Halves q = nibble_halves(b);
    return {levels(q.first), levels(q.last)};
  }
  template <class Store>
  static DUET_INLINE void columns(const std::byte* const* rows, size_t at, Store store) {
    Nibbles<Block, 7>::columns(
        rows, at, [&](size_t column, const Quad& words) { store(column, words.map(levels)); });
  }
};

template <class F>
struct Panel32 {
  using Block = typename F::Block;
  static constexpr bool kHasMinimum = F::kOffsetShift == 0;
  static constexpr size_t kStepBytes = 8 * sizeof(BlockAct32), kWeightBytes = 8 * sizeof(Block);

  // ---- prefill -----------------------------------------------------------------------------------
  static void unpack(const PanelRowsAt& rows, size_t step, size_t n_cols, Panel& panel) {
    const size_t n_blocks = n_cols / 32;
    for (size_t half = 0; half < 2; ++half) {
      const std::byte* row[16];
      for (size_t r = 0; r < 16; ++r) row[r] = rows.row[16 * half + r] + step * 8 * sizeof(Block);
      for (size_t b = 0; b < n_blocks; ++b) {
        const size_t at = b * sizeof(Block);
        F::columns(row, at, [&](size_t column, const Quad& words) {
          store_words(panel, half, 32 * b + column, words);
        });
        store_halves(panel.d[b], half, row, at + offsetof(Block, d));
        if constexpr (kHasMinimum) store_halves(panel.m[b], half, row, at + offsetof(Block, m));
      }
    }
  }

  template <size_t T>
  static void tile(const Panel& panel, const std::byte* x0, size_t x_stride, size_t n_cols,
                   float* sums) {
    __m512 sum[2][T];
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t) {
      sum[0][t] = _mm512_load_ps(sums + t * kPanelRows);
      sum[1][t] = _mm512_load_ps(sums + t * kPanelRows + 16);
    }
#pragma GCC unroll 1
    for (size_t b = 0; b < n_cols / 32; ++b) {
      const BlockAct32* x[T];
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t)
        x[t] = reinterpret_cast<const BlockAct32*>(x0 + t * x_stride) + b;
      add_block<T>(panel, b, x, sum);
    }
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t) {
      _mm512_store_ps(sums + t * kPanelRows, sum[0][t]);
      _mm512_store_ps(sums + t * kPanelRows + 16, sum[1][t]);
    }
  }

  template <size_t T>
  static DUET_INLINE void add_block(const Panel& panel, size_t b, const BlockAct32* const* x,
                                    __m512 (&sum)[2][T]) {
    __m512i dot[2][T];
#pragma GCC unroll 6
    for (size_t t = 0; t < T; ++t) dot[0][t] = dot[1][t] = offset(_mm512_set1_epi32(x[t]->sum));
#pragma GCC unroll 8
    for (size_t c = 0; c < 32; c += 4) {
      const uint8_t* q = panel.q[8 * b + c / 4];
      const __m512i q0 = _mm512_load_si512(q), q1 = _mm512_load_si512(q + 64);
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t) {
        const __m512i four = broadcast4(x[t]->qs + c);
        dot[0][t] = _mm512_dpbusd_epi32(dot[0][t], q0, four);
        dot[1][t] = _mm512_dpbusd_epi32(dot[1][t], q1, four);
      }
    }
#pragma GCC unroll 2
    for (size_t r = 0; r < 2; ++r) {
      const __m512 d = _mm512_load_ps(panel.d[b] + 16 * r);
#pragma GCC unroll 6
      for (size_t t = 0; t < T; ++t) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x[t]->d));
        sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][t]), scale, sum[r][t]);
        if constexpr (kHasMinimum) {
          const __m512 total = _mm512_set1_ps(x[t]->d * static_cast<float>(x[t]->sum));
          sum[r][t] = _mm512_fmadd_ps(_mm512_load_ps(panel.m[b] + 16 * r), total, sum[r][t]);
        }
      }
    }
  }

  // What the offset of the quants adds to a sum of products, negated.
  static DUET_INLINE __m512i offset(__m512i sum) {
    if constexpr (F::kOffsetShift == 0) return __m512i{};
    return _mm512_sub_epi32(__m512i{}, _mm512_slli_epi32(sum, F::kOffsetShift));
  }

  // ---- decode: 16 rows x 16 blocks, so that the sums of a row fill a register -------------------
  // Then lanes are blocks; a transpose makes them rows, and the chains of 16 rows run side by side.
  static constexpr size_t kRows = 16;

  // Sixteen blocks of the token. Register j holds four blocks 4 j + lane; sums come out as
  // [lane][j], place i is block order(i).
  struct Token16 {
    alignas(64) int8_t first[4][64], last[4][64];  // activations 0..15 and 16..31 of four blocks
    alignas(64) int32_t offset[4][16];             // per lane of the dot products
    alignas(64) float d[16], total[16];
  };
  static constexpr size_t order(size_t i) { return 4 * (i % 4) + i / 4; }

  static void decode(const std::byte* const* rows, const std::byte* act, size_t cols,
                     Ahead ahead, float* y) {
    const size_t n_blocks = cols / 32;
    __m512 sum = {};
    for (size_t b = 0; b < n_blocks; b += 16) {
#pragma GCC unroll 1
      for (size_t i = 0; i < 16; ++i) {
        ahead.fetch<16 * sizeof(Block), 1>(0);
        ahead.next(16 * sizeof(Block));
      }
      const auto* x = reinterpret_cast<const BlockAct32*>(act) + b;
      sum = n_blocks - b >= 16 ? add_blocks<true>(rows, b, 16, x, sum)
                               : add_blocks<false>(rows, b, n_blocks - b, x, sum);
    }
    _mm512_store_ps(y, sum);
  }

  static DUET_INLINE void load_token(const BlockAct32* x, size_t n, Token16& token) {
    for (size_t i = 0; i < 16; ++i) {
      const bool there = order(i) < n;
      token.d[i] = there ? x[order(i)].d : 0.0f;
      token.total[i] = there ? token.d[i] * static_cast<float>(x[order(i)].sum) : 0.0f;
    }
    for (size_t b = 0; b < 16; ++b) {
      const __m256i v = b < n ? load256(x[b].qs) : __m256i{};
      const auto at = [b](int8_t (&to)[4][64]) {
        return reinterpret_cast<__m128i*>(to[b / 4] + 16 * (b % 4));
      };
      _mm_store_si128(at(token.first), _mm256_castsi256_si128(v));
      _mm_store_si128(at(token.last), _mm256_extracti128_si256(v, 1));
    }
    const __m512i off = _mm512_set1_epi8(static_cast<char>(1 << F::kOffsetShift));
    for (size_t j = 0; j < 4 && !kHasMinimum; ++j) {
      const __m512i dot = _mm512_dpbusd_epi32(
          _mm512_dpbusd_epi32(__m512i{}, off, _mm512_load_si512(token.first[j])), off,
          _mm512_load_si512(token.last[j]));
      _mm512_store_si512(token.offset[j], _mm512_sub_epi32(__m512i{}, dot));
    }
  }

  // kFull: n is 16. Blocks that are not there count 0.
  template <bool kFull>
  static DUET_INLINE __m512 add_blocks(const std::byte* const* rows, size_t first, size_t n,
                                       const BlockAct32* x, __m512 sum) {
    Token16 token;
    load_token(x, n, token);
    alignas(64) uint16_t d[16][16], m[16][16];
    for (size_t r = 0; r < 16; ++r) {
      const auto* block = reinterpret_cast<const Block*>(rows[r]) + first;
      copy_halves<kFull>(&block->d, n, d[r]);
      if constexpr (kHasMinimum) copy_halves<kFull>(&block->m, n, m[r]);
    }
    __m512i dot[16];
    for (size_t r = 0; r < 16; ++r) {
      const auto* block = reinterpret_cast<const Block*>(rows[r]) + first;
      dot[r] = row_dots<kFull>(block, n, token);
    }
    return add_chains(dot, d, m, token, n, sum);
  }

  // out[i] = the half that stands at p in block order(i)
  template <bool kFull>
  static DUET_INLINE void copy_halves(const uint16_t* p, size_t n, uint16_t* out) {
    constexpr size_t kWords = sizeof(Block) / 2;
    if constexpr (kFull && kWords <= 10) {  // four blocks in 64 bytes: permute instead of copying
      const __m256i blocks = _mm256_setr_epi16(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const __m512i at = _mm512_castsi256_si512(
          _mm256_mullo_epi16(blocks, _mm256_set1_epi16(static_cast<int16_t>(kWords))));
      __m512i v = {};
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) {
        // Not from the very end: the last load must stay inside the block.
        const __m512i four = j < 3 ? load512(p + 4 * j * kWords)
                                   : _mm512_maskz_loadu_epi16((1u << (3 * kWords + 1)) - 1,
                                                              p + 4 * j * kWords);
        v = _mm512_mask_permutexvar_epi16(v, 0x1111u << j, at, four);
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(v));
      return;
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; ++i) out[i] = p[(kFull || order(i) < n ? order(i) : 0) * kWords];
  }

  // The 16 integer sums of a row, place i for block order(i). Beyond the end of the row the
  // activations are 0, any block will do.
  template <bool kFull>
  static DUET_INLINE __m512i row_dots(const Block* block, size_t n, const Token16& token) {
    __m512i v[4];
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const Block* four[4];
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) four[i] = block + (kFull || 4 * j + i < n ? 4 * j + i : 0);
      const Halves q = F::halves(four);
      v[j] = kHasMinimum ? __m512i{} : _mm512_load_si512(token.offset[j]);
      v[j] = _mm512_dpbusd_epi32(v[j], q.first, _mm512_load_si512(token.first[j]));
      v[j] = _mm512_dpbusd_epi32(v[j], q.last, _mm512_load_si512(token.last[j]));
    }
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]),
                                         _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]),
                                          _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  }

  static DUET_INLINE __m512 add_chains(__m512i (&dot)[16], const uint16_t (&d)[16][16],
                                       const uint16_t (&m)[16][16], const Token16& token, size_t n,
                                       __m512 sum) {
    __m512i scale[16], minimum[16];
    const __m512 dx = _mm512_load_ps(token.d);
#pragma GCC unroll 16
    for (size_t r = 0; r < 16; ++r) {
      dot[r] = _mm512_castps_si512(_mm512_cvtepi32_ps(dot[r]));
      scale[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtph_ps(load256(d[r])), dx));
      if constexpr (kHasMinimum) minimum[r] = _mm512_castps_si512(_mm512_cvtph_ps(load256(m[r])));
    }
    transpose16(dot);
    transpose16(scale);
    if constexpr (kHasMinimum) transpose16(minimum);
#pragma GCC unroll 16
    for (size_t b = 0; b < 16; ++b) {
      if (b >= n) break;
      const size_t i = 4 * (b % 4) + b / 4;  // the inverse of order() is itself
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(dot[i]), _mm512_castsi512_ps(scale[i]), sum);
      if constexpr (kHasMinimum) {
        const __m512 t = _mm512_set1_ps(token.total[i]);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(minimum[i]), t, sum);
      }
    }
    return sum;
  }
};

}  // namespace

void add_avx512_block32(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q4_0)] = matmul512<Panel32<Q4_0>>;
  table.matmul[static_cast<size_t>(DType::Q4_1)] = matmul512<Panel32<Q4_1>>;
  table.matmul[static_cast<size_t>(DType::Q5_0)] = matmul512<Panel32<Q5_0>>;
  table.matmul[static_cast<size_t>(DType::Q5_1)] = matmul512<Panel32<Q5_1>>;
  table.matmul[static_cast<size_t>(DType::Q8_0)] = matmul512<Panel32<Q8_0>>;
  table.matmul[static_cast<size_t>(DType::IQ4_NL)] = matmul512<Panel32<IQ4_NL>>;
}

}  // namespace duet
