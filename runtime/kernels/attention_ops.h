// Attention of the SIMD tables, written once over xsimd batches (contract: kernels.h).
//
// `Isa` supplies: Arch, kRegisters, load_f16(const void*), load_i8(const void*) and
// broadcast_f16(const void*), each giving a batch of floats, fma(a, b, c) = a b + c and
// fnma(a, b, c) = c - a b, rounded once (xsimd 8 rounds twice on AVX-512).
//
// Scores have keys in the lanes: one chain over the elements of the head per key, whatever shares
// the tile. Mixed values have elements in the lanes: one chain over the keys. Neither needs a sum
// across lanes, so the tile shapes are free to differ between one query and many. Many query rows
// first convert a segment to float, which gives the same values that few rows convert as they load.
#pragma once

#include <xsimd/xsimd.hpp>

#include "runtime/kernels/matmul_tiles.h"

namespace duet {
namespace {

template <class Isa>
struct AttentionOps {
  using Batch = xsimd::batch<float, typename Isa::Arch>;
  using IntBatch = xsimd::batch<int32_t, typename Isa::Arch>;
  static constexpr size_t kWidth = sizeof(typename Batch::register_type) / sizeof(float);
  static constexpr size_t kVecs = kKvBlock / kWidth;  // batches of one key block
  // Sums held in registers; the others hold keys, values and a broadcast query or weight.
  static constexpr size_t kSums = Isa::kRegisters - Isa::kRegisters / 4;
  static constexpr size_t kMaxRows = kSums / (kVecs > 2 ? kVecs : 2);
  static constexpr size_t kSlabVecs = 2;  // batches of a row in converted values
  static constexpr size_t kSlab = kSlabVecs * kWidth;
  // From here on converting a segment once is cheaper than converting it per pass.
  static constexpr size_t kConvertRows = 2 * kMaxRows;
  // Values that stay in the L1 cache while all rows and elements pass over them.
  static constexpr size_t kMixKeys = 32;

  static DUET_INLINE Batch load(const void* p) {
    return Batch::load_unaligned(static_cast<const float*>(p));
  }
  static DUET_INLINE void store(float* p, Batch v) { v.store_unaligned(p); }

  // ---- element types --------------------------------------------------------------------------
  // Keys: kGroup elements of 16 keys from `group`, of which kLine fill a cache line; values: kWidth
  // elements of a row from element i.
  struct F32 {
    static constexpr size_t kGroup = 1, kGroupBytes = 4 * kKvBlock, kLine = 1, kElementBytes = 4;
    struct Scales {};
    static DUET_INLINE Scales scales(const std::byte*, size_t) { return {}; }
    static DUET_INLINE Batch keys(const std::byte* group, size_t, size_t v, Scales) {
      return load(group + 4 * v * kWidth);
    }
    static DUET_INLINE Batch scale(const std::byte*, size_t) { return Batch(1.0f); }
    static DUET_INLINE Batch values(const std::byte* row, size_t i, Batch) {
      return load(row + 4 * i);
    }
  };
  struct F16 {
    static constexpr size_t kGroup = 2, kGroupBytes = 2 * kGroup * kKvBlock, kLine = 2, kElementBytes = 2;
    struct Scales {};
    static DUET_INLINE Scales scales(const std::byte*, size_t) { return {}; }
    static DUET_INLINE Batch keys(const std::byte* group, size_t j, size_t v, Scales) {
      return Isa::load_f16(group + 2 * (j * kKvBlock + v * kWidth));
    }
    static DUET_INLINE Batch scale(const std::byte*, size_t) { return Batch(1.0f); }
    static DUET_INLINE Batch values(const std::byte* row, size_t i, Batch) {
      return Isa::load_f16(row + 2 * i);
    }
  };
  // int8 times a half-precision scale: 19 bits, so the product is exact.
  struct Q8 {
    static constexpr size_t kGroup = 32, kGroupBytes = (2 + kGroup) * kKvBlock, kLine = 4,
                            kElementBytes = 1;
    using Scales = Batch;
    static DUET_INLINE Scales scales(const std::byte* group, size_t v) {
      return Isa::load_f16(group + 2 * v * kWidth);
    }
    static DUET_INLINE Batch keys(const std::byte* group, size_t j, size_t v, Scales scale) {
      return Isa::load_i8(group + (2 + j) * kKvBlock + v * kWidth) * scale;
    }
    static DUET_INLINE Batch scale(const std::byte* row, size_t i) {
      return Isa::broadcast_f16(row + i / 32 * sizeof(BlockQ8_0));
    }
    static DUET_INLINE Batch values(const std::byte* row, size_t i, Batch scale) {
      return Isa::load_i8(row + i / 32 * sizeof(BlockQ8_0) + 2 + i % 32) * scale;
    }
  };

  // ---- tiles ----------------------------------------------------------------------------------
  // Calls f(integral_constant<R>, first row) so that the rows of all calls are [0, n).
  template <class F>
  static DUET_INLINE void for_row_groups(size_t n, const F& f) {
    size_t r = 0;
    for (; r + kMaxRows <= n; r += kMaxRows) f(std::integral_constant<size_t, kMaxRows>{}, r);
    const auto rest = [&](auto rows) {
      if constexpr (rows() < kMaxRows) {
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

  // Few rows wait for memory: while they work on some blocks or rows, they fetch those of `next`, as
  // one stream into the L2 cache: the L1 cache has too few misses in flight (14 against 19 GB/s).
  static DUET_INLINE void prefetch(const std::byte* p) { __builtin_prefetch(p, 0, 2); }

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
      typename T::Scales scales[kV];
#pragma GCC unroll 16
      for (size_t v = 0; v < kV; ++v)
        scales[v] = T::scales(block + v / kVecs * block_bytes, v % kVecs);
      for (size_t line = 0; line < T::kGroup; line += T::kLine) {
        for (size_t b = 0; kFetch && b < B; ++b, next += 64) prefetch(next);
#pragma GCC unroll 4
        for (size_t j = line; j < line + T::kLine; ++j, q += R) {
          Batch keys[kV];
#pragma GCC unroll 16
          for (size_t v = 0; v < kV; ++v)
            keys[v] = T::keys(block + v / kVecs * block_bytes, j, v % kVecs, scales[v]);
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
        for (size_t b = 0; b < V * kWidth * T::kElementBytes; b += 64) prefetch(next + b);
        next += row_bytes;
      }
      Batch values[V], scale(1.0f);
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v) {
        if (v * kWidth % 32 == 0) scale = T::scale(row, element + v * kWidth);
        values[v] = T::values(row, element + v * kWidth, scale);
      }
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

  // ---- softmax --------------------------------------------------------------------------------
  // e^x for x <= 0, 0 below -86, NaN for NaN; e^0 = 1. x = n ln 2 + r, e^r by its Taylor series to
  // the 6th power (|r| <= 0.35: error 1.2e-7 of it at most), 2^n into the exponent.
  static DUET_INLINE Batch exp_negative(Batch x) {
    const Batch floor(-86.0f), magic(0x1.8p23f);
    const Batch y = xsimd::max(floor, x);  // in this order NaN passes
    const Batch t = Isa::fma(y, Batch(1.44269504f), magic), n = t - magic;
    Batch r = Isa::fnma(n, Batch(0.693145752f), y);
    r = Isa::fnma(n, Batch(1.42860677e-6f), r);
    Batch e = Isa::fma(r, Batch(1.0f / 720), Batch(1.0f / 120));
    e = Isa::fma(r, e, Batch(1.0f / 24));
    e = Isa::fma(r, e, Batch(1.0f / 6));
    e = Isa::fma(r, e, Batch(0.5f));
    e = Isa::fma(r, e, Batch(1.0f));
    e = Isa::fma(r, e, Batch(1.0f));
    const IntBatch bits = xsimd::bitwise_cast<IntBatch>(e) + (xsimd::bitwise_cast<IntBatch>(t) << 23);
    return xsimd::select(x < floor, Batch(0.0f), xsimd::bitwise_cast<Batch>(bits));
  }

  static DUET_INLINE Batch lane_numbers() {
    float lanes[kWidth];
    for (size_t i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
    return load(lanes);
  }

  struct Stats {
    float max, sum;
  };
  // Scores s[lo, hi) of a segment become exp(s - max); the others of their blocks become 0. Sums of
  // keys 16 apart first, then these as a tree.
  static DUET_INLINE Stats softmax(float* s, size_t lo, size_t hi) {
    constexpr float kLowest = -3.4028235e38f;
    const Batch lanes = lane_numbers(), low(static_cast<float>(lo)), high(static_cast<float>(hi));
    const auto seen = [&](size_t j) {
      const Batch key = lanes + Batch(static_cast<float>(j));
      return (key >= low) & (key < high);
    };
    const size_t begin = lo / kKvBlock * kKvBlock;
    Batch top(kLowest);
    for (size_t j = begin; j < hi; j += kWidth)
      top = xsimd::max(top, xsimd::select(seen(j), load(s + j), Batch(kLowest)));
    float lane[kKvBlock], max = kLowest;
    store(lane, top);
    for (size_t i = 0; i < kWidth; ++i) max = lane[i] > max ? lane[i] : max;
    Batch sums[kVecs];
    for (size_t v = 0; v < kVecs; ++v) sums[v] = Batch(0.0f);
    for (size_t j = begin; j < hi; j += kKvBlock) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVecs; ++v) {
        float* p = s + j + v * kWidth;
        const Batch e = exp_negative(load(p) - Batch(max));
        const Batch weight = xsimd::select(seen(j + v * kWidth), e, Batch(0.0f));
        store(p, weight);
        sums[v] += weight;
      }
    }
    for (size_t v = 0; v < kVecs; ++v) store(lane + v * kWidth, sums[v]);
    for (size_t step = kKvBlock / 2; step > 0; step /= 2)
      for (size_t i = 0; i < step; ++i) lane[i] += lane[i + step];
    return {max, lane[0]};
  }

  // ---- one call -------------------------------------------------------------------------------
  // Keys that each token sees of the segment in work, from its first position.
  struct Range {
    size_t lo, hi;
  };

  template <class T>
  struct Call {
    const AttentionArgs& a;
    size_t n_rows, dims, row_floats;  // dims: head_dim in whole batches
    float *q, *scores, *panel, *part;
    const std::byte* next_keys = nullptr;  // of the segment after the one in work
    Stats* stats;

    explicit DUET_INLINE Call(const AttentionArgs& args)
        : a(args),
          n_rows(args.n_tokens * args.group),
          dims(attention_row_dims(args.head_dim)),
          row_floats(dims + 16),
          q(args.scratch),
          scores(q + n_rows * dims),
          panel(scores + n_rows * kKvSegment),
          part(panel + dims * kKvSegment),
          stats(reinterpret_cast<Stats*>(part + n_rows * dims)) {}

    void run() {
      pack_queries();
      for (size_t row = 0; row < n_rows; ++row) a.out[row * row_floats + dims] = -__builtin_inff();
      for (size_t begin = a.key_begin; begin < a.key_end; begin += kKvSegment) {
        size_t t0 = 0, t1 = a.n_tokens;
        while (t0 < t1 && empty(range(begin, t0))) ++t0;
        while (t0 < t1 && empty(range(begin, t1 - 1))) --t1;
        if (t0 < t1) segment(begin, t0, t1);
      }
    }

   private:
    static bool empty(Range range) { return range.lo >= range.hi; }

    Range range(size_t begin, size_t token) const {
      const size_t end = a.first + token + 1;
      const size_t first = a.window > 0 && end > a.window ? end - a.window : 0;
      const size_t stop = end < a.key_end ? end : a.key_end;
      if (stop <= begin || first >= begin + kKvSegment) return {0, 0};
      return {first > begin ? first - begin : 0,
              stop - begin < kKvSegment ? stop - begin : kKvSegment};
    }

    // By row groups: [head_dim, R] each, times the scale.
    void pack_queries() {
      for_row_groups(n_rows, [&](auto rows, size_t r0) {
        constexpr size_t kR = rows();
        const float* from[kR];
        for (size_t r = 0; r < kR; ++r)
          from[r] = a.q + (r0 + r) / a.group * a.q_stride + (r0 + r) % a.group * a.head_dim;
        float* to = q + r0 * a.head_dim;
        for (size_t i = 0; i < a.head_dim; ++i)
          for (size_t r = 0; r < kR; ++r) to[i * kR + r] = from[r][i] * a.scale;
      });
    }

    // Tokens [t0, t1) see keys of the segment that starts at position `begin`.
    void segment(size_t begin, size_t t0, size_t t1) {
      const size_t index = begin / kKvSegment;
      const std::byte* keys = a.kv.keys + index * a.kv.segment_bytes;
      const std::byte* values = a.kv.values + index * a.kv.segment_bytes;
      const size_t lo = range(begin, t0).lo, hi = range(begin, t1 - 1).hi;
      const bool last = begin + kKvSegment >= a.key_end || begin + hi == a.first + a.n_tokens;
      next_keys = last ? keys : keys + a.kv.segment_bytes;
      score(keys, values + lo * a.kv.value_row_bytes, lo / kKvBlock, (hi + kKvBlock - 1) / kKvBlock,
            t0 * a.group, t1 * a.group);
      for (size_t row = t0 * a.group; row < t1 * a.group; ++row) {
        const Range seen = range(begin, row / a.group);
        stats[row] = softmax(scores + row * kKvSegment, seen.lo, seen.hi);
        for (size_t i = 0; i < dims; i += kWidth) store(part + row * dims + i, Batch(0.0f));
      }
      if (converts()) convert_values(values, lo, hi);
      mix_tokens(values, begin, t0, t1);
      for (size_t row = t0 * a.group; row < t1 * a.group; ++row) merge(row);
    }

    bool converts() const { return n_rows >= kConvertRows; }

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
        typename T::Scales scales[kVecs];
        for (size_t v = 0; v < kVecs; ++v) scales[v] = T::scales(block, v);
        for (size_t j = 0; j < T::kGroup; ++j, to += kKvBlock)
          for (size_t v = 0; v < kVecs; ++v) store(to + v * kWidth, T::keys(block, j, v, scales[v]));
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
        for_row_groups(n_rows, [&](auto rows, size_t r) {
          constexpr size_t kR = rows(), kFit = kSums / (kR * kVecs);
          constexpr size_t kB = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
          if (r + kR <= r0 || r >= r1) return;
          const float* queries = q + r * a.head_dim;
          float* out = scores + r * kKvSegment;
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
      const size_t lo = range(begin, t1 - 1).lo, hi = range(begin, t0).hi;
      if (lo >= hi) {
        for (size_t t = t0; t < t1; ++t) mix(values, range(begin, t), t, t + 1);
        return;
      }
      if (range(begin, t0).lo < lo)
        for (size_t t = t0; t < t1; ++t) mix(values, {range(begin, t).lo, lo}, t, t + 1);
      mix(values, {lo, hi}, t0, t1);
      if (range(begin, t1 - 1).hi > hi)
        for (size_t t = t0; t < t1; ++t) mix(values, {hi, range(begin, t).hi}, t, t + 1);
    }

    void mix(const std::byte* values, Range keys, size_t t0, size_t t1) {
      const size_t r0 = t0 * a.group, n = (t1 - t0) * a.group;
      if (converts()) {
        for (size_t i = 0; i < dims; i += kSlab) {
          const size_t width = dims - i < kSlab ? dims - i : kSlab;
          const auto* slab = reinterpret_cast<const std::byte*>(panel + i * kKvSegment);
          for_row_groups(n, [&](auto rows, size_t r) {
            if (width == kSlab)
              mix_slab<rows(), kSlabVecs>(slab, keys, r0 + r, i);
            else
              mix_slab<rows(), 1>(slab, keys, r0 + r, i);
          });
        }
        return;
      }
      for (size_t j = keys.lo; j < keys.hi; j += kMixKeys) {
        const size_t end = j + kMixKeys < keys.hi ? j + kMixKeys : keys.hi;
        const std::byte* next = end < keys.hi ? values + end * a.kv.value_row_bytes : next_keys;
        for_row_groups(
            n, [&](auto rows, size_t r) { mix_rows<rows()>(values, {j, end}, next, r0 + r); });
      }
    }

    template <size_t R, size_t V>
    DUET_INLINE void mix_slab(const std::byte* slab, Range keys, size_t row, size_t i) {
      constexpr size_t kBytes = V * kWidth * sizeof(float);
      mix_tile<F32, R, V, false>(scores + row * kKvSegment + keys.lo, keys.hi - keys.lo,
                                 slab + keys.lo * kBytes, kBytes, 0, nullptr, part + row * dims + i,
                                 dims);
    }

    template <size_t R>
    DUET_INLINE void mix_rows(const std::byte* values, Range keys, const std::byte* next, size_t row) {
      constexpr size_t kFit = kSums / R, kV = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
      const float* p = scores + row * kKvSegment + keys.lo;
      const std::byte* from = values + keys.lo * a.kv.value_row_bytes;
      const size_t n = keys.hi - keys.lo;
      float* o = part + row * dims;
      size_t i = 0;
      for (; i + kV * kWidth <= dims; i += kV * kWidth)
        mix_tile<T, R, kV, true>(p, n, from, a.kv.value_row_bytes, i, next + i * T::kElementBytes,
                                 o + i, dims);
      for (; i < dims; i += kWidth)
        mix_tile<T, R, 1, false>(p, n, from, a.kv.value_row_bytes, i, next, o + i, dims);
    }

    // Positions [lo, hi) into slabs [dims / kSlab][kKvSegment, kSlab]; the last may be one batch wide.
    void convert_values(const std::byte* values, size_t lo, size_t hi) {
      for (size_t i = 0; i < dims; i += kSlab) {
        const size_t width = dims - i < kSlab ? dims - i : kSlab;
        for (size_t j = lo; j < hi; ++j) {
          const std::byte* row = values + j * a.kv.value_row_bytes;
          for (size_t k = 0; k < width; k += kWidth)
            store(panel + i * kKvSegment + j * width + k,
                  T::values(row, i + k, T::scale(row, i + k)));
        }
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
      const Batch old_factor = exp_negative(Batch(out[dims] - max));
      const Batch factor = exp_negative(Batch(seg.max - max));
      for (size_t i = 0; i < dims; i += kWidth)
        store(out + i, Isa::fma(load(o + i), factor, load(out + i) * old_factor));
      const Batch sum = Isa::fma(Batch(seg.sum), factor, Batch(out[dims + 1]) * old_factor);
      float lanes[kWidth];
      store(lanes, sum);
      out[dims] = max;
      out[dims + 1] = lanes[0];
    }
  };

  static void attention(const AttentionArgs& args) noexcept {
    if (args.kv.type == DType::F32) Call<F32>(args).run();
    if (args.kv.type == DType::F16) Call<F16>(args).run();
    if (args.kv.type == DType::Q8_0) Call<Q8>(args).run();
  }

  static void add_to(KernelTable& table) { table.attention = attention; }
};

}  // namespace
}  // namespace duet
