// Rows of floats to their quantized forms, bit-equal to quantize_act32/256 of runtime/kernels/kernels.h.
#pragma once

#include "quant/format.h"
#include "runtime/cuda/portable.h"
#include "runtime/gpu/device.h"

namespace duet::gpu::device {

constexpr float kSmallest = 0x1p-100f;  // kActFloor of runtime/kernels/kernels.h

// The integers of a block whose largest magnitude has these bits, and its unit.
struct Quantizer {
  float inverse, d;
  __device__ __forceinline__ explicit Quantizer(uint32_t max_bits) {
    const float max = __uint_as_float(max_bits);
    const bool finite = max_bits < 0x7f800000u;
    inverse = finite && max >= kSmallest ? 127.0f / max : 0.0f;
    d = !finite ? __uint_as_float(0x7fc00000u) : inverse == 0.0f ? 0.0f : max / 127.0f;
  }
  __device__ __forceinline__ int32_t operator()(float x) const { return inverse == 0.0f ? 0 : __float2int_rn(x * inverse); }
};

__device__ __forceinline__ uint32_t max_of(uint32_t v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, v, step);
    v = v > other ? v : other;
  }
  return v;
}
__device__ __forceinline__ int32_t sum_of(int32_t v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// Eight values of this lane to bytes; their sum.
__device__ __forceinline__ int32_t pack_eight(const float (&values)[8], const Quantizer& quantizer, uint32_t (&words)[2]) {
  int32_t sum = 0;
  words[0] = words[1] = 0;
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const int32_t q = quantizer(values[i]);
    sum += q;
    words[i / 4] |= static_cast<uint32_t>(q & 255) << (8 * (i % 4));
  }
  return sum;
}

// 256 values from column `first` on, eight in each lane (zeros behind the end); dst: the row.
__device__ __forceinline__ void store_act32(const float (&values)[8], uint32_t max_bits, uint32_t first, uint32_t cols, uint8_t* dst) {
  const uint32_t lane = threadIdx.x % 32, column = first + 8 * lane;
  const Quantizer quantizer(max_of(max_bits, 4));
  uint32_t words[2];
  const int32_t sum = sum_of(pack_eight(values, quantizer, words), 4);
  if (column >= cols) return;
  uint8_t* block = dst + column / 32 * sizeof(BlockAct32);
  auto* qs = reinterpret_cast<uint32_t*>(block + 8 + column % 32);
  qs[0] = words[0];
  qs[1] = words[1];
  if (lane % 4 != 0) return;
  *reinterpret_cast<float*>(block) = quantizer.d;
  *reinterpret_cast<int32_t*>(block + 4) = sum;
}

__device__ __forceinline__ void store_act256(const float (&values)[8], uint32_t max_bits, uint32_t first, uint8_t* dst) {
  const uint32_t lane = threadIdx.x % 32;
  const Quantizer quantizer(max_of(max_bits, 32));
  uint32_t words[2];
  const int32_t sum16 = sum_of(pack_eight(values, quantizer, words), 2), sum32 = sum16 + __shfl_xor_sync(~0u, sum16, 2);
  uint8_t* block = dst + first / 256 * sizeof(BlockAct256);
  auto* qs = reinterpret_cast<uint32_t*>(block + 4 + 8 * lane);
  qs[0] = words[0];
  qs[1] = words[1];
  if (lane == 0) *reinterpret_cast<float*>(block) = quantizer.d;
  if (lane % 2 == 0) reinterpret_cast<int16_t*>(block + 260)[lane / 2] = static_cast<int16_t>(sum16);
  if (lane % 4 == 0) reinterpret_cast<int16_t*>(block + 292)[lane / 4] = static_cast<int16_t>(sum32);
}

// Where a row goes; null: not wanted.
struct RowTargets {
  float* y;
  uint8_t *act32, *act256;
};
// Of row `row` of targets.
__device__ __forceinline__ RowTargets row_targets(float* y, ActRows acts, size_t row, uint32_t cols) {
  return {y == nullptr ? nullptr : y + row * cols,
          acts.act32 == nullptr ? nullptr : reinterpret_cast<uint8_t*>(acts.act32) + row * (cols / 32 * sizeof(BlockAct32)),
          acts.act256 == nullptr ? nullptr : reinterpret_cast<uint8_t*>(acts.act256) + row * (cols / 256 * sizeof(BlockAct256))};
}

// value(i) of all columns to the targets; called by all threads of the block.
template <class Value>
__device__ __forceinline__ void emit_row(Value value, uint32_t cols, const RowTargets& to) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t first = threadIdx.x / 32 * 256; first < cols; first += blockDim.x * 8) {
    float values[8];
    uint32_t max_bits = 0;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t column = first + 8 * lane + i;
      values[i] = column < cols ? value(column) : 0.0f;
      const uint32_t bits = __float_as_uint(values[i]) & 0x7fffffffu;
      max_bits = bits > max_bits ? bits : max_bits;
      if (to.y != nullptr && column < cols) to.y[column] = values[i];
    }
    if (to.act32 != nullptr) store_act32(values, max_bits, first, cols, to.act32);
    if (to.act256 != nullptr) store_act256(values, max_bits, first, to.act256);
  }
}

}  // namespace duet::gpu::device
