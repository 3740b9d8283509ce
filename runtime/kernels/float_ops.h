// Float kernels of the SIMD tables, written once over xsimd batches.
//
// `Isa` supplies the xsimd architecture and the few operations xsimd has no name for:
//   using Arch;  load_f16(const void*), load_bf16(const void*), store_f16(void*, Batch),
//   rotate_pairs(x, cs), lane_sum(Batch), fma(a, b, c) = a b + c rounded once (xsimd 8 rounds twice on
//   AVX-512).
// Ends of rows go through zero-padded copies, so nothing outside a row is read. Symbols stay inside
// each file: unnamed namespace, builtins instead of <cmath>, xsimd's own functions carry the
// architecture in their name.
#pragma once

#include <xsimd/xsimd.hpp>

#include "quant/group_lanes.h"
#include "runtime/kernels/matmul_tiles.h"

namespace duet {
namespace {

template <class Isa>
struct FloatOps {
  using Batch = xsimd::batch<float, typename Isa::Arch>;
  static constexpr size_t kWidth = sizeof(typename Batch::register_type) / sizeof(float);

  static DUET_INLINE Batch load(const float* p) { return Batch::load_unaligned(p); }
  static DUET_INLINE void store(float* p, Batch v) { v.store_unaligned(p); }

  static DUET_INLINE Batch load_part(const float* p, size_t n, float pad = 0.0f) {
    float padded[kWidth];
    for (size_t i = 0; i < kWidth; ++i) padded[i] = pad;
    __builtin_memcpy(padded, p, n * sizeof(float));
    return load(padded);
  }
  static DUET_INLINE void store_part(float* p, Batch v, size_t n) {
    float whole[kWidth];
    store(whole, v);
    __builtin_memcpy(p, whole, n * sizeof(float));
  }

  // ---- element types: kWidth elements at p; the first n of them with zeros behind ------------
  struct F32 {
    static constexpr size_t kBytes = 4;
    static DUET_INLINE Batch at(const std::byte* p) {
      float values[kWidth];  // weights are only 2-byte aligned
      __builtin_memcpy(values, p, sizeof values);
      return load(values);
    }
  };
  struct F16 {
    static constexpr size_t kBytes = 2;
    static DUET_INLINE Batch at(const std::byte* p) { return Isa::load_f16(p); }
  };
  struct BF16 {
    static constexpr size_t kBytes = 2;
    static DUET_INLINE Batch at(const std::byte* p) { return Isa::load_bf16(p); }
  };
  template <class Type>
  static DUET_INLINE Batch part_at(const std::byte* p, size_t n) {
    std::byte padded[kWidth * Type::kBytes] = {};
    __builtin_memcpy(padded, p, n * Type::kBytes);
    return Type::at(padded);
  }

  // ---- matmul: element i belongs to partial sum i % (4 * kWidth) ------------------------------
  template <class Type>
  struct Matmul {
    static constexpr size_t kRows = 1, kTokens = kWidth == 16 ? 4 : 2, kSums = 4;

    template <size_t R, size_t T>
    static void tile(const MatmulArgs& a) noexcept {
      static_assert(R == 1);
      Batch acc[T][kSums];
      for (auto& token : acc) {
        for (Batch& sum : token) sum = Batch(0.0f);
      }
      size_t i = 0;
      for (; i + kSums * kWidth <= a.cols; i += kSums * kWidth) {
#pragma GCC unroll 4
        for (size_t s = 0; s < kSums; ++s)
          step<T>(a, i + s * kWidth, Type::at(a.w + (i + s * kWidth) * Type::kBytes), acc, s);
      }
      size_t s = 0;
      for (; i + kWidth <= a.cols; i += kWidth, ++s)
        step<T>(a, i, Type::at(a.w + i * Type::kBytes), acc, s);
      if (const size_t rest = a.cols - i; rest > 0) {
        const Batch w = part_at<Type>(a.w + i * Type::kBytes, rest);
        for (size_t t = 0; t < T; ++t)
          acc[t][s] = Isa::fma(w, load_part(token(a, t) + i, rest), acc[t][s]);
      }
      for (size_t t = 0; t < T; ++t) {
        a.y[t * a.y_stride] = Isa::lane_sum((acc[t][0] + acc[t][2]) + (acc[t][1] + acc[t][3]));
      }
    }

    static DUET_INLINE const float* token(const MatmulArgs& a, size_t t) {
      return reinterpret_cast<const float*>(a.x + t * a.x_stride);
    }
    template <size_t T>
    static DUET_INLINE void step(const MatmulArgs& a, size_t i, Batch w, Batch (&acc)[T][kSums],
                                 size_t s) {
#pragma GCC unroll 4
      for (size_t t = 0; t < T; ++t) acc[t][s] = Isa::fma(w, load(token(a, t) + i), acc[t][s]);
    }
  };

  // ---- element-wise ---------------------------------------------------------------------------
  // Calls each(i, n) for whole batches (n = kWidth) and once for the rest.
  template <class Each>
  static DUET_INLINE void for_batches(size_t n, Each each) {
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) each(i, kWidth);
    if (i < n) each(i, n - i);
  }
  static DUET_INLINE Batch load_n(const float* p, size_t n, float pad = 0.0f) {
    return n == kWidth ? load(p) : load_part(p, n, pad);
  }
  static DUET_INLINE void store_n(float* p, Batch v, size_t n) {
    n == kWidth ? store(p, v) : store_part(p, v, n);
  }

  static void rms_norm(const float* x, const float* w, float eps, float* y, size_t n) noexcept {
    Batch sum(0.0f);
    for_batches(n, [&](size_t i, size_t m) {
      const Batch v = load_n(x + i, m);
      sum = Isa::fma(v, v, sum);
    });
    const float mean = Isa::lane_sum(sum) / static_cast<float>(n);
    const Batch scale(1.0f / __builtin_sqrtf(mean + eps));
    for_batches(n, [&](size_t i, size_t m) {
      store_n(y + i, load_n(x + i, m) * scale * load_n(w + i, m), m);
    });
  }

  static void rope(float* x, const float* cs, size_t n_rot) noexcept {
    for_batches(n_rot, [&](size_t i, size_t m) {
      store_n(x + i, Isa::rotate_pairs(load_n(x + i, m), load_n(cs + i, m)), m);
    });
  }

  static void softmax(float* x, size_t n) noexcept {
    constexpr float kLowest = -3.4028235e38f;  // its exponential after the shift is 0
    Batch max(kLowest);
    for_batches(n, [&](size_t i, size_t m) { max = xsimd::max(max, load_n(x + i, m, kLowest)); });
    float lanes[kWidth], top = kLowest;
    store(lanes, max);
    for (float lane : lanes) top = lane > top ? lane : top;
    Batch sum(0.0f);
    for_batches(n, [&](size_t i, size_t m) {
      const Batch e = xsimd::exp(load_n(x + i, m, kLowest) - Batch(top));
      store_n(x + i, e, m);
      sum += m == kWidth ? e : load_part(x + i, m);
    });
    const Batch inverse(1.0f / Isa::lane_sum(sum));
    for_batches(n, [&](size_t i, size_t m) { store_n(x + i, load_n(x + i, m) * inverse, m); });
  }

  static void silu_mul(const float* gate, const float* up, float* y, size_t n) noexcept {
    for_batches(n, [&](size_t i, size_t m) {
      const Batch g = load_n(gate + i, m);
      store_n(y + i, g / (Batch(1.0f) + xsimd::exp(-g)) * load_n(up + i, m), m);
    });
  }

  static void add(float* y, const float* x, size_t n) noexcept {
    for_batches(
        n, [&](size_t i, size_t m) { store_n(y + i, load_n(y + i, m) + load_n(x + i, m), m); });
  }

  static void add_scaled(float* y, const float* x, float s, size_t n) noexcept {
    for_batches(n, [&](size_t i, size_t m) {
      store_n(y + i, Isa::fma(Batch(s), load_n(x + i, m), load_n(y + i, m)), m);
    });
  }

  // ---- sums of rows: tiles of rows and columns stay in registers while k runs -------------------
  struct Products {
    static constexpr size_t kRows = 4, kBatches = Isa::kRegisters == 32 ? 4 : 2;
    static constexpr size_t kTerms = 128;  // of k at a time: a tile's part of b stays in the first-level cache

    // R rows and C batches of columns; n: columns of the last batch.
    template <size_t R, size_t C>
    static void tile(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t n_k, float* to,
                     size_t to_stride, size_t n) noexcept {
      const auto width = [n](size_t c) { return c + 1 < C ? kWidth : n; };
      Batch acc[R][C];
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (size_t c = 0; c < C; ++c) acc[r][c] = load_n(to + r * to_stride + c * kWidth, width(c));
      for (size_t k = 0; k < n_k; ++k, b += b_stride) {
        bool zero = true;
#pragma GCC unroll 4
        for (size_t r = 0; r < R; ++r) zero &= a[r * a_stride + k] == 0;
        if (zero) continue;  // as most errors are that were moved
        Batch row[C];
#pragma GCC unroll 4
        for (size_t c = 0; c < C; ++c) row[c] = load_n(b + c * kWidth, width(c));
#pragma GCC unroll 4
        for (size_t r = 0; r < R; ++r) {
          const Batch s(a[r * a_stride + k]);
#pragma GCC unroll 4
          for (size_t c = 0; c < C; ++c) acc[r][c] = Isa::fma(s, row[c], acc[r][c]);
        }
      }
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (size_t c = 0; c < C; ++c) store_n(to + r * to_stride + c * kWidth, acc[r][c], width(c));
    }

    template <size_t C>
    static void columns(const ProductArgs& p, size_t k, size_t i, size_t n) noexcept {
      const size_t n_k = p.n_k - k < kTerms ? p.n_k - k : kTerms;
      const float* b = p.b + k * p.b_stride + i;
      size_t r = 0;
      for (; r + kRows <= p.n_rows; r += kRows)
        tile<kRows, C>(p.a + r * p.a_stride + k, p.a_stride, b, p.b_stride, n_k, p.to + r * p.to_stride + i, p.to_stride, n);
      for (; r < p.n_rows; ++r)
        tile<1, C>(p.a + r * p.a_stride + k, p.a_stride, b, p.b_stride, n_k, p.to + r * p.to_stride + i, p.to_stride, n);
    }

    static void add(const ProductArgs& p) noexcept {
      constexpr size_t kCols = kBatches * kWidth;
      for (size_t k = 0; k < p.n_k; k += kTerms) {
        size_t i = 0;
        for (; i + kCols <= p.n; i += kCols) columns<kBatches>(p, k, i, kWidth);
        for (; i < p.n; i += kWidth) columns<1>(p, k, i, p.n - i < kWidth ? p.n - i : kWidth);
      }
    }
  };

  static void f32_to_f16(const float* x, uint16_t* y, size_t n) noexcept {
    for_batches(n, [&](size_t i, size_t m) {
      uint16_t half[kWidth];
      Isa::store_f16(half, load_n(x + i, m));
      __builtin_memcpy(y + i, half, m * sizeof(uint16_t));
    });
  }

  template <class Type>
  static void decode_row(const void* src, float* dst, size_t n) noexcept {
    const auto* bytes = static_cast<const std::byte*>(src);
    for_batches(n, [&](size_t i, size_t m) {
      const std::byte* p = bytes + i * Type::kBytes;
      store_n(dst + i, m == kWidth ? Type::at(p) : part_at<Type>(p, m), m);
    });
  }
  static void f16_to_f32(const uint16_t* x, float* y, size_t n) noexcept {
    decode_row<F16>(x, y, n);
  }

  static void add_to(KernelTable& table) {
    table.matmul[static_cast<size_t>(DType::F32)] = matmul_tiled<Matmul<F32>>;
    table.matmul[static_cast<size_t>(DType::F16)] = matmul_tiled<Matmul<F16>>;
    table.matmul[static_cast<size_t>(DType::BF16)] = matmul_tiled<Matmul<BF16>>;
    table.decode_row[static_cast<size_t>(DType::F16)] = decode_row<F16>;
    table.decode_row[static_cast<size_t>(DType::BF16)] = decode_row<BF16>;
    table.rms_norm = rms_norm;
    table.rope = rope;
    table.softmax = softmax;
    table.silu_mul = silu_mul;
    table.add = add;
    table.add_scaled = add_scaled;
    table.fit = {Products::add, GroupLanes<kWidth>::search};
    table.f32_to_f16 = f32_to_f16;
    table.f16_to_f32 = f16_to_f32;
  }
};

}  // namespace
}  // namespace duet
