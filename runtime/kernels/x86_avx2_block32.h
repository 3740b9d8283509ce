// Formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL) times act32 in 256-bit registers.
#pragma once

#include "runtime/kernels/x86_avx2_panel.h"

namespace duet {
namespace {

// quants(): 32 values, unsigned with kOffsetShift (value = quant - 2^kOffsetShift unless 0), or
// signed where kWide. kLargest: the largest unsigned quant.
struct BytesQ4_0 {
  using Block = BlockQ4_0;
  static constexpr bool kWide = false;
  static constexpr int kOffsetShift = 3, kLargest = 15;
  static DUET_INLINE __m256i quants(const Block& b) { return nibbles32(b.qs); }
};

struct BytesQ4_1 {
  using Block = BlockQ4_1;
  static constexpr bool kWide = false;
  static constexpr int kOffsetShift = 0, kLargest = 15;
  static DUET_INLINE __m256i quants(const Block& b) { return nibbles32(b.qs); }
};

struct BytesQ5_0 {
  using Block = BlockQ5_0;
  static constexpr bool kWide = false;
  static constexpr int kOffsetShift = 4, kLargest = 31;
  static DUET_INLINE __m256i quants(const Block& b) {
    return _mm256_or_si256(nibbles32(b.qs), fifth_bits(b.qh));
  }
};

struct BytesQ5_1 {
  using Block = BlockQ5_1;
  static constexpr bool kWide = false;
  static constexpr int kOffsetShift = 0, kLargest = 31;
  static DUET_INLINE __m256i quants(const Block& b) {
    return _mm256_or_si256(nibbles32(b.qs), fifth_bits(b.qh));
  }
};

// Eight signed bits become unsigned by an offset of 128; only vpdpbusd can take them.
DUET_INLINE __m256i unsigned_if_vnni(__m256i q) {
  return kVnni ? _mm256_xor_si256(q, _mm256_set1_epi8(-128)) : q;
}

struct BytesQ8_0 {
  using Block = BlockQ8_0;
  static constexpr bool kWide = !kVnni;
  static constexpr int kOffsetShift = kVnni ? 7 : 0;
  static DUET_INLINE __m256i quants(const Block& b) { return unsigned_if_vnni(load256(b.qs)); }
};

struct BytesIQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr bool kWide = !kVnni;
  static constexpr int kOffsetShift = kVnni ? 7 : 0;
  static DUET_INLINE __m256i quants(const Block& b) {
    const __m256i levels = _mm256_broadcastsi128_si256(load128(kIq4Levels));
    return unsigned_if_vnni(_mm256_shuffle_epi8(levels, nibbles32(b.qs)));
  }
};

template <class Block>
constexpr bool kHasM = requires(Block b) {
  b.m;
};

// ---- one token ----------------------------------------------------------------------------------
// Scales and sums of eight blocks of activations.
struct EightActs {
  alignas(32) float d[8];
  alignas(32) int32_t sum[8];

  DUET_INLINE EightActs(const BlockAct32* x, size_t n) {
    for (size_t i = 0; i < 8; ++i) {
      d[i] = i < n ? x[i].d : 0.0f;
      sum[i] = i < n ? x[i].sum : 0;
    }
  }
};

// Eight rows x eight blocks of sums and scales, [row][block] until they are transposed.
template <class Bytes>
struct Decode32 {
  using Block = typename Bytes::Block;
  static constexpr bool kM = kHasM<Block>;
  __m256i product[8];
  alignas(16) uint16_t d[8][8] = {}, m[8][8] = {};

  // Eight lanes of partial sums.
  static DUET_INLINE __m256i dot(const Block& w, const BlockAct32& x) {
    const __m256i q = Bytes::quants(w), v = load256(x.qs);
    return Bytes::kWide ? dpbusd(__m256i{}, _mm256_abs_epi8(q), _mm256_sign_epi8(v, q))
                        : dpbusd(__m256i{}, q, v);
  }

  // Row r; n blocks, of eight unless kTail. As many are fetched ahead.
  template <bool kTail>
  DUET_INLINE void add_row(size_t r, const Block* w, const BlockAct32* x, size_t n, Ahead& ahead) {
    __m256i dots[8];
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      dots[i] = __m256i{};
      if (kTail && i >= n) continue;
      dots[i] = dot(w[i], x[i]);
      d[r][i] = w[i].d;
      if constexpr (kM) m[r][i] = w[i].m;
      ahead.fetch_after<8 * sizeof(Block), 8>(i, dots[i]);
    }
    ahead.next(n * sizeof(Block));
    product[r] = sum_lanes(dots);
  }

  DUET_INLINE __m256 chain(const EightActs& acts, size_t n, __m256 y) {
    __m256i scale[8], min[8];
    const __m256 x_d = _mm256_load_ps(acts.d);
    const __m256i act_sum = load256(acts.sum);
    const __m256i offset = Bytes::kOffsetShift == 0
                               ? __m256i{}
                               : _mm256_slli_epi32(act_sum, Bytes::kOffsetShift);
#pragma GCC unroll 8
    for (size_t r = 0; r < 8; ++r) {
      product[r] =
          _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_sub_epi32(product[r], offset)));
      scale[r] = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtph_ps(load128(d[r])), x_d));
      if constexpr (kM) min[r] = _mm256_castps_si256(_mm256_cvtph_ps(load128(m[r])));
    }
    transpose8(product);
    transpose8(scale);
    if constexpr (kM) transpose8(min);
    alignas(32) float m_scale[8];
    _mm256_store_ps(m_scale, _mm256_mul_ps(x_d, _mm256_cvtepi32_ps(act_sum)));
    for (size_t b = 0; b < n; ++b) {
      y = _mm256_fmadd_ps(_mm256_castsi256_ps(product[b]), _mm256_castsi256_ps(scale[b]), y);
      if constexpr (kM)
        y = _mm256_fmadd_ps(_mm256_castsi256_ps(min[b]), _mm256_broadcast_ss(m_scale + b), y);
    }
    return y;
  }
};

template <class Bytes, bool kTail>
DUET_INLINE __m256 decode_blocks(const RowsOf8& rows, Ahead& ahead, const BlockAct32* x,
                                 size_t b, size_t n, __m256 y) {
  using Block = typename Bytes::Block;
  Decode32<Bytes> decode;
#pragma GCC unroll 1
  for (size_t r = 0; r < 8; ++r) {
    const std::byte* w = rows.at[r] + b * sizeof(Block);
    decode.template add_row<kTail>(r, reinterpret_cast<const Block*>(w), x + b, n, ahead);
  }
  return decode.chain(EightActs(x + b, n), n, y);
}

template <class Bytes>
void decode_rows32(const MatmulArgs& a) noexcept {
  const auto* x = reinterpret_cast<const BlockAct32*>(a.x);
  const RowsOf8 rows(a);
  Ahead ahead(rows_from(a, 8));
  __m256 y = {};
  size_t b = 0;
  for (; b + 8 <= a.cols / 32; b += 8) y = decode_blocks<Bytes, false>(rows, ahead, x, b, 8, y);
  if (b < a.cols / 32) y = decode_blocks<Bytes, true>(rows, ahead, x, b, a.cols / 32 - b, y);
  rows.store(y);
}

// ---- several tokens -----------------------------------------------------------------------------
template <class Bytes>
struct Panel32 {
  using Block = typename Bytes::Block;
  using Act = BlockAct32;
  static constexpr size_t kBlockCols = 32, kActCols = 32;
  static constexpr bool kWide = Bytes::kWide;
  static constexpr size_t kDwords = kWide ? 16 : 8;  // of a row in a block

  alignas(64) uint8_t q[8 * kDwords * kPanelRows * 4];  // [dword of the row][32 rows][4]
  __m256 d[8][kVectors], m[8][kVectors];

  void unpack(const Block* const rows[8], size_t v, size_t n_cols) {
    for (size_t b = 0; b < n_cols / 32; ++b) {
      alignas(16) uint16_t half[8], half_m[8];
      __m256i t[8], high[8];
#pragma GCC unroll 8
      for (size_t j = 0; j < 8; ++j) {
        const Block& block = rows[j][b];
        half[j] = block.d;
        if constexpr (kHasM<Block>) half_m[j] = block.m;
        t[j] = Bytes::quants(block);
        if constexpr (kWide) {
          high[j] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(t[j], 1));
          t[j] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(t[j]));
        }
      }
      store_dwords(t, kDwords * b, v);
      if constexpr (kWide) store_dwords(high, kDwords * b + 8, v);
      d[b][v] = _mm256_cvtph_ps(load128(half));
      if constexpr (kHasM<Block>) m[b][v] = _mm256_cvtph_ps(load128(half_m));
    }
  }

  template <size_t R, size_t T>
  void tile(size_t v, const BlockAct32* const* x, const WideAct* x16, size_t n_cols,
            float* acc) const {
    for (size_t b = 0; b < n_cols / 32; ++b) {
      const uint8_t* w = q + kDwords * b * kPanelRows * 4 + 32 * v;
      TileSums<R, T> sum = {};
      if constexpr (kWide) {
        add_wide<R, T>(w, x16, 32 * b, kDwords, sum);
      } else {
        add_bytes<R, T>(w, x, b, sum);
      }
      add_to_chain<R, T>(v, x, b, sum, acc);
    }
  }

 private:
  DUET_INLINE void store_dwords(__m256i t[8], size_t first, size_t v) {
    transpose8(t);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) store256(q + ((first + i) * kPanelRows + 8 * v) * 4, t[i]);
  }

  template <size_t R, size_t T>
  static DUET_INLINE void add_bytes(const uint8_t* w, const BlockAct32* const* x, size_t b,
                                    TileSums<R, T>& sum) {
    const int8_t* at[T];
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) at[t] = x[t][b].qs;
    if constexpr (kVnni) {
      multiply_columns<true, 8, R, T>(w, at, sum);  // all eight in 32 bits
    } else {
      constexpr int kSteps = steps_in_16_bits(Bytes::kLargest);
#pragma GCC unroll 4
      for (size_t k = 0; k < 8; k += kSteps) {
        TileSums<R, T> parts;
        multiply_columns<false, kSteps, R, T>(w + 128 * k, at, parts);
#pragma GCC unroll 4
        for (size_t t = 0; t < T; ++t) {
          at[t] += 4 * kSteps;
#pragma GCC unroll 4
          for (size_t r = 0; r < R; ++r)
            sum[r][t] = in_order(dpwssd(sum[r][t], parts[r][t], _mm256_set1_epi16(1)));
        }
      }
    }
  }

  template <size_t R, size_t T>
  DUET_INLINE void add_to_chain(size_t v, const BlockAct32* const* x, size_t b,
                                TileSums<R, T>& sum, float* acc) const {
#pragma GCC unroll 4
    for (size_t t = 0; t < T; ++t) {
      const BlockAct32& act = x[t][b];
      const __m256i act_sum = splat32(&act.sum);
      const __m256 x_d = _mm256_broadcast_ss(&act.d);
      const __m256 m_scale = _mm256_mul_ps(x_d, _mm256_cvtepi32_ps(act_sum));
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r) {
        float* at = acc + t * kPanelRows + 8 * r;
        __m256i n = sum[r][t];
        if constexpr (Bytes::kOffsetShift > 0)
          n = _mm256_sub_epi32(n, _mm256_slli_epi32(act_sum, Bytes::kOffsetShift));
        __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n), _mm256_mul_ps(d[b][v + r], x_d),
                                   _mm256_load_ps(at));
        if constexpr (kHasM<Block>) y = _mm256_fmadd_ps(m[b][v + r], m_scale, y);
        _mm256_store_ps(at, y);
      }
    }
  }
};

template <class Bytes>
void matmul_32(const MatmulArgs& a) noexcept {
  if (a.n_tokens == 1) return for_eight_rows(a, decode_rows32<Bytes>);
  matmul_panels<Panel32<Bytes>>(a);
}

void set_block32_256(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q4_0)] = matmul_32<BytesQ4_0>;
  table.matmul[static_cast<size_t>(DType::Q4_1)] = matmul_32<BytesQ4_1>;
  table.matmul[static_cast<size_t>(DType::Q5_0)] = matmul_32<BytesQ5_0>;
  table.matmul[static_cast<size_t>(DType::Q5_1)] = matmul_32<BytesQ5_1>;
  table.matmul[static_cast<size_t>(DType::Q8_0)] = matmul_32<BytesQ8_0>;
  table.matmul[static_cast<size_t>(DType::IQ4_NL)] = matmul_32<BytesIQ4_NL>;
}

}  // namespace
}  // namespace duet
