// Norms, activations: a block of threads for each row.
#include "runtime/cuda/activations.cuh"
#include "runtime/cuda/operations.h"

namespace duet::gpu {
namespace device {

constexpr uint32_t kRowThreads = 256;

struct RowSums {
  float of_warp[kRowThreads / 32];
};

// Over all threads, in one order.
__device__ __forceinline__ float sum_of_block(float v) {
  auto& sums = shared<RowSums>();
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  if (threadIdx.x % 32 == 0) sums.of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
  for (float part : sums.of_warp) sum += part;
  return sum;
}

__global__ void __launch_bounds__(kRowThreads) normalize_rows(const float* x, const float* w, float eps, uint32_t cols, float* y, ActRows acts) {
  x += size_t{blockIdx.x} * cols;
  float sum = 0.0f;
  for (uint32_t i = threadIdx.x; i < cols; i += kRowThreads) sum = __fmaf_rn(x[i], x[i], sum);
  const float mean = sum_of_block(sum) / static_cast<float>(cols), scale = 1.0f / sqrtf(mean + eps);
  emit_row([=](uint32_t i) { return x[i] * scale * w[i]; }, cols, row_targets(y, acts, blockIdx.x, cols));
}

__global__ void __launch_bounds__(kRowThreads) quantize_rows(const float* x, uint32_t cols, ActRows acts) {
  x += size_t{blockIdx.x} * cols;
  emit_row([=](uint32_t i) { return x[i]; }, cols, row_targets(nullptr, acts, blockIdx.x, cols));
}

__global__ void __launch_bounds__(kRowThreads) silu_mul_rows(const float* gate, const float* up, uint32_t cols, float* h, ActRows acts) {
  gate += size_t{blockIdx.x} * cols;
  up += size_t{blockIdx.x} * cols;
  emit_row([=](uint32_t i) { return gate[i] / (1.0f + expf(-gate[i])) * up[i]; }, cols, row_targets(h, acts, blockIdx.x, cols));
}

}  // namespace device

void normalize(const float* x, const float* w, float eps, size_t n, size_t cols, float* y, ActRows acts, Stream* stream) {
  if (n == 0) return;
  launch(device::normalize_rows, {static_cast<uint32_t>(n), 1, 1}, device::kRowThreads, sizeof(device::RowSums), stream, x, w, eps,
         static_cast<uint32_t>(cols), y, acts);
}

void quantize(const float* x, size_t n, size_t cols, ActRows acts, Stream* stream) {
  if (n == 0) return;
  launch(device::quantize_rows, {static_cast<uint32_t>(n), 1, 1}, device::kRowThreads, 0, stream, x, static_cast<uint32_t>(cols), acts);
}

void silu_mul(const float* gate, const float* up, size_t n, size_t cols, float* h, ActRows acts, Stream* stream) {
  if (n == 0) return;
  launch(device::silu_mul_rows, {static_cast<uint32_t>(n), 1, 1}, device::kRowThreads, 0, stream, gate, up, static_cast<uint32_t>(cols), h, acts);
}

}  // namespace duet::gpu
