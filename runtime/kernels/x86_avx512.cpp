// AVX-512 VNNI kernels of the formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL) times
// act32. Quants carry an offset that makes them unsigned, which vpdpbusd wants; the sum of the
// activations takes it out again.
#include "runtime/kernels/x86_avx512_panel.h"

namespace duet {
namespace {

// unsigned_quants: 32 values above their own by 1 << kOffsetShift (0: no offset but a minimum m).
struct Q4_0 {
  using Block = BlockQ4_0;
  static constexpr int kOffsetShift = 3;
  static DUET_INLINE __m256i unsigned_quants(const Block& b) { return nibbles(b.qs); }
};
struct Q4_1 {
  using Block = BlockQ4_1;
  static constexpr int kOffsetShift = 0;
  static DUET_INLINE __m256i unsigned_quants(const Block& b) { return nibbles(b.qs); }
};
struct Q5_0 {
  using Block = BlockQ5_0;
  static constexpr int kOffsetShift = 4;
  static DUET_INLINE __m256i unsigned_quants(const Block& b) {
    return _mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh));
  }
};
struct Q5_1 {
  using Block = BlockQ5_1;
  static constexpr int kOffsetShift = 0;
  static DUET_INLINE __m256i unsigned_quants(const Block& b) {
    return _mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh));
  }
};
struct Q8_0 {
  using Block = BlockQ8_0;
  static constexpr int kOffsetShift = 7;
  static DUET_INLINE __m256i unsigned_quants(const Block& b) {
    return _mm256_xor_si256(load256(b.qs), _mm256_set1_epi8(-128));
  }
};
struct IQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr int kOffsetShift = 7;
  static DUET_INLINE __m256i unsigned_quants(const Block& b) {
    const __m128i levels = _mm_xor_si128(load128(kIq4Levels), _mm_set1_epi8(-128));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles(b.qs));
  }
};

template <class F>
struct Panel32 {
  using Block = typename F::Block;
  static constexpr bool kHasMinimum = F::kOffsetShift == 0;
  static constexpr size_t kStepBytes = 8 * sizeof(BlockAct32);

  // ---- prefill -----------------------------------------------------------------------------------
  static void unpack(const PanelRowsAt& rows, size_t step, size_t n_cols, Panel& panel) {
    const size_t n_blocks = n_cols / 32;
    for (size_t half = 0; half < 2; ++half) {
      for (size_t i = 0; i < n_blocks; i += 2) {
        __m512i v[16];
#pragma GCC unroll 16
        for (size_t r = 0; r < 16; ++r) {
          const auto* block =
              reinterpret_cast<const Block*>(rows.row[16 * half + r]) + 8 * step + i;
          v[r] = i + 1 < n_blocks ? pair(block[0], block[1])
                                  : _mm512_zextsi256_si512(F::unsigned_quants(block[0]));
        }
        transpose16(v);
#pragma GCC unroll 16
        for (size_t j = 0; j < 16; ++j) _mm512_store_si512(panel.q[8 * i + j] + 64 * half, v[j]);
      }
    }
    for (size_t r = 0; r < kPanelRows; ++r) {
      const auto* block = reinterpret_cast<const Block*>(rows.row[r]) + 8 * step;
      for (size_t b = 0; b < n_blocks; ++b) {
        panel.d[b][r] = half_at(&block[b].d);
        if constexpr (kHasMinimum) panel.m[b][r] = half_at(&block[b].m);
      }
      for (size_t i = 0; i < 8 * sizeof(Block); i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(block + 8) + i, _MM_HINT_T0);
    }
  }

  static DUET_INLINE __m512i pair(const Block& a, const Block& b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(F::unsigned_quants(a)),
                              F::unsigned_quants(b), 1);
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
  static size_t n_steps(size_t cols) { return (cols / 32 + 15) / 16; }

  // Sixteen blocks of the token. Sums come out in the order of kOrder: that of the folds below.
  struct Token16 {
    alignas(64) int8_t qs[8][64];
    alignas(64) int32_t offset[8][16];  // per four products
    alignas(64) float d[16], total[16];
  };
  static constexpr uint8_t kOrder[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};

  static void decode(const std::byte* const* rows, NextRows next, const MatmulArgs& a, float* y) {
    const size_t n_blocks = a.cols / 32;
    __m512 sum = {};
    for (size_t b = 0; b < n_blocks; b += 16) {
      next.fetch_share();
      const auto* x = reinterpret_cast<const BlockAct32*>(a.x) + b;
      sum = n_blocks - b >= 16 ? add_blocks<true>(rows, b, 16, x, sum)
                               : add_blocks<false>(rows, b, n_blocks - b, x, sum);
    }
    _mm512_store_ps(y, sum);
  }

  static DUET_INLINE void load_token(const BlockAct32* x, size_t n, Token16& token) {
    for (size_t i = 0; i < 16; ++i) {
      const bool there = kOrder[i] < n;
      token.d[i] = there ? x[kOrder[i]].d : 0.0f;
      token.total[i] = there ? token.d[i] * static_cast<float>(x[kOrder[i]].sum) : 0.0f;
    }
    for (size_t b = 0; b < 16; ++b) {
      const __m256i v = b < n ? load256(x[b].qs) : __m256i{};
      _mm256_store_si256(reinterpret_cast<__m256i*>(token.qs[b / 2] + 32 * (b % 2)), v);
    }
    if constexpr (F::kOffsetShift > 0) {
      const __m512i off = _mm512_set1_epi8(static_cast<char>(1 << F::kOffsetShift));
      for (size_t j = 0; j < 8; ++j) {
        const __m512i dot = _mm512_dpbusd_epi32(__m512i{}, off, _mm512_load_si512(token.qs[j]));
        _mm512_store_si512(token.offset[j], _mm512_sub_epi32(__m512i{}, dot));
      }
    }
  }

  // kFull: n is 16. Blocks that are not there count 0.
  template <bool kFull>
  static DUET_INLINE __m512 add_blocks(const std::byte* const* rows, size_t first, size_t n,
                                       const BlockAct32* x, __m512 sum) {
    Token16 token;
    load_token(x, n, token);
    alignas(64) uint16_t d[16][16] = {}, m[16][16] = {};
    for (size_t r = 0; r < 16; ++r) {
      const auto* block = reinterpret_cast<const Block*>(rows[r]) + first;
#pragma GCC unroll 16
      for (size_t i = 0; i < 16; ++i) {
        if (!kFull && kOrder[i] >= n) continue;
        d[r][i] = block[kOrder[i]].d;
        if constexpr (kHasMinimum) m[r][i] = block[kOrder[i]].m;
      }
    }
    __m512i dot[16];
    for (size_t r = 0; r < 16; ++r) {
      const auto* block = reinterpret_cast<const Block*>(rows[r]) + first;
      dot[r] = row_dots<kFull>(block, n, token);
    }
    return add_chains(dot, d, m, token, n, sum);
  }

  // The 16 integer sums of a row, in the order of kOrder.
  template <bool kFull>
  static DUET_INLINE __m512i row_dots(const Block* block, size_t n, const Token16& token) {
    __m512i v[8];
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) {
      __m512i q = {};
      if (kFull || 2 * j + 1 < n) q = pair(block[2 * j], block[2 * j + 1]);
      else if (2 * j < n) q = _mm512_zextsi256_si512(F::unsigned_quants(block[2 * j]));
      const __m512i start = F::kOffsetShift > 0 ? _mm512_load_si512(token.offset[j]) : __m512i{};
      v[j] = _mm512_dpbusd_epi32(start, q, _mm512_load_si512(token.qs[j]));
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j)
      v[j] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * j], v[2 * j + 1]),
                              _mm512_unpackhi_epi32(v[2 * j], v[2 * j + 1]));
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi64(v[0], v[1]),
                                         _mm512_unpackhi_epi64(v[0], v[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi64(v[2], v[3]),
                                          _mm512_unpackhi_epi64(v[2], v[3]));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88),
                            _mm512_shuffle_i32x4(low, high, 0xdd));
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
      const size_t i = kPlace.of[b];
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(dot[i]), _mm512_castsi512_ps(scale[i]), sum);
      if constexpr (kHasMinimum) {
        const __m512 t = _mm512_set1_ps(token.total[i]);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(minimum[i]), t, sum);
      }
    }
    return sum;
  }

  struct Place {
    uint8_t of[16];
  };
  static constexpr Place kPlace = [] {
    Place place{};
    for (uint8_t i = 0; i < 16; ++i) place.of[kOrder[i]] = i;
    return place;
  }();
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
