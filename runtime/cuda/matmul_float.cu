// Products with float weights: element i belongs to partial sum i % 32, a chain of fused multiply-adds; the 32 as a
// tree. So the bits of an output depend on its row and slot only, however many slots there are.
#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {
namespace device {

struct F32 {
  static constexpr uint32_t kBytes = 4;
  static __device__ __forceinline__ float at(const uint8_t* row, uint32_t i) { return __ldg(reinterpret_cast<const float*>(row) + i); }
};
struct F16 {
  static constexpr uint32_t kBytes = 2;
  static __device__ __forceinline__ float at(const uint8_t* row, uint32_t i) {
    return half_to_float(__ldg(reinterpret_cast<const uint16_t*>(row) + i));
  }
};
struct BF16 {
  static constexpr uint32_t kBytes = 2;
  static __device__ __forceinline__ float at(const uint8_t* row, uint32_t i) {
    return __uint_as_float(uint32_t{__ldg(reinterpret_cast<const uint16_t*>(row) + i)} << 16);
  }
};

__device__ __forceinline__ float sum_of_warp(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <class Type>
__global__ void __launch_bounds__(32 * kFewWarps) multiply_floats(Args a) {
  const Slots slots = find_slots(a, blockIdx.y, kFewSlots);
  const uint32_t lane = threadIdx.x % 32, row = (blockIdx.x * kFewWarps + threadIdx.x / 32) * kFewRows;
  if (slots.begin >= slots.end || row >= a.rows) return;
  const uint32_t n_rows = a.rows - row < kFewRows ? a.rows - row : kFewRows, n_slots = slots.end - slots.begin;
  const uint8_t* w = a.w[slots.matrix] + row * a.row_bytes;
  const float* x[kFewSlots];
#pragma unroll
  for (uint32_t t = 0; t < kFewSlots; ++t) x[t] = reinterpret_cast<const float*>(x_row(a, slots.begin + (t < n_slots ? t : 0)));
  float sums[kFewRows][kFewSlots] = {};
  for (uint32_t i = lane; i < a.n_units; i += 32) {
    float weights[kFewRows];
#pragma unroll
    for (uint32_t r = 0; r < kFewRows; ++r) weights[r] = Type::at(w + (r < n_rows ? r : 0) * a.row_bytes, i);
#pragma unroll
    for (uint32_t t = 0; t < kFewSlots; ++t) {
      if (t >= n_slots) continue;
      const float value = __ldg(x[t] + i);
#pragma unroll
      for (uint32_t r = 0; r < kFewRows; ++r) sums[r][t] = __fmaf_rn(weights[r], value, sums[r][t]);
    }
  }
#pragma unroll
  for (uint32_t t = 0; t < kFewSlots; ++t) {
    if (t >= n_slots) continue;
#pragma unroll
    for (uint32_t r = 0; r < kFewRows; ++r) {
      const float sum = sum_of_warp(sums[r][t]);
      if (lane == 0 && r < n_rows) store(a, slots.begin + t, row + r, sum);
    }
  }
}

}  // namespace device

namespace {

template <class Type>
void multiply(const Product& p, Stream* stream) {
  if (p.n == 0 || p.w.rows == 0) return;
  const Index3 grid{div_up(p.w.rows, device::kFewWarps * device::kFewRows), n_pieces(p, device::kFewSlots), 1};
  launch(device::multiply_floats<Type>, grid, 32 * device::kFewWarps, 0, stream, args_of(p, 1, p.w.cols * sizeof(float)));
}

}  // namespace

MultiplyFn float_product(DType dtype) {
  switch (dtype) {
    case DType::F32: return multiply<device::F32>;
    case DType::F16: return multiply<device::F16>;
    case DType::BF16: return multiply<device::BF16>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
