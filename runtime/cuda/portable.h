// What kernel sources include: CUDA, or its emulation when the compiler is not nvcc. `launch`, `launch_apart` (for
// kernels whose threads do not meet) and the few operations that both offer under one name, in namespace device.
#pragma once

#if !defined(__CUDACC__)

#include "runtime/cuda/emulation.h"

#else

#include <cstddef>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace duet::gpu {

using Index3 = dim3;
using Stream = CUstream_st;

namespace device {

// All shared memory of a block is one structure.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
// Volatile: all lanes of a warp must meet in it, so it may not move into a branch.
__device__ __forceinline__ void mma_half(int32_t* c, uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c[0]), "+r"(c[1]) : "r"(a), "r"(b));
}

// Integer products of the tensor cores: emulation.h says who holds what.
__device__ __forceinline__ void mma_k16(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
#else
  mma_half(c, a0, b0);
  mma_half(c + 2, a1, b0);
#endif
}
__device__ __forceinline__ void mma_k32(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma_k16(c, a0, a1, b0);
  mma_k16(c, a2, a3, b1);
#endif
}

}  // namespace device

// Queues kernel(args...). block: threads, a multiple of 32. Errors are found by the next cudaGetLastError().
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Index3 grid, unsigned block, size_t shared_bytes, Stream* stream, const Args&... args) {
  constexpr size_t kUnasked = 48 << 10;
  if (shared_bytes > kUnasked) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
}
template <class... Params, class... Args>
void launch_apart(void (*kernel)(Params...), Index3 grid, unsigned block, Stream* stream, const Args&... args) {
  kernel<<<grid, block, 0, stream>>>(static_cast<Params>(args)...);
}

}  // namespace duet::gpu

#endif
