// Attention over 8-bit keys and values (contract: kernels.h, "8-bit"): integer products of 16-bit
// queries and weights, over xsimd batches and the integer registers of `Isa`:
//   using Int = a register of kWidth 32-bit or 2 * kWidth 16-bit lanes
//   widen(p): 2 * kWidth bytes to 16 bits; pair(int32): one pair of 16 bits in all lanes;
//   dot(acc, a, b): acc + products of pairs; zero(); to_float(Int); load_f16(p);
//   store_low16(p, a, b): the low 16 bits of the lanes of a, then of b.
// Integer sums are exact, so the order of keys and tile shapes are free, and a key of weight 0
// takes no part.
#pragma once

#include "runtime/kernels/attention_rows.h"

namespace duet {
namespace {

template <class Isa>
struct AttentionQ8 {
  using Base = AttentionRows<Isa>;
  using Batch = typename Base::Batch;
  using UintBatch = xsimd::batch<uint32_t, typename Isa::Arch>;
  using Int = typename Isa::Int;
  using Range = typename Base::Range;
  static constexpr size_t kWidth = Base::kWidth, kVecs = Base::kVecs;
  // Sums held in registers: more, and GCC moves them about.
  static constexpr size_t kSums = Isa::kRegisters / 2;
  static constexpr size_t kMaxRows = kSums / (kVecs > 2 ? kVecs : 2);
  static constexpr size_t kGroup = 32, kPairs = kGroup / 2, kGroupBytes = (2 + kGroup) * kKvBlock;
  static constexpr size_t kValueBytes = kGroup * kKvSegment;  // of a group in a segment
  static constexpr float kMagic = 0x1.8p23f;                  // x + kMagic rounds to an integer

  static DUET_INLINE Batch load(const void* p) { return Base::load(p); }
  static DUET_INLINE void store(float* p, Batch v) { Base::store(p, v); }

  // Scores of R rows (pairs of elements q [head_dim / 2, R], times `units`) against B key blocks; row
  // r at out + r * kKvSegment.
  template <size_t R, size_t B, bool kFetch>
  static DUET_INLINE void score_tile(const int32_t* q, const float* units, size_t head_dim,
                                     const std::byte* block, size_t block_bytes,
                                     const std::byte* next, float* out) {
    constexpr size_t kV = B * kVecs;
    for (size_t g = 0; g < head_dim; g += kGroup, block += kGroupBytes) {
      Int acc[R][kV];
#pragma GCC unroll 16
      for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (size_t v = 0; v < kV; ++v) acc[r][v] = Isa::zero();
      if (kFetch) {
        for (size_t i = 0; i < (B + 2) / 2; ++i) Base::prefetch(next + i * 64);
        next += B * 32;
      }
      const std::byte* pairs = block + 2 * kKvBlock;
      for (size_t j = 0; j < kPairs; ++j, q += R, pairs += 2 * kKvBlock) {
        if (kFetch) {
          for (size_t i = 0; i < B * 32; i += 64) Base::prefetch(next + i);
          next += B * 32;
        }
        Int keys[kV];
#pragma GCC unroll 16
        for (size_t v = 0; v < kV; ++v)
          keys[v] = Isa::widen(pairs + v / kVecs * block_bytes + v % kVecs * 2 * kWidth);
#pragma GCC unroll 16
        for (size_t r = 0; r < R; ++r) {
          const Int query = Isa::pair(q[r]);
#pragma GCC unroll 16
          for (size_t v = 0; v < kV; ++v) acc[r][v] = Isa::dot(acc[r][v], keys[v], query);
        }
      }
#pragma GCC unroll 16
      for (size_t v = 0; v < kV; ++v) {
        const Batch d = Isa::load_f16(block + v / kVecs * block_bytes + v % kVecs * 2 * kWidth);
#pragma GCC unroll 16
        for (size_t r = 0; r < R; ++r) {
          float* to = out + r * kKvSegment + v * kWidth;
          const Batch sum = Isa::fma(Isa::to_float(acc[r][v]), d, g == 0 ? Batch(0.0f) : load(to));
          store(to, g + kGroup == head_dim ? sum * Batch(units[r]) : sum);
        }
      }
    }
  }

  // o[r][i] = units[r] * sum over key pairs of weights [R, kKvSegment] times values [pair][kGroup][2];
  // R rows, V batches of elements.
  template <size_t R, size_t V, bool kFetch>
  static DUET_INLINE void mix_tile(const int16_t* weights, size_t n_pairs, const std::byte* values,
                                   const std::byte* next, const float* units, float* o,
                                   size_t o_stride) {
    Int acc[R][V];
#pragma GCC unroll 16
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v) acc[r][v] = Isa::zero();
    for (size_t j = 0; j < n_pairs; ++j, values += 2 * kGroup, weights += 2) {
      if (kFetch) Base::prefetch(next + j * 2 * kGroup);
      Int wide[V];
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v) wide[v] = Isa::widen(values + v * 2 * kWidth);
#pragma GCC unroll 16
      for (size_t r = 0; r < R; ++r) {
        int32_t two;
        __builtin_memcpy(&two, weights + r * kKvSegment, sizeof two);
        const Int weight = Isa::pair(two);
#pragma GCC unroll 16
        for (size_t v = 0; v < V; ++v) acc[r][v] = Isa::dot(acc[r][v], wide[v], weight);
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (size_t v = 0; v < V; ++v)
        store(o + r * o_stride + v * kWidth, Batch(Isa::to_float(acc[r][v])) * Batch(units[r]));
  }

  struct Call {
    typename Base::Rows rows;
    const AttentionArgs& a;
    size_t n_groups;
    int32_t* q;               // by row groups: [head_dim / 2, R]
    float *q_units, *units;   // [n_rows]: of queries, of weights
    float *scales, *largest;  // [n_groups, kKvSegment], [kKvSegment]
    int16_t* weights;         // of a group: [n_rows, kKvSegment]

    explicit DUET_INLINE Call(const AttentionArgs& args)
        : rows(args),
          a(args),
          n_groups(args.head_dim / kGroup),
          q(reinterpret_cast<int32_t*>(rows.rest)),
          q_units(rows.rest + rows.n_rows * args.head_dim / 2),
          units(q_units + rows.n_rows),
          scales(units + rows.n_rows),
          largest(scales + n_groups * kKvSegment),
          weights(reinterpret_cast<int16_t*>(largest + kKvSegment)) {}

    void run() {
      Base::template for_row_groups<kMaxRows>(rows.n_rows, [&](auto n, size_t r0) {
        for (size_t r = 0; r < n(); ++r)
          pack_query(rows.query(r0 + r), q + r0 * a.head_dim / 2 + r, n(), q_units + r0 + r);
      });
      const bool many = rows.n_rows >= Base::kManyRows;
      rows.for_segments([&](size_t begin, size_t t0, size_t t1) {
        if (many)
          segment<false>(begin, t0, t1);
        else
          segment<true>(begin, t0, t1);
      });
    }

   private:
    // 16-bit integers with one unit for the row; a query that is not finite gets the unit NaN.
    void pack_query(const float* from, int32_t* to, size_t stride, float* unit) const {
      const Batch scale(rows.query_scale());
      Batch top(0.0f), poison(0.0f);
      for (size_t i = 0; i < a.head_dim; i += kWidth) {
        const Batch x = load(from + i) * scale;
        top = xsimd::max(top, xsimd::abs(x));
        poison += x * Batch(0.0f);
      }
      const float max = Isa::lane_max(top) + Isa::lane_sum(poison);
      const Batch factor(max >= kActFloor ? 32767.0f / max : 0.0f);
      *unit = max / 32767.0f;
      for (size_t i = 0; i < a.head_dim; i += kWidth) {
        float integers[kWidth];
        store(integers, Isa::fma(load(from + i) * scale, factor, Batch(kMagic)));
        for (size_t k = 0; k < kWidth; k += 2) {
          uint32_t low, high;
          __builtin_memcpy(&low, integers + k, sizeof low);
          __builtin_memcpy(&high, integers + k + 1, sizeof high);
          to[(i + k) / 2 * stride] = static_cast<int32_t>((low & 0xffffu) | high << 16);
        }
      }
    }

    template <bool kFetch>
    void segment(size_t begin, size_t t0, size_t t1) {
      const size_t offset = begin / kKvSegment * a.kv.segment_bytes;
      const size_t lo = rows.range(begin, t0).lo, hi = rows.range(begin, t1 - 1).hi;
      const Range blocks{lo / kKvBlock, (hi + kKvBlock - 1) / kKvBlock};
      score<kFetch>(a.kv.keys + offset, a.kv.values + offset, blocks, t0 * a.group, t1 * a.group);
      rows.weigh(begin, t0, t1);
      load_scales(a.kv.values + offset, blocks, hi);
      for (size_t row = t0 * a.group; row < t1 * a.group; ++row)
        scale_weights(row, rows.range(begin, row / a.group), blocks);
      for (size_t g = 0; g < n_groups; ++g)
        mix_group<kFetch>(a.kv.values + offset, g, blocks, t0 * a.group, t1 * a.group);
    }

    // Key blocks against the row groups that touch rows [r0, r1); a few blocks stay in the L1 cache
    // while all rows pass over them.
    template <bool kFetch>
    void score(const std::byte* keys, const std::byte* values, Range blocks, size_t r0, size_t r1) {
      const size_t block_bytes = a.kv.key_block_bytes;
      for (size_t b = blocks.lo; b < blocks.hi; b += 4) {
        const size_t end = b + 4 < blocks.hi ? b + 4 : blocks.hi;
        const std::byte* next = end < blocks.hi ? keys + end * block_bytes : values;
        Base::template for_row_groups<kMaxRows>(rows.n_rows, [&](auto n, size_t r) {
          constexpr size_t kR = n(), kFit = kSums / (kR * kVecs);
          constexpr size_t kB = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
          if (r + kR <= r0 || r >= r1) return;
          const auto tile = [&](auto n_blocks, size_t k) {
            score_tile<kR, n_blocks(), kFetch>(q + r * a.head_dim / 2, q_units + r, a.head_dim,
                                               keys + k * block_bytes, block_bytes,
                                               next + (k - b) * block_bytes,
                                               rows.scores + r * kKvSegment + k * kKvBlock);
          };
          size_t k = b;
          for (; k + kB <= end; k += kB) tile(std::integral_constant<size_t, kB>{}, k);
          for (; k < end; ++k) tile(std::integral_constant<size_t, 1>{}, k);
        });
      }
    }

    // The larger of numbers that are not negative by their bits: NaN is the largest.
    static DUET_INLINE Batch larger(Batch a, Batch b) {
      return xsimd::bitwise_cast<Batch>(xsimd::max(xsimd::bitwise_cast<UintBatch>(a), xsimd::bitwise_cast<UintBatch>(b)));
    }
    static DUET_INLINE float largest_lane(Batch v) {
      uint32_t lanes[kWidth], top = 0;
      xsimd::bitwise_cast<UintBatch>(v).store_unaligned(lanes);
      for (const uint32_t lane : lanes) top = lane > top ? lane : top;
      float out;
      __builtin_memcpy(&out, &top, sizeof out);
      return out;
    }

    // Scales of the values as floats, and the largest over the groups. Positions from hi on may never
    // have been written.
    void load_scales(const std::byte* values, Range blocks, size_t hi) {
      for (size_t j = blocks.lo * kKvBlock; j < blocks.hi * kKvBlock; j += kWidth) {
        const bool whole = j + kWidth <= hi;
        Batch top(0.0f);
        for (size_t g = 0; g < n_groups; ++g) {
          Batch d = Isa::load_f16(values + 2 * (g * kKvSegment + j));
          if (!whole) d = Base::at_seen(j, 0, hi, d, Batch(0.0f));
          store(scales + g * kKvSegment + j, d);
          top = larger(top, d);
        }
        store(largest + j, top);
      }
    }

    // Weights of a row get the factor by which they, times scales, become 16-bit integers, the largest
    // of them 32767. Blocks without keys that the row sees get weight 0.
    void scale_weights(size_t row, Range seen, Range blocks) {
      float* p = rows.scores + row * kKvSegment;
      const size_t begin = seen.lo / kKvBlock * kKvBlock;
      const size_t end = (seen.hi + kKvBlock - 1) / kKvBlock * kKvBlock;
      const Batch zero(0.0f);
      for (size_t j = blocks.lo * kKvBlock; j < begin; j += kWidth) store(p + j, zero);
      for (size_t j = end; j < blocks.hi * kKvBlock; j += kWidth) store(p + j, zero);
      Batch top = zero;
      for (size_t j = begin; j < end; j += kWidth) {
        const Batch weight = load(p + j), x = weight * load(largest + j);
        top = larger(top, xsimd::select(weight == zero, zero, x));
      }
      const float max = largest_lane(top);
      const Batch factor(max >= kActFloor ? 32767.0f / max : 0.0f);
      for (size_t j = begin; j < end; j += kWidth) store(p + j, load(p + j) * factor);
      units[row] = max / 32767.0f;
    }

    // Elements of group g of rows [r0, r1).
    template <bool kFetch>
    void mix_group(const std::byte* values, size_t g, Range blocks, size_t r0, size_t r1) {
      const size_t j0 = blocks.lo * kKvBlock, j1 = blocks.hi * kKvBlock;
      for (size_t row = r0; row < r1; ++row) {
        for (size_t j = j0 / (2 * kWidth) * (2 * kWidth); j < j1; j += 2 * kWidth) {
          const auto integers = [&](size_t k) {
            return Isa::fma(load(rows.scores + row * kKvSegment + k),
                            load(scales + g * kKvSegment + k), Batch(kMagic));
          };
          // Both ends may lie outside the blocks, never outside the segment; nobody reads them.
          Isa::store_low16(weights + row * kKvSegment + j, integers(j), integers(j + kWidth));
        }
      }
      const std::byte* group = values + n_groups * 2 * kKvSegment + g * kValueBytes + j0 * kGroup;
      const std::byte* next = g + 1 < n_groups ? group + kValueBytes : rows.next_keys;
      Base::template for_row_groups<kMaxRows>(r1 - r0, [&](auto n, size_t r) {
        constexpr size_t kR = n(), kAll = kGroup / kWidth, kFit = kSums / kR;
        constexpr size_t kV = kFit < kAll ? (kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1) : kAll;
        const size_t row = r0 + r;
        float* o = rows.part + row * rows.dims + g * kGroup;
        mix_tile<kR, kV, kFetch>(weights + row * kKvSegment + j0, (j1 - j0) / 2, group, next,
                                 units + row, o, rows.dims);
        for (size_t v = kV; v < kAll; v += kV)
          mix_tile<kR, kV, false>(weights + row * kKvSegment + j0, (j1 - j0) / 2,
                                  group + v * 2 * kWidth, next, units + row, o + v * kWidth, rows.dims);
      });
    }
  };
};

}  // namespace
}  // namespace duet
