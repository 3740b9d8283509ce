// AVX-512 VNNI kernels of the formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL) times
// act32. Quants carry an offset that makes them unsigned, which vpdpbusd wants; the sum of the
// activations takes it out again.
#include <cstddef>

#include "runtime/kernels/x86_avx512_rows.h"

namespace duet {
namespace {

// ---- unpacking -----------------------------------------------------------------------------------
// Values are unsigned: above their own by 1 << kOffsetShift (0: no offset but a minimum m).
DUET_INLINE __m256i masked256(__m256i v, int mask) {
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(mask)));
}
// 16 bytes -> their lower nibbles, then their upper ones.
DUET_INLINE __m256i nibbles32(const uint8_t* qs) {
  const __m256i both = _mm256_broadcastsi128_si256(load128(qs));
  return masked256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), 15);
}

// quants(block): its 32 values, the upper half 1 << kUpperShift times as large.
// store(column, quad): 16 columns of 16 rows, of the block that starts `at` bytes behind them.
template <class B, int kShift>
struct Nibbles {
  using Block = B;
  static constexpr int kOffsetShift = kShift;
  static constexpr int kUpperShift = 4;
  static DUET_INLINE __m256i quants(const Block& b) {
    const __m256i mask = _mm256_setr_epi64x(0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f,
                                            static_cast<int64_t>(0xf0f0f0f0f0f0f0f0),
                                            static_cast<int64_t>(0xf0f0f0f0f0f0f0f0));
    return _mm256_and_si256(_mm256_broadcastsi128_si256(load128(b.qs)), mask);
  }
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
  static constexpr int kUpperShift = 0;
  static DUET_INLINE __m256i quants(const Block& b) {
    __mmask32 bits;
    __builtin_memcpy(&bits, b.qh, 4);
    const __m256i q = nibbles32(b.qs);
    return _mm256_mask_add_epi8(q, bits, q, _mm256_set1_epi8(16));
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
  static constexpr int kUpperShift = 0;
  static DUET_INLINE __m256i quants(const Block& b) {
    return _mm256_xor_si256(load256(b.qs), _mm256_set1_epi8(-128));
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
  static constexpr int kUpperShift = 0;
  static DUET_INLINE __m256i quants(const Block& b) {
    const __m128i table = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles32(b.qs));
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

  // ---- decode: a block of 16 rows at a time ------------------------------------------------------
  static constexpr size_t kRows = 16, kGroupsAhead = 1;

  static void decode(const std::byte* const* rows, const std::byte* act, size_t cols, Ahead ahead,
                     float* y) {
    const auto* x = reinterpret_cast<const BlockAct32*>(act);
    __m512 sum = {};
    for (size_t at = 0; at < cols / 32 * sizeof(Block); at += sizeof(Block), ++x) {
      sum = add_rows(rows, at, *x, sum);
      ahead.fetch<kRows * sizeof(Block), 1>(0);
      ahead.next(kRows * sizeof(Block));
    }
    _mm512_store_ps(y, sum);
  }

  static DUET_INLINE __m512 add_rows(const std::byte* const* rows, size_t at, const BlockAct32& x,
                                     __m512 sum) {
    const __m256i v = load256(x.qs);
    __m256i four[4];
    const Block* block[16];
#pragma GCC unroll 4
    for (size_t s = 0; s < 4; ++s) {
      __m256i dot[4];
#pragma GCC unroll 4
      for (size_t r = 0; r < 4; ++r) {
        block[4 * s + r] = reinterpret_cast<const Block*>(rows[4 * s + r] + at);
        dot[r] = _mm256_dpbusd_epi32(__m256i{}, F::quants(*block[4 * s + r]), v);
      }
      four[s] = fold_four(dot);
    }
    const __m512i n = _mm512_add_epi32(
        _mm512_inserti64x4(_mm512_castsi256_si512(fold_eight(four[0], four[1])),
                           fold_eight(four[2], four[3]), 1),
        offset(_mm512_set1_epi32(x.sum)));
    const __m512 d = gather_halves(block, [](const Block* b) { return b->d; });
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(n), _mm512_mul_ps(d, _mm512_set1_ps(x.d)), sum);
    if constexpr (kHasMinimum) {
      const __m512 total = _mm512_set1_ps(x.d * static_cast<float>(x.sum));
      sum = _mm512_fmadd_ps(gather_halves(block, [](const Block* b) { return b->m; }), total, sum);
    }
    return sum;
  }

  // Lane i of both halves: what lanes of the half of v[i] add up to.
  static DUET_INLINE __m256i fold_four(const __m256i (&v)[4]) {
    const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]),
                                       _mm256_unpackhi_epi32(v[0], v[1]));
    const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]),
                                       _mm256_unpackhi_epi32(v[2], v[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  static DUET_INLINE __m256i fold_eight(__m256i a, __m256i b) {
    const __m256i upper = _mm256_permute2x128_si256(a, b, 0x31);
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                            _mm256_srai_epi32(upper, F::kUpperShift));
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
