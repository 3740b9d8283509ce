// Formats with blocks of 32 (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL) times act32, in 256-bit registers:
// shared by the AVX2 and the AVX-512 file, which differ in the instruction behind Dot.
// One block is one register: 8 lanes of 4 products. y = lane sum of sum(d_w * d_x * dot).
#pragma once

#include <immintrin.h>

#include "quant/format.h"
#include "runtime/kernels/matmul_tiles.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

DUET_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
DUET_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// Lanes added as a tree: (i, i+4), then (i, i+2), then (i, i+1).
DUET_INLINE float lane_sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// 16 bytes -> 32 values 0..15: low nibbles in the lower half, high nibbles in the upper.
DUET_INLINE __m256i nibbles(const uint8_t* qs) {
  const __m128i v = load128(qs);
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
}

// 32 bits -> 32 bytes, 16 where the bit is set.
DUET_INLINE __m256i fifth_bits(const uint8_t* qh) {
  int32_t bits;
  __builtin_memcpy(&bits, qh, 4);
  const __m256i byte_of =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

// quants(): 32 values, signed where kSigned, else 0..31 with a minimum m to add.
struct UnpackQ4_0 {
  using Block = BlockQ4_0;
  static constexpr bool kSigned = true;
  static DUET_INLINE __m256i quants(const Block& b) {
    return _mm256_sub_epi8(nibbles(b.qs), _mm256_set1_epi8(8));
  }
};

struct UnpackQ4_1 {
  using Block = BlockQ4_1;
  static constexpr bool kSigned = false;
  static DUET_INLINE __m256i quants(const Block& b) { return nibbles(b.qs); }
};

struct UnpackQ5_0 {
  using Block = BlockQ5_0;
  static constexpr bool kSigned = true;
  static DUET_INLINE __m256i quants(const Block& b) {
    const __m256i q = _mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh));
    return _mm256_sub_epi8(q, _mm256_set1_epi8(16));
  }
};

struct UnpackQ5_1 {
  using Block = BlockQ5_1;
  static constexpr bool kSigned = false;
  static DUET_INLINE __m256i quants(const Block& b) {
    return _mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh));
  }
};

struct UnpackQ8_0 {
  using Block = BlockQ8_0;
  static constexpr bool kSigned = true;
  static DUET_INLINE __m256i quants(const Block& b) { return load256(b.qs); }
};

struct UnpackIQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr bool kSigned = true;
  static DUET_INLINE __m256i quants(const Block& b) {
    const __m256i levels = _mm256_broadcastsi128_si256(load128(kIq4Levels));
    return _mm256_shuffle_epi8(levels, nibbles(b.qs));
  }
};

// Dot::dot(u, s): 8 lanes of 4 products each of unsigned u (<= 128) and signed s (>= -127).
template <class Unpack, class Dot>
struct Block32Kernel {
  using Block = typename Unpack::Block;
  static constexpr size_t kRows = 4, kTokens = 4;

  template <size_t R, size_t T>
  static void tile(const MatmulArgs& a) noexcept {
    __m256 acc[R][T] = {};
    __m128 mins[R][T] = {};
    const size_t n_blocks = a.cols / 32;
    for (size_t b = 0; b < n_blocks; ++b) {
#pragma GCC unroll 8
      for (size_t r = 0; r < R; ++r) {
        const auto& block = reinterpret_cast<const Block*>(a.w + r * a.w_stride)[b];
        const __m256i q = Unpack::quants(block);
        const __m256i magnitude = Unpack::kSigned ? _mm256_abs_epi8(q) : q;
        const __m256 d = _mm256_set1_ps(_cvtsh_ss(block.d));
#pragma GCC unroll 8
        for (size_t t = 0; t < T; ++t) {
          const auto& act = reinterpret_cast<const BlockAct32*>(a.x + t * a.x_stride)[b];
          const __m256i x = load256(act.qs);
          const __m256i dot = Dot::dot(magnitude, Unpack::kSigned ? _mm256_sign_epi8(x, q) : x);
          const __m256 scale = _mm256_mul_ps(d, _mm256_broadcast_ss(&act.d));
          acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, acc[r][t]);
          if constexpr (!Unpack::kSigned) {
            const __m128 sum = _mm_set_ss(act.d * static_cast<float>(act.sum));
            mins[r][t] = _mm_fmadd_ss(_mm_set_ss(_cvtsh_ss(block.m)), sum, mins[r][t]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (size_t t = 0; t < T; ++t)
        a.y[t * a.y_stride + r] = lane_sum(acc[r][t]) + _mm_cvtss_f32(mins[r][t]);
    }
  }
};

template <class Dot>
void set_block32(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q4_0)] = matmul_tiled<Block32Kernel<UnpackQ4_0, Dot>>;
  table.matmul[static_cast<size_t>(DType::Q4_1)] = matmul_tiled<Block32Kernel<UnpackQ4_1, Dot>>;
  table.matmul[static_cast<size_t>(DType::Q5_0)] = matmul_tiled<Block32Kernel<UnpackQ5_0, Dot>>;
  table.matmul[static_cast<size_t>(DType::Q5_1)] = matmul_tiled<Block32Kernel<UnpackQ5_1, Dot>>;
  table.matmul[static_cast<size_t>(DType::Q8_0)] = matmul_tiled<Block32Kernel<UnpackQ8_0, Dot>>;
  table.matmul[static_cast<size_t>(DType::IQ4_NL)] = matmul_tiled<Block32Kernel<UnpackIQ4_NL, Dot>>;
}

}  // namespace
}  // namespace duet
