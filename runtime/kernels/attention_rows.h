// Attention of the SIMD tables (contract: kernels.h): what all element types share, over xsimd
// batches: which keys a row sees, weights of scores, merging of segments.
//
// `Isa` supplies: Arch, kRegisters, fma (float_ops.h), lane_max and lane_sum, and what
// attention_float.h and attention_q8.h name.
#pragma once

#include <xsimd/xsimd.hpp>

#include "runtime/kernels/matmul_tiles.h"

namespace duet {
namespace {

template <class Isa>
struct AttentionRows {
  using Batch = xsimd::batch<float, typename Isa::Arch>;
  using IntBatch = xsimd::batch<int32_t, typename Isa::Arch>;
  static constexpr size_t kWidth = sizeof(typename Batch::register_type) / sizeof(float);
  static constexpr size_t kVecs = kKvBlock / kWidth;  // batches of one key block
  // From so many rows on arithmetic is the bound; fewer wait for memory and fetch ahead.
  static constexpr size_t kManyRows = 3 * Isa::kRegisters / 4;

  static DUET_INLINE Batch load(const void* p) {
    return Batch::load_unaligned(static_cast<const float*>(p));
  }
  static DUET_INLINE void store(float* p, Batch v) { v.store_unaligned(p); }

  // Few rows wait for memory: while they work on some blocks or rows, they fetch those of `next`, as
  // one stream into the L2 cache: the L1 cache has too few misses in flight (14 against 19 GB/s).
  static DUET_INLINE void prefetch(const std::byte* p) { __builtin_prefetch(p, 0, 2); }

  // Calls f(integral_constant<R>, first row), R <= kMax, so that the rows of all calls are [0, n).
  template <size_t kMax, class F>
  static DUET_INLINE void for_row_groups(size_t n, const F& f) {
    size_t r = 0;
    for (; r + kMax <= n; r += kMax) f(std::integral_constant<size_t, kMax>{}, r);
    const auto rest = [&](auto rows) {
      if constexpr (rows() < kMax) {
        if (n - r < rows()) return;
        f(rows, r);
        r += rows();
      }
    };
    rest(std::integral_constant<size_t, 8>{});
    rest(std::integral_constant<size_t, 6>{});
    rest(std::integral_constant<size_t, 4>{});
    rest(std::integral_constant<size_t, 2>{});
    rest(std::integral_constant<size_t, 1>{});
  }

  // 2^x for x <= 0, 2^-125 below; NaN for NaN; 2^0 = 1. x = n + f, 2^f by its Taylor series to the
  // 6th power (|f| <= 0.5: error 1.2e-7 of it at most), 2^n into the exponent.
  static DUET_INLINE Batch exp2_negative(Batch x) {
    const Batch magic(0x1.8p23f), y = xsimd::max(Batch(-125.0f), x);  // in this order NaN passes
    const Batch t = y + magic, f = y - (t - magic);
    Batch e = Isa::fma(f, Batch(1.54035304e-4f), Batch(1.33335581e-3f));
    e = Isa::fma(f, e, Batch(9.61812911e-3f));
    e = Isa::fma(f, e, Batch(5.55041087e-2f));
    e = Isa::fma(f, e, Batch(0.240226507f));
    e = Isa::fma(f, e, Batch(0.693147181f));
    e = Isa::fma(f, e, Batch(1.0f));
    return xsimd::bitwise_cast<Batch>(xsimd::bitwise_cast<IntBatch>(e) + (xsimd::bitwise_cast<IntBatch>(t) << 23));
  }

  static DUET_INLINE Batch lane_numbers() {
    float lanes[kWidth];
    for (size_t i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
    return load(lanes);
  }
  // x at those of kWidth keys from j on that lie in [lo, hi), `other` at the rest.
  static DUET_INLINE Batch at_seen(size_t j, size_t lo, size_t hi, Batch x, Batch other) {
    const Batch key = lane_numbers() + Batch(static_cast<float>(j));
    return xsimd::select((key >= Batch(static_cast<float>(lo))) & (key < Batch(static_cast<float>(hi))), x, other);
  }

  struct Stats {
    float max, sum;
  };
  // Scores s[lo, hi) of a segment become 2^(s - max); the others of their blocks become 0. Sums of
  // keys 16 apart first, then these as a tree.
  static DUET_INLINE Stats softmax(float* s, size_t lo, size_t hi) {
    const size_t begin = lo / kKvBlock * kKvBlock;
    const auto whole = [&](size_t j) { return j >= lo && j + kKvBlock <= hi; };
    const Batch lowest(-3.4028235e38f), zero(0.0f);
    Batch top = lowest;
    for (size_t j = begin; j < hi; j += kKvBlock) {
      for (size_t k = j; k < j + kKvBlock; k += kWidth)
        top = xsimd::max(top, whole(j) ? load(s + k) : at_seen(k, lo, hi, load(s + k), lowest));
    }
    const float max = Isa::lane_max(top);
    Batch sums[kVecs];
    for (Batch& sum : sums) sum = zero;
    for (size_t j = begin; j < hi; j += kKvBlock) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVecs; ++v) {
        const size_t k = j + v * kWidth;
        Batch weight = exp2_negative(load(s + k) - Batch(max));
        if (!whole(j)) weight = at_seen(k, lo, hi, weight, zero);
        store(s + k, weight);
        sums[v] += weight;
      }
    }
    for (size_t half = kVecs / 2; half > 0; half /= 2)
      for (size_t v = 0; v < half; ++v) sums[v] += sums[v + half];
    return {max, Isa::lane_sum(sums[0])};
  }

  // Keys that a token sees of the segment in work, from its first position.
  struct Range {
    size_t lo, hi;
  };

  // One call: its rows and what is known of them. `rest` is the scratch that a type uses as it likes.
  struct Rows {
    const AttentionArgs& a;
    size_t n_rows, dims, row_floats;  // dims: head_dim in whole batches
    float *scores, *part;             // of the segment in work: [n_rows, kKvSegment], [n_rows, dims]
    Stats* stats;
    float* rest;
    const std::byte* next_keys = nullptr;  // of the segment after the one in work

    explicit DUET_INLINE Rows(const AttentionArgs& args)
        : a(args),
          n_rows(args.n_tokens * args.group),
          dims(attention_row_dims(args.head_dim)),
          row_floats(dims + 16),
          scores(args.scratch),
          part(scores + n_rows * kKvSegment),
          stats(reinterpret_cast<Stats*>(part + n_rows * dims)),
          rest(part + n_rows * dims + (2 * n_rows + 15) / 16 * 16) {}

    static bool empty(Range range) { return range.lo >= range.hi; }

    Range range(size_t begin, size_t token) const {
      const size_t end = a.first + token + 1;
      const size_t first = a.window > 0 && end > a.window ? end - a.window : 0;
      const size_t stop = end < a.key_end ? end : a.key_end;
      if (stop <= begin || first >= begin + kKvSegment) return {0, 0};
      return {first > begin ? first - begin : 0,
              stop - begin < kKvSegment ? stop - begin : kKvSegment};
    }

    // Multiplied into queries: scores are powers of two.
    float query_scale() const { return a.scale * kScoreUnit; }
    const float* query(size_t row) const {
      return a.q + row / a.group * a.q_stride + row % a.group * a.head_dim;
    }

    // Calls f(first position, t0, t1) for each segment; tokens [t0, t1) see keys of it.
    template <class F>
    DUET_INLINE void for_segments(const F& f) {
      for (size_t row = 0; row < n_rows; ++row) a.out[row * row_floats + dims] = -__builtin_inff();
      for (size_t begin = a.key_begin; begin < a.key_end; begin += kKvSegment) {
        size_t t0 = 0, t1 = a.n_tokens;
        while (t0 < t1 && empty(range(begin, t0))) ++t0;
        while (t0 < t1 && empty(range(begin, t1 - 1))) --t1;
        if (t0 == t1) continue;
        const std::byte* keys = a.kv.keys + begin / kKvSegment * a.kv.segment_bytes;
        const bool last = begin + kKvSegment >= a.key_end ||
                          begin + range(begin, t1 - 1).hi == a.first + a.n_tokens;
        next_keys = last ? keys : keys + a.kv.segment_bytes;
        f(begin, t0, t1);
        for (size_t row = t0 * a.group; row < t1 * a.group; ++row) merge(row);
      }
    }

    void weigh(size_t begin, size_t t0, size_t t1) {
      for (size_t row = t0 * a.group; row < t1 * a.group; ++row) {
        const Range seen = range(begin, row / a.group);
        stats[row] = softmax(scores + row * kKvSegment, seen.lo, seen.hi);
      }
    }

    // Adds a row's segment to its result.
    void merge(size_t row) {
      float* out = a.out + row * row_floats;
      const float* o = part + row * dims;
      const Stats seg = stats[row];
      if (out[dims] == -__builtin_inff()) {
        for (size_t i = 0; i < dims; i += kWidth) store(out + i, load(o + i));
        out[dims] = seg.max;
        out[dims + 1] = seg.sum;
        return;
      }
      const float max = seg.max > out[dims] ? seg.max : out[dims];
      const Batch old_factor = exp2_negative(Batch(out[dims] - max));
      const Batch factor = exp2_negative(Batch(seg.max - max));
      for (size_t i = 0; i < dims; i += kWidth)
        store(out + i, Isa::fma(load(o + i), factor, load(out + i) * old_factor));
      const Batch sum = Isa::fma(Batch(seg.sum), factor, Batch(out[dims + 1]) * old_factor);
      float lanes[kWidth];
      store(lanes, sum);
      out[dims] = max;
      out[dims + 1] = lanes[0];
    }
  };
};

}  // namespace
}  // namespace duet
