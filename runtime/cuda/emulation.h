// CUDA's execution model on the CPU, so that the kernels themselves run in tests: the blocks of a grid one after the
// other, the threads of a block as fibers that run until they meet at a barrier or exchange values within their warp.
//
// What a device would leave to chance is an error here: threads of a block that miss a barrier, lanes of a warp that
// do different things at once, writes past shared memory. Fresh shared memory holds NaN in every type. One launch
// runs at a time in a process.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "quant/f16.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace duet::gpu {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct Stream;  // nothing is queued: launches and copies are done when they return

namespace emulation {

// Of the thread that runs now.
extern Index3 thread_index, block_index, block_size, grid_size;
extern std::byte* shared_memory;

enum class Meeting : uint8_t { syncwarp, shuffle, ballot, mma };
struct Words {
  uint32_t v[6];
};
// Waits for the other 31 lanes; what each of them brought.
const Words* meet(Meeting kind, const Words& mine);
void sync_block();

// Runs body for each thread of the grid. meets: its threads use barriers or exchange values.
struct Body {
  void (*run)(const void* context);
  const void* context;
};
void run_grid(Index3 grid, unsigned block, size_t shared_bytes, bool meets, Body body);

// What a launch did wrong since the last call; null: nothing. Valid until the next launch.
const char* take_error();

inline int32_t dot4(uint32_t a, uint32_t b) {
  int32_t sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}

}  // namespace emulation

#define threadIdx ::duet::gpu::emulation::thread_index
#define blockIdx ::duet::gpu::emulation::block_index
#define blockDim ::duet::gpu::emulation::block_size
#define gridDim ::duet::gpu::emulation::grid_size

inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp() { emulation::meet(emulation::Meeting::syncwarp, {}); }

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  static_assert(sizeof(T) == 4);
  const uint32_t mine = std::bit_cast<uint32_t>(value);
  return std::bit_cast<T>(emulation::meet(emulation::Meeting::shuffle, {{mine}})[lane].v[0]);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other) {
  return __shfl_sync(mask, value, static_cast<int>(emulation::thread_index.x % 32) ^ other);
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const emulation::Words* all = emulation::meet(emulation::Meeting::ballot, {{vote ? 1u : 0u}});
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) votes |= all[lane].v[0] << lane;
  return votes;
}

inline int32_t __dp4a(int32_t a, int32_t b, int32_t c) {
  return c + emulation::dot4(static_cast<uint32_t>(a), static_cast<uint32_t>(b));
}
inline int __popc(uint32_t x) { return std::popcount(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace device {

template <class T>
T& shared() {
  return *reinterpret_cast<T*>(emulation::shared_memory);
}

inline float half_to_float(uint16_t h) { return f16_to_f32(h); }
inline uint16_t float_to_half(float x) { return f32_to_f16(x); }

// c (16 x 8) += a (16 x 16) b (16 x 8): fragments as PTX's mma.m16n8k16 with s8 has them. Lane l holds of a the bytes
// 4 (l % 4) .. + 3 of rows l / 4 and l / 4 + 8, of b those of column l / 4, of c columns 2 (l % 4) and the next of
// the two rows.
inline void mma_k16(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  const emulation::Words* all = emulation::meet(emulation::Meeting::mma, {{a0, a1, b0}});
  const uint32_t lane = emulation::thread_index.x % 32, row = lane / 4, column = 2 * (lane % 4);
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t k = 0; k < 4; ++k) c[i] += emulation::dot4(all[row * 4 + k].v[i / 2], all[(column + i % 2) * 4 + k].v[2]);
}
// The same over 32: a2, a3, b1 hold bytes 16 and on.
inline void mma_k32(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const emulation::Words* all = emulation::meet(emulation::Meeting::mma, {{a0, a1, a2, a3, b0, b1}});
  const uint32_t lane = emulation::thread_index.x % 32, row = lane / 4, column = 2 * (lane % 4);
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t k = 0; k < 4; ++k) {
      const emulation::Words &a = all[row * 4 + k], &b = all[(column + i % 2) * 4 + k];
      c[i] += emulation::dot4(a.v[i / 2], b.v[4]) + emulation::dot4(a.v[2 + i / 2], b.v[5]);
    }
}

}  // namespace device

template <class Kernel, class... Args>
void run_kernel(bool meets, Kernel kernel, Index3 grid, unsigned block, size_t shared_bytes, const Args&... args) {
  const auto call = [&] { kernel(args...); };
  using Call = decltype(call);
  emulation::run_grid(grid, block, shared_bytes, meets, {[](const void* context) { (*static_cast<const Call*>(context))(); }, &call});
}

// Queues kernel(args...). block: threads, a multiple of 32.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Index3 grid, unsigned block, size_t shared_bytes, Stream*, const Args&... args) {
  run_kernel(true, kernel, grid, block, shared_bytes, static_cast<Params>(args)...);
}
// For kernels whose threads do not meet.
template <class... Params, class... Args>
void launch_apart(void (*kernel)(Params...), Index3 grid, unsigned block, Stream*, const Args&... args) {
  run_kernel(false, kernel, grid, block, 0, static_cast<Params>(args)...);
}

}  // namespace duet::gpu
