// AVX-512 VNNI kernels of the formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL) times
// act32. Quants carry an offset that makes them unsigned, which vpdpbusd wants; the sum of the
// activations takes it out again.
#include <cstddef>

#include "runtime/kernels/x86_avx512_rows.h"

namespace duet {
namespace {

// ---- unpacking -----------------------------------------------------------------------------------
// Values are unsigned: above their own by 1 << kOffsetShift (0: no offset but a minimum m).
// quads(rows, at, q): columns 0 .. 15 and 16 .. 31 of 16 rows, of the block that starts `at` bytes behind
// them, as stored; store(column, quad): transposed.
template <class B, int kShift>
struct Nibbles {
  using Block = B;
  static constexpr int kOffsetShift = kShift;
  static DUET_INLINE void quads(const std::byte* const* rows, size_t at, Quad (&q)[2]) {
    const Quad both = load_quad(rows, at + offsetof(Block, qs));
    q[0] = both.map([](__m512i v) { return masked(v, 15); });
    q[1] = both.map(high_nibbles);
  }
  template <class Store>
  static DUET_INLINE void columns(const std::byte* const* rows, size_t at, Store store) {
    const Quad q = load_quad(rows, at + offsetof(Block, qs)).transposed();
    store(0, q.map([](__m512i v) { return masked(v, 15); }));
    store(16, q.map(high_nibbles));
  }
};

template <class B, int kShift>
struct FiveBits {
  using Block = B;
  static constexpr int kOffsetShift = kShift;
  static DUET_INLINE void quads(const std::byte* const* rows, size_t at, Quad (&q)[2]) {
    Nibbles<B, kShift>::quads(rows, at, q);
    const Quad bits = load_quad(rows, at + offsetof(Block, qh));  // the first four bytes of a lane
    q[0] = q[0].zip(bits, [](__m512i v, __m512i b) { return with_fifth(v, b, 0); });
    q[1] = q[1].zip(bits, [](__m512i v, __m512i b) { return with_fifth(v, b, 2); });
  }
  // Bytes first, first + 1 of a lane, bit by bit.
  static DUET_INLINE __m512i with_fifth(__m512i v, __m512i bits, int first) {
    const __m128i eight = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m128i at = _mm_add_epi8(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                    _mm_set1_epi8(static_cast<char>(first)));
    const __m512i spread = _mm512_shuffle_epi8(bits, _mm512_broadcast_i32x4(at));
    const __mmask64 set = _mm512_test_epi8_mask(spread, _mm512_broadcast_i32x4(eight));
    return _mm512_mask_add_epi8(v, set, v, _mm512_set1_epi8(16));
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
  static DUET_INLINE void quads(const std::byte* const* rows, size_t at, Quad (&q)[2]) {
    load_quads(rows, at + offsetof(Block, qs), q);
    for (Quad& quad : q) quad = quad.map(above);
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
  static DUET_INLINE void quads(const std::byte* const* rows, size_t at, Quad (&q)[2]) {
    Nibbles<Block, 7>::quads(rows, at, q);
    for (Quad& quad : q) quad = quad.map(levels);
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
  static constexpr size_t kTokens = 6, kRows = 16, kGroupsAhead = 1;

  template <size_t T>
  static void decode(const std::byte* const* rows, const std::byte* act, size_t x_stride, size_t cols, Ahead ahead,
                     float* y) {
    __m512 sum[T] = {};
    for (size_t b = 0; b < cols / 32; ++b) {
      add_quads<T>(rows, b * sizeof(Block), act + b * sizeof(BlockAct32), x_stride, sum);
      ahead.fetch_all(kRows * sizeof(Block));
      ahead.next(kRows * sizeof(Block));
    }
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) _mm512_store_ps(y + t * kRows, sum[t]);
  }

  template <size_t T>
  static DUET_INLINE void add_quads(const std::byte* const* rows, size_t at, const std::byte* act, size_t x_stride,
                                    __m512 (&sum)[T]) {
    const auto half_of = [&](size_t field) {
      return sixteen_halves([&](size_t r) {
        uint16_t bits;
        __builtin_memcpy(&bits, rows[r] + at + field, 2);
        return bits;
      });
    };
    const __m512 d = half_of(offsetof(Block, d));
    __m512 m = {};
    if constexpr (kHasMinimum) m = half_of(offsetof(Block, m));
    Quad q[2];
    F::quads(rows, at, q);
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      const auto& x = *reinterpret_cast<const BlockAct32*>(act + t * x_stride);
      const __m512i low = lanes_of(x.qs), high = lanes_of(x.qs + 16);
      __m512i dot[4];
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) dot[i] = _mm512_dpbusd_epi32(dot4(q[0].v[i], low), q[1].v[i], high);
      const __m512i n = _mm512_add_epi32(fold_rows32(dot), offset(_mm512_set1_epi32(x.sum)));
      sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(n), _mm512_mul_ps(d, _mm512_set1_ps(x.d)), sum[t]);
      if constexpr (kHasMinimum)
        sum[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(x.d * static_cast<float>(x.sum)), sum[t]);
    }
  }
};

}  // namespace

void add_avx512_block32(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q4_0)] = matmul512<Panel32<Q4_0>, Panel32<Q4_0>>;
  table.matmul[static_cast<size_t>(DType::Q4_1)] = matmul512<Panel32<Q4_1>, Panel32<Q4_1>>;
  table.matmul[static_cast<size_t>(DType::Q5_0)] = matmul512<Panel32<Q5_0>, Panel32<Q5_0>>;
  table.matmul[static_cast<size_t>(DType::Q5_1)] = matmul512<Panel32<Q5_1>, Panel32<Q5_1>>;
  table.matmul[static_cast<size_t>(DType::Q8_0)] = matmul512<Panel32<Q8_0>, Panel32<Q8_0>>;
  table.matmul[static_cast<size_t>(DType::IQ4_NL)] = matmul512<Panel32<IQ4_NL>, Panel32<IQ4_NL>>;
}

}  // namespace duet
