// Attention over F32 and F16 keys and values (contract: kernels.h), over xsimd batches.
//
// `Isa` supplies load_f16(const void*), a batch of floats. Scores have keys in the lanes: one chain
// over the elements of the head per key, whatever shares the tile. Mixed values have elements in the
// lanes: one chain over the keys. Neither needs a sum across lanes, so the tile shapes are free to
// differ between one query and many. Many query rows first convert a segment to float, which gives
// the same values that few rows convert as they load.
#pragma once

#include "runtime/kernels/attention_rows.h"

namespace duet {
namespace {

template <class Isa>
struct AttentionFloat {
  using Base = AttentionRows<Isa>;
  using Batch = typename Base::Batch;
  using Range = typename Base::Range;
  static constexpr size_t kWidth = Base::kWidth, kVecs = Base::kVecs;
  // Sums held in registers; the others hold keys, values and a broadcast query or weight.
  static constexpr size_t kSums = Isa::kRegisters - Isa::kRegisters / 4;
  static constexpr size_t kMaxRows = kSums / (kVecs > 2 ? kVecs : 2);
  static constexpr size_t kSlabVecs = 2;  // batches of a row in converted values
  static constexpr size_t kSlab = kSlabVecs * kWidth;
  // Values that stay in the L1 cache while all rows and elements pass over them.
  static constexpr size_t kMixKeys = 32;

  static DUET_INLINE Batch load(const void* p) { return Base::load(p); }
  static DUET_INLINE void store(float* p, Batch v) { Base::store(p, v); }

  // ---- element types --------------------------------------------------------------------------
  // Keys: kGroup elements of 16 keys from `group`, of which kLine fill a cache line; values: kWidth
  // elements of a row from element i.
  struct F32 {
    static constexpr size_t kGroup = 1, kGroupBytes = 4 * kKvBlock, kLine = 1, kElementBytes = 4;
    static DUET_INLINE Batch keys(const std::byte* group, size_t, size_t v) {
      return load(group + 4 * v * kWidth);
    }
    static DUET_INLINE Batch values(const std::byte* row, size_t i) {
      return load(row + 4 * i);
    }
  };
  struct F16 {
    static constexpr size_t kGroup = 2, kGroupBytes = 2 * kGroup * kKvBlock, kLine = 2, kElementBytes = 2;
    static DUET_INLINE Batch keys(const std::byte* group, size_t j, size_t v) {
      return Isa::load_f16(group + 2 * (j * kKvBlock + v * kWidth));
    }
    static DUET_INLINE Batch values(const std::byte* row, size_t i) {
      return Isa::load_f16(row + 2 * i);
    }
  };
  // ---- tiles----------------------------------------------------------------------------------
  // Scores of R rows (q [head_dim, R], scaled) against B key blocks; row r at out + r * kKvSegment.
  template <class T, size_t R, size_t B, bool kFetch>
  static DUET_INLINE void score_tile(const float* q, size_t head_dim, const std::byte* block,
                                     size_t block_bytes, const std::byte* next, float* out) {
    constexpr size_t kV = B * kVecs;
    Batch acc[R][kV];
#pragma GCC unroll 16
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (size_t v = 0; v < kV; ++v) acc[r][v] = Batch(0.0f);
    for (size_t g = 0; g < head_dim; g += T::kGroup, block += T::kGroupBytes) {
      for (size_t line = 0; line < T::kGroup; line += T::kLine) {
        for (size_t b = 0; kFetch && b < B; ++b, next += 64) Base::prefetch(next);
#pragma GCC unroll 4
        for (size_t j = line; j < line + T::kLine; ++j, q += R) {
          Batch keys[kV];
#pragma GCC unroll 16
          for (size_t v = 0; v < kV; ++v)
            keys[v] = T::keys(block + v / kVecs * block_bytes, j, v % kVecs);
#pragma GCC unroll 16
          for (size_t r = 0; r < R; ++r) {
            const Batch query(q[r]);
#pragma GCC unroll 16
            for (size_t v = 0; v < kV; ++v) acc[r][v] = Isa::fma(keys[v], query, acc[r][v]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (size_t v = 0; v < kV; ++v) store(out + r * kKvSegment + v * kWidth, acc[r][v]);
  }

  // o[r][element + i] += sum over keys of p[r][key] * value; R rows, V batches of elements.
  template <class T, size_t R, size_t V, bool kFetch>
  static DUET_INLINE void mix_tile(const float* p, size_t n_keys, const std::byte* row,
                                   size_t row_bytes, size_t element, const std::byte* next,
                                   float* o, size_t o_stride) {
    Batch acc[R][V];
#pragma GCC unroll 16
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v) acc[r][v] = load(o + r * o_stride + v * kWidth);
    for (size_t j = 0; j < n_keys; ++j, row += row_bytes) {
      if (kFetch) {
        for (size_t b = 0; b < V * kWidth * T::kElementBytes; b += 64) Base::prefetch(next + b);
        next += row_bytes;
      }
      Batch values[V];
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v) values[v] = T::values(row, element + v * kWidth);
#pragma GCC unroll 16
      for (size_t r = 0; r < R; ++r) {
        const Batch weight(p[r * kKvSegment + j]);
#pragma GCC unroll 16
        for (size_t v = 0; v < V; ++v) acc[r][v] = Isa::fma(values[v], weight, acc[r][v]);
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v) store(o + r * o_stride + v * kWidth, acc[r][v]);
  }

  template <class T>
  struct Call {
    typename Base::Rows rows;
    const AttentionArgs& a;
    size_t dims;
    float *q, *panel;

    explicit DUET_INLINE Call(const AttentionArgs& args)
        : rows(args), a(args), dims(rows.dims), q(rows.rest), panel(q + rows.n_rows * dims) {}

    void run() {
      pack_queries();
      rows.for_segments([&](size_t begin, size_t t0, size_t t1) { segment(begin, t0, t1); });
    }

   private:
    // By row groups: [head_dim, R] each, times the scale.
    void pack_queries() {
      const float scale = rows.query_scale();
      Base::template for_row_groups<kMaxRows>(rows.n_rows, [&](auto n, size_t r0) {
        constexpr size_t kR = n();
        const float* from[kR];
        for (size_t r = 0; r < kR; ++r) from[r] = rows.query(r0 + r);
        float* to = q + r0 * a.head_dim;
        for (size_t i = 0; i < a.head_dim; ++i)
          for (size_t r = 0; r < kR; ++r) to[i * kR + r] = from[r][i] * scale;
      });
    }

    // Tokens [t0, t1) see keys of the segment that starts at position `begin`.
    void segment(size_t begin, size_t t0, size_t t1) {
      const std::byte* keys = a.kv.keys + begin / kKvSegment * a.kv.segment_bytes;
      const std::byte* values = a.kv.values + begin / kKvSegment * a.kv.segment_bytes;
      const size_t lo = rows.range(begin, t0).lo, hi = rows.range(begin, t1 - 1).hi;
      score(keys, values + lo * a.kv.value_row_bytes, lo / kKvBlock, (hi + kKvBlock - 1) / kKvBlock,
            t0 * a.group, t1 * a.group);
      rows.weigh(begin, t0, t1);
      for (size_t i = t0 * a.group * dims; i < t1 * a.group * dims; i += kWidth)
        store(rows.part + i, Batch(0.0f));
      if (converts()) convert_values(values, lo, hi);
      mix_tokens(values, begin, t0, t1);
    }

    bool converts() const { return rows.n_rows >= Base::kManyRows; }

    // Key blocks [b0, b1) against the row groups that touch rows [r0, r1).
    void score(const std::byte* keys, const std::byte* values, size_t b0, size_t b1, size_t r0,
               size_t r1) {
      if (!converts()) return score_blocks<T, true>(keys, a.kv.key_block_bytes, values, b0, b1, r0, r1);
      if (std::is_same_v<T, F32>)
        return score_blocks<F32, false>(keys, a.kv.key_block_bytes, values, b0, b1, r0, r1);
      const size_t block_bytes = a.head_dim * kKvBlock * sizeof(float);
      auto* converted = reinterpret_cast<std::byte*>(panel);
      for (size_t b = b0; b < b1; ++b)
        convert_block(keys + b * a.kv.key_block_bytes, panel + b * a.head_dim * kKvBlock);
      score_blocks<F32, false>(converted, block_bytes, values, b0, b1, r0, r1);
    }

    void convert_block(const std::byte* block, float* to) {
      for (size_t g = 0; g < a.head_dim; g += T::kGroup, block += T::kGroupBytes) {
        for (size_t j = 0; j < T::kGroup; ++j, to += kKvBlock)
          for (size_t v = 0; v < kVecs; ++v) store(to + v * kWidth, T::keys(block, j, v));
      }
    }

    // A few blocks stay in the L1 cache while all rows pass over them.
    template <class Keys, bool kFetch>
    void score_blocks(const std::byte* keys, size_t block_bytes, const std::byte* values, size_t b0,
                      size_t b1, size_t r0, size_t r1) {
      const size_t step = converts() ? 2 : 4;
      for (size_t b = b0; b < b1; b += step) {
        const size_t end = b + step < b1 ? b + step : b1;
        const std::byte* next = end < b1 ? keys + end * block_bytes : values;
        Base::template for_row_groups<kMaxRows>(rows.n_rows, [&](auto n, size_t r) {
          constexpr size_t kR = n(), kFit = kSums / (kR * kVecs);
          constexpr size_t kB = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
          if (r + kR <= r0 || r >= r1) return;
          const float* queries = q + r * a.head_dim;
          float* out = rows.scores + r * kKvSegment;
          size_t k = b;
          for (; k + kB <= end; k += kB)
            score_tile<Keys, kR, kB, kFetch>(queries, a.head_dim, keys + k * block_bytes,
                                             block_bytes, next + (k - b) * block_bytes,
                                             out + k * kKvBlock);
          for (; k < end; ++k)
            score_tile<Keys, kR, 1, kFetch>(queries, a.head_dim, keys + k * block_bytes, block_bytes,
                                            next + (k - b) * block_bytes, out + k * kKvBlock);
        });
      }
    }

    // Keys that all of tokens [t0, t1) see are shared; before and after them, each token by itself,
    // so that a key a token does not see takes no part in its sums.
    void mix_tokens(const std::byte* values, size_t begin, size_t t0, size_t t1) {
      const size_t lo = rows.range(begin, t1 - 1).lo, hi = rows.range(begin, t0).hi;
      if (lo >= hi) {
        for (size_t t = t0; t < t1; ++t) mix(values, rows.range(begin, t), t, t + 1);
        return;
      }
      if (rows.range(begin, t0).lo < lo)
        for (size_t t = t0; t < t1; ++t) mix(values, {rows.range(begin, t).lo, lo}, t, t + 1);
      mix(values, {lo, hi}, t0, t1);
      if (rows.range(begin, t1 - 1).hi > hi)
        for (size_t t = t0; t < t1; ++t) mix(values, {hi, rows.range(begin, t).hi}, t, t + 1);
    }

    void mix(const std::byte* values, Range keys, size_t t0, size_t t1) {
      const size_t r0 = t0 * a.group, n_rows = (t1 - t0) * a.group;
      if (converts()) {
        for (size_t i = 0; i < dims; i += kSlab) {
          const size_t width = dims - i < kSlab ? dims - i : kSlab;
          const auto* slab = reinterpret_cast<const std::byte*>(panel + i * kKvSegment);
          Base::template for_row_groups<kMaxRows>(n_rows, [&](auto n, size_t r) {
            if (width == kSlab)
              mix_slab<n(), kSlabVecs>(slab, keys, r0 + r, i);
            else
              mix_slab<n(), 1>(slab, keys, r0 + r, i);
          });
        }
        return;
      }
      for (size_t j = keys.lo; j < keys.hi; j += kMixKeys) {
        const size_t end = j + kMixKeys < keys.hi ? j + kMixKeys : keys.hi;
        const std::byte* next = end < keys.hi ? values + end * a.kv.value_row_bytes : rows.next_keys;
        Base::template for_row_groups<kMaxRows>(
            n_rows, [&](auto n, size_t r) { mix_rows<n()>(values, {j, end}, next, r0 + r); });
      }
    }

    template <size_t R, size_t V>
    DUET_INLINE void mix_slab(const std::byte* slab, Range keys, size_t row, size_t i) {
      constexpr size_t kBytes = V * kWidth * sizeof(float);
      mix_tile<F32, R, V, false>(rows.scores + row * kKvSegment + keys.lo, keys.hi - keys.lo,
                                 slab + keys.lo * kBytes, kBytes, 0, nullptr, rows.part + row * dims + i,
                                 dims);
    }

    template <size_t R>
    DUET_INLINE void mix_rows(const std::byte* values, Range keys, const std::byte* next, size_t row) {
      constexpr size_t kFit = kSums / R, kV = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
      const float* p = rows.scores + row * kKvSegment + keys.lo;
      const std::byte* from = values + keys.lo * a.kv.value_row_bytes;
      const size_t n_keys = keys.hi - keys.lo;
      float* o = rows.part + row * dims;
      size_t i = 0;
      for (; i + kV * kWidth <= dims; i += kV * kWidth)
        mix_tile<T, R, kV, true>(p, n_keys, from, a.kv.value_row_bytes, i, next + i * T::kElementBytes,
                                 o + i, dims);
      for (; i < dims; i += kWidth)
        mix_tile<T, R, 1, false>(p, n_keys, from, a.kv.value_row_bytes, i, next, o + i, dims);
    }

    // Positions [lo, hi) into slabs [dims / kSlab][kKvSegment, kSlab]; the last may be one batch wide.
    void convert_values(const std::byte* values, size_t lo, size_t hi) {
      for (size_t i = 0; i < dims; i += kSlab) {
        const size_t width = dims - i < kSlab ? dims - i : kSlab;
        for (size_t j = lo; j < hi; ++j) {
          const std::byte* row = values + j * a.kv.value_row_bytes;
          for (size_t k = 0; k < width; k += kWidth)
            store(panel + i * kKvSegment + j * width + k,
                  T::values(row, i + k));
        }
      }
    }
  };
};

}  // namespace
}  // namespace duet
