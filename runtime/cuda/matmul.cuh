// Matrix products. Two ways with the same bits: for few slots of a matrix each warp reads its rows once for up to
// eight of them; for many, tiles of rows and slots meet in shared memory and are multiplied by integer tensor cores.
//
// The bits are those of the scalar kernels (runtime/kernels/kernels.h): exact integer sums of a block, and one chain of
// fused multiply-adds in block order, done for each output by one lane.
#pragma once

#include <algorithm>

#include "runtime/cuda/blocks.cuh"
#include "runtime/cuda/operations.h"

namespace duet::gpu {
namespace device {

struct Args {
  const uint8_t* const* w;
  const int32_t *first, *token;
  const uint8_t* x;
  float* y;
  size_t row_bytes, x_row_bytes, y_stride;
  uint32_t n_matrices, rows, n_units, n;
  bool add;
};

constexpr uint32_t kFewSlots = 8;

// ---- which matrix and slots a block of threads works on --------------------------------------------
struct Slots {
  uint32_t matrix = 0, begin = 0, end = 0;
};

// Piece `index` of the slots cut at experts and into pieces of `size`; empty: there are fewer.
__device__ __forceinline__ Slots find_slots(const Args& a, uint32_t index, uint32_t size) {
  if (a.first == nullptr) return {0, index * size, index * size + size < a.n ? index * size + size : a.n};
  for (uint32_t e = 0; e < a.n_matrices; ++e) {
    const auto begin = static_cast<uint32_t>(a.first[e]), end = static_cast<uint32_t>(a.first[e + 1]);
    const uint32_t n_pieces = (end - begin + size - 1) / size;
    if (index < n_pieces) {
      const uint32_t at = begin + index * size;
      return {e, at, at + size < end ? at + size : end};
    }
    index -= n_pieces;
  }
  return {};
}

__device__ __forceinline__ const uint8_t* x_row(const Args& a, uint32_t slot) {
  return a.x + (a.token != nullptr ? static_cast<size_t>(a.token[slot]) : slot) * a.x_row_bytes;
}

__device__ __forceinline__ void store(const Args& a, uint32_t slot, uint32_t row, float value) {
  float& y = a.y[slot * a.y_stride + row];
  y = a.add ? y + value : value;
}

// ---- activations: unit u of a row -------------------------------------------------------------------
struct ActUnit {
  const uint8_t* block;
  const uint32_t* q;
};
template <bool kSuper>
__device__ __forceinline__ ActUnit act_unit(const uint8_t* row, uint32_t u) {
  if (!kSuper) {
    const uint8_t* block = row + size_t{u} * sizeof(BlockAct32);
    return {block, reinterpret_cast<const uint32_t*>(block + 8)};
  }
  const uint8_t* block = row + size_t{u / 8} * sizeof(BlockAct256);
  return {block, reinterpret_cast<const uint32_t*>(block + 4 + u % 8 * 32)};
}
__device__ __forceinline__ float act_d(const uint8_t* block) { return __ldg(reinterpret_cast<const float*>(block)); }
// d times the sum of a block of 32.
__device__ __forceinline__ float act_offset(const uint8_t* block) {
  return act_d(block) * static_cast<float>(__ldg(reinterpret_cast<const int32_t*>(block + 4)));
}
__device__ __forceinline__ int32_t act_bsum(const uint8_t* block, uint32_t group) {
  return __ldg(reinterpret_cast<const int16_t*>(block + 260) + group);
}

// ---- few slots ----------------------------------------------------------------------------------------
constexpr uint32_t kFewWarps = 4, kFewRows = 4;  // rows of a warp

// What a warp needs of 32 units for its rows and slots; entries: blocks.
template <bool kSuper>
struct FewWarp {
  static constexpr uint32_t kEntries = kSuper ? 4 : 32, kPitch = kEntries + 1;
  int32_t dot[kFewRows * kFewSlots][kPitch], min[kSuper ? kFewRows * kFewSlots : 1][kPitch];
  float d[kFewRows][kPitch], m[kFewRows][kPitch], xd[kFewSlots][kPitch], xm[kFewSlots][kPitch];
};

__device__ __forceinline__ int32_t sum_of_8(int32_t v) {
  for (int step = 4; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <class Block>
struct Few {
  using C = Codec<Block>;
  using Shared = FewWarp<C::kSuper>;
  Shared& s;
  const Args& a;
  uint32_t lane, row, n_rows, n_slots;

  // Units of lane `unit` % 32 of the rows to registers, their d and m to shared memory.
  __device__ __forceinline__ void load(const uint8_t* w, uint32_t unit, Unit (&units)[kFewRows]) const {
    const uint32_t per_block = C::kSuper ? 8 : 1, entry = lane / per_block, g = unit % per_block;
#pragma unroll
    for (uint32_t i = 0; i < kFewRows; ++i) {
      units[i] = {};
      if (unit >= a.n_units || i >= n_rows) continue;
      const uint8_t* block = w + (row + i) * a.row_bytes + unit / per_block * sizeof(Block);
      C::unit(block, g, units[i]);
      if (g > 0) continue;
      s.d[i][entry] = C::d(block);
      if (C::kHasMin) s.m[i][entry] = C::m(block);
    }
  }

  // Of slot t: integer products of all rows.
  __device__ __forceinline__ void multiply(const Unit (&units)[kFewRows], const uint8_t* x, uint32_t unit, uint32_t t) const {
    const uint32_t per_block = C::kSuper ? 8 : 1, entry = lane / per_block, g = unit % per_block;
    const ActUnit act = act_unit<C::kSuper>(x, unit);
    const bool active = unit < a.n_units;
    uint32_t q[8] = {};
    if (active) {
      for (uint32_t i = 0; i < 8; ++i) q[i] = __ldg(act.q + i);
      if (g == 0) s.xd[t][entry] = act_d(act.block);
      if (!C::kSuper && C::kHasMin) s.xm[t][entry] = act_offset(act.block);
    }
#pragma unroll
    for (uint32_t i = 0; i < kFewRows; ++i) {
      int32_t dot[2] = {};
      for (uint32_t j = 0; j < 8; ++j) dot[j / 4] = __dp4a(static_cast<int32_t>(units[i].q[j]), static_cast<int32_t>(q[j]), dot[j / 4]);
      if constexpr (C::kSuper) {
        const int32_t sum = sum_of_8(units[i].scale[0] * dot[0] + units[i].scale[1] * dot[1]);
        if (g == 0) s.dot[i * kFewSlots + t][entry] = sum;
        if constexpr (C::kHasMin) {
          int32_t min = 0;
          if (active) min = units[i].min[0] * act_bsum(act.block, 2 * g) + units[i].min[1] * act_bsum(act.block, 2 * g + 1);
          min = sum_of_8(min);
          if (g == 0) s.min[i * kFewSlots + t][entry] = min;
        }
      } else {
        s.dot[i * kFewSlots + t][entry] = dot[0] + dot[1];
      }
    }
  }

  // Of the row and slot of this lane, n blocks further.
  __device__ __forceinline__ float chain(float y, uint32_t n) const {
    const uint32_t i = lane / kFewSlots, t = lane % kFewSlots;
    for (uint32_t e = 0; e < n; ++e) {
      y = __fmaf_rn(static_cast<float>(s.dot[lane][e]), s.d[i][e] * s.xd[t][e], y);
      if constexpr (C::kHasMin && C::kSuper) y = __fmaf_rn(static_cast<float>(s.min[lane][e]), -(s.m[i][e] * s.xd[t][e]), y);
      if constexpr (C::kHasMin && !C::kSuper) y = __fmaf_rn(s.m[i][e], s.xm[t][e], y);
    }
    return y;
  }
};

template <class Block>
__global__ void __launch_bounds__(32 * kFewWarps) multiply_few(Args a) {
  using C = Codec<Block>;
  using Shared = FewWarp<C::kSuper>;
  struct All {
    Shared warps[kFewWarps];
  };
  const Slots slots = find_slots(a, blockIdx.y, kFewSlots);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = (blockIdx.x * kFewWarps + warp) * kFewRows;
  if (slots.begin >= slots.end || row >= a.rows) return;
  const uint32_t n_rows = a.rows - row < kFewRows ? a.rows - row : kFewRows, n_slots = slots.end - slots.begin;
  const Few<Block> few{shared<All>().warps[warp], a, lane, row, n_rows, n_slots};
  const uint8_t* w = a.w[slots.matrix];
  const bool mine = lane / kFewSlots < n_rows && lane % kFewSlots < n_slots;
  const uint32_t per_block = C::kSuper ? 8 : 1;
  float y = 0.0f;
  for (uint32_t first = 0; first < a.n_units; first += 32) {
    Unit units[kFewRows];
    few.load(w, first + lane, units);
    for (uint32_t t = 0; t < n_slots; ++t) few.multiply(units, x_row(a, slots.begin + t), first + lane, t);
    __syncwarp();
    const uint32_t n = (a.n_units - first < 32 ? a.n_units - first : 32) / per_block;
    if (mine) y = few.chain(y, n);
    __syncwarp();
  }
  if (mine) store(a, slots.begin + lane % kFewSlots, row + lane / kFewSlots, y);
}

// ---- many slots ---------------------------------------------------------------------------------------
constexpr uint32_t kTile = 64, kManyThreads = 256;

// 256 columns of a tile. Rows of words lie so that the eight rows of a fragment fall to different banks. Behind the 64
// words of weights: their minimums, one byte for 16 columns; behind those of activations: low seven bits of the sums
// over 16, then what is above them.
template <bool kSuper>
struct ManyTile {
  static constexpr uint32_t kBlocks = kSuper ? 1 : 8;
  uint32_t w[kTile][68], x[kTile][76];
  float d[kTile][kBlocks], m[kTile][kBlocks], xd[kTile][kBlocks], xm[kTile][kBlocks];
  int8_t scale[kTile][16];
};

template <class Block>
struct Many {
  using C = Codec<Block>;
  ManyTile<C::kSuper>& s;
  const Args& a;

  // Units of 8 threads' row side by side; what lies outside the matrix is 0.
  __device__ __forceinline__ void load_weights(const uint8_t* w, uint32_t row, uint32_t first_unit) const {
    for (uint32_t i = threadIdx.x; i < kTile * 8; i += kManyThreads) {
      const uint32_t r = i / 8, g = i % 8, b = C::kSuper ? 0 : g;
      Unit u{};
      float d = 0.0f, m = 0.0f;
      if (row + r < a.rows && first_unit + g < a.n_units) {
        const uint8_t* block = w + (row + r) * a.row_bytes + (C::kSuper ? first_unit / 8 : first_unit + g) * sizeof(Block);
        C::unit(block, g, u);
        d = C::d(block);
        m = C::m(block);
      }
      for (uint32_t j = 0; j < 8; ++j) s.w[r][8 * g + j] = u.q[j];
      if (b == g) {
        s.d[r][b] = d;
        s.m[r][b] = m;
      }
      if (!C::kSuper) continue;
      auto* mins = reinterpret_cast<int8_t*>(s.w[r] + 64);
      for (uint32_t j = 0; j < 2; ++j) {
        s.scale[r][2 * g + j] = static_cast<int8_t>(u.scale[j]);
        mins[2 * g + j] = static_cast<int8_t>(u.min[j]);
      }
    }
  }

  __device__ __forceinline__ void load_activations(const Slots& slots, uint32_t first_unit) const {
    for (uint32_t i = threadIdx.x; i < kTile * 8; i += kManyThreads) {
      const uint32_t t = i / 8, g = i % 8, b = C::kSuper ? 0 : g;
      const bool inside = slots.begin + t < slots.end && first_unit + g < a.n_units;
      const ActUnit act = act_unit<C::kSuper>(inside ? x_row(a, slots.begin + t) : a.x, inside ? first_unit + g : 0);
      for (uint32_t j = 0; j < 8; ++j) s.x[t][8 * g + j] = inside ? __ldg(act.q + j) : 0;
      if (b == g) {
        s.xd[t][b] = inside ? act_d(act.block) : 0.0f;
        if (!C::kSuper && C::kHasMin) s.xm[t][b] = inside ? act_offset(act.block) : 0.0f;
      }
      if (!C::kSuper || !C::kHasMin) continue;
      auto *low = reinterpret_cast<int8_t*>(s.x[t] + 64), *high = reinterpret_cast<int8_t*>(s.x[t] + 68);
      for (uint32_t j = 2 * g; j < 2 * g + 2; ++j) {
        const int32_t sum = inside ? act_bsum(act.block, j) : 0;
        low[j] = static_cast<int8_t>(sum & 127);
        high[j] = static_cast<int8_t>(sum >> 7);
      }
    }
  }

  // The warp's 16 rows and 4 times 8 slots: rows r and r + 8, slots t + 8 j + {0, 1} are of this lane.
  struct Place {
    uint32_t r, t, group, quarter;
  };
  using Sums = float[4][4];

  // Integer products of unit g.
  __device__ __forceinline__ void products(const Place& p, uint32_t g, uint32_t j, int32_t (&c)[4], int32_t (&c_high)[4]) const {
    const uint32_t *w0 = s.w[p.r] + 8 * g + p.quarter, *w1 = s.w[p.r + 8] + 8 * g + p.quarter;
    const uint32_t* x = s.x[p.t + 8 * j + p.group] + 8 * g + p.quarter;
    if constexpr (C::kOneScale) {
      mma_k32(c, w0[0], w1[0], w0[4], w1[4], x[0], x[4]);
    } else {
      mma_k16(c, w0[0], w1[0], x[0]);
      mma_k16(c_high, w0[4], w1[4], x[4]);
    }
  }

  __device__ __forceinline__ void add_blocks(const Place& p, uint32_t n_units, Sums& y) const {
    for (uint32_t g = 0; g < n_units; ++g) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        int32_t c[4] = {}, none[4] = {};
        products(p, g, j, c, none);
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          const uint32_t row = p.r + i / 2 * 8, slot = p.t + 8 * j + 2 * p.quarter + i % 2;
          y[j][i] = __fmaf_rn(static_cast<float>(c[i]), s.d[row][g] * s.xd[slot][g], y[j][i]);
          if (C::kHasMin) y[j][i] = __fmaf_rn(s.m[row][g], s.xm[slot][g], y[j][i]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_super_block(const Place& p, Sums& y) const {
    int32_t dot[4][4] = {};
#pragma unroll
    for (uint32_t g = 0; g < 8; ++g) {
      const int32_t scale[2][2] = {{s.scale[p.r][2 * g], s.scale[p.r][2 * g + 1]}, {s.scale[p.r + 8][2 * g], s.scale[p.r + 8][2 * g + 1]}};
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        int32_t c[4] = {}, high[4] = {};
        products(p, g, j, c, high);
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          dot[j][i] += scale[i / 2][0] * c[i];
          if (!C::kOneScale) dot[j][i] += scale[i / 2][1] * high[i];
        }
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      int32_t low[4] = {}, high[4] = {};
      if constexpr (C::kHasMin) {
        const uint32_t w0 = s.w[p.r][64 + p.quarter], w1 = s.w[p.r + 8][64 + p.quarter];
        const uint32_t* x = s.x[p.t + 8 * j + p.group] + 64 + p.quarter;
        mma_k16(low, w0, w1, x[0]);
        mma_k16(high, w0, w1, x[4]);
      }
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = p.r + i / 2 * 8, slot = p.t + 8 * j + 2 * p.quarter + i % 2;
        y[j][i] = __fmaf_rn(static_cast<float>(dot[j][i]), s.d[row][0] * s.xd[slot][0], y[j][i]);
        if (C::kHasMin) y[j][i] = __fmaf_rn(static_cast<float>(low[i] + 128 * high[i]), -(s.m[row][0] * s.xd[slot][0]), y[j][i]);
      }
    }
  }
};

template <class Block>
__global__ void __launch_bounds__(kManyThreads) multiply_many(Args a) {
  using C = Codec<Block>;
  const Slots slots = find_slots(a, blockIdx.y, kTile);
  if (slots.begin >= slots.end) return;
  const Many<Block> many{shared<ManyTile<C::kSuper>>(), a};
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * kTile;
  const typename Many<Block>::Place place{warp % 4 * 16 + lane / 4, warp / 4 * 32, lane / 4, lane % 4};
  const uint8_t* w = a.w[slots.matrix];
  float y[4][4] = {};
  for (uint32_t first = 0; first < a.n_units; first += 8) {
    many.load_weights(w, row, first);
    many.load_activations(slots, first);
    __syncthreads();
    if constexpr (C::kSuper) many.add_super_block(place, y);
    else many.add_blocks(place, a.n_units - first < 8 ? a.n_units - first : 8, y);
    __syncthreads();
  }
#pragma unroll
  for (uint32_t k = 0; k < 16; ++k) {
    const uint32_t j = k / 4, i = k % 4, r = row + place.r + i / 2 * 8, slot = slots.begin + place.t + 8 * j + 2 * place.quarter + i % 2;
    if (r < a.rows && slot < slots.end) store(a, slot, r, y[j][i]);
  }
}

}  // namespace device

// ---- the host's side ----------------------------------------------------------------------------------
inline uint32_t div_up(size_t n, size_t by) { return static_cast<uint32_t>((n + by - 1) / by); }

// Pieces of slots at most, cut at experts: find_slots().
inline uint32_t n_pieces(const Product& p, size_t size) {
  if (p.grouping.first == nullptr) return div_up(p.n, size);
  return static_cast<uint32_t>(p.n / size + std::min(p.w.n, p.n));
}

inline device::Args args_of(const Product& p, size_t elems_per_unit, size_t x_row_bytes) {
  return {reinterpret_cast<const uint8_t* const*>(p.w.data), p.grouping.first, p.grouping.token,
          reinterpret_cast<const uint8_t*>(p.x), p.y, p.w.row_bytes, x_row_bytes, p.y_stride,
          static_cast<uint32_t>(p.w.n), static_cast<uint32_t>(p.w.rows), static_cast<uint32_t>(p.w.cols / elems_per_unit),
          static_cast<uint32_t>(p.n), p.add};
}

// Few: up to eight slots, or about four for each expert.
inline bool few_slots(const Product& p) {
  return p.n <= (p.grouping.first == nullptr ? device::kFewSlots : std::max<size_t>(device::kFewSlots, 4 * p.w.n));
}

template <class Block>
void multiply_blocks(const Product& p, Stream* stream) {
  using C = device::Codec<Block>;
  if (p.n == 0 || p.w.rows == 0) return;
  const size_t x_row_bytes = C::kSuper ? p.w.cols / 256 * sizeof(BlockAct256) : p.w.cols / 32 * sizeof(BlockAct32);
  const device::Args args = args_of(p, 32, x_row_bytes);
  if (few_slots(p)) {
    const Index3 grid{div_up(p.w.rows, device::kFewWarps * device::kFewRows), n_pieces(p, device::kFewSlots), 1};
    return launch(device::multiply_few<Block>, grid, 32 * device::kFewWarps, device::kFewWarps * sizeof(device::FewWarp<C::kSuper>), stream, args);
  }
  const Index3 grid{div_up(p.w.rows, device::kTile), n_pieces(p, device::kTile), 1};
  launch(device::multiply_many<Block>, grid, device::kManyThreads, sizeof(device::ManyTile<C::kSuper>), stream, args);
}

}  // namespace duet::gpu
