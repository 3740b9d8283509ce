// The router's choice and the order of slots, as runtime/moe.cpp has them.
#include "runtime/cuda/operations.h"
#include "runtime/cuda/portable.h"

namespace duet::gpu {
namespace device {

__device__ __forceinline__ bool contains(const int32_t* values, uint32_t n, int32_t value) {
  for (uint32_t i = 0; i < n; ++i)
    if (values[i] == value) return true;
  return false;
}

__global__ void choose_rows(const float* logits, uint32_t n, uint32_t n_expert, uint32_t n_used, int32_t* chosen, float* weights) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= n) return;
  logits += size_t{row} * n_expert;
  chosen += size_t{row} * n_used;
  weights += size_t{row} * n_used;
  for (uint32_t rank = 0; rank < n_used; ++rank) {
    int32_t best = -1;
    for (int32_t e = 0; e < static_cast<int32_t>(n_expert); ++e) {
      if (contains(chosen, rank, e)) continue;
      if (best < 0 || logits[e] > logits[best]) best = e;
    }
    chosen[rank] = best;
  }
  float sum = 0.0f;
  for (uint32_t rank = 0; rank < n_used; ++rank) sum += weights[rank] = expf(logits[chosen[rank]] - logits[chosen[0]]);
  for (uint32_t rank = 0; rank < n_used; ++rank) weights[rank] /= sum;
}

// One block: its warps take experts in turn, first counting their pairs, then giving them slots in their order.
constexpr uint32_t kGroupThreads = 256;

// Votes of 32 pairs from `first` on for an expert.
__device__ __forceinline__ uint32_t votes_for(const int32_t* chosen, uint32_t n, uint32_t first, uint32_t expert) {
  const uint32_t i = first + threadIdx.x % 32;
  return __ballot_sync(~0u, i < n && chosen[i] == static_cast<int32_t>(expert));
}

__global__ void __launch_bounds__(kGroupThreads) group_pairs(const int32_t* chosen, uint32_t n, uint32_t n_expert, uint32_t n_used,
                                                             int32_t* slot_of, int32_t* token_of, int32_t* first) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = kGroupThreads / 32;
  for (uint32_t e = warp; e < n_expert; e += n_warps) {
    int32_t count = 0;
    for (uint32_t i = 0; i < n; i += 32) count += __popc(votes_for(chosen, n, i, e));
    if (lane == 0) first[e + 1] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    first[0] = 0;
    for (uint32_t e = 0; e < n_expert; ++e) first[e + 1] += first[e];
  }
  __syncthreads();
  for (uint32_t e = warp; e < n_expert; e += n_warps) {
    int32_t next = first[e];
    for (uint32_t i = 0; i < n; i += 32) {
      const uint32_t votes = votes_for(chosen, n, i, e);
      if (votes >> lane & 1) {
        const int32_t slot = next + __popc(votes & ((1u << lane) - 1));
        slot_of[i + lane] = slot;
        token_of[slot] = static_cast<int32_t>((i + lane) / n_used);
      }
      next += __popc(votes);
    }
  }
}

__global__ void combine_rows(const float* y, const int32_t* slot_of, const float* weights, uint32_t n_used, uint32_t cols, float* residual) {
  const uint32_t column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= cols) return;
  const size_t row = blockIdx.x;
  float sum = residual[row * cols + column];
  for (size_t i = row * n_used; i < (row + 1) * n_used; ++i) sum = __fmaf_rn(weights[i], y[static_cast<size_t>(slot_of[i]) * cols + column], sum);
  residual[row * cols + column] = sum;
}

}  // namespace device

namespace {
uint32_t u32(size_t n) { return static_cast<uint32_t>(n); }
}  // namespace

void choose_experts(const float* logits, size_t n, size_t n_expert, size_t n_used, int32_t* chosen, float* weights, Stream* stream) {
  if (n == 0) return;
  launch_apart(device::choose_rows, {u32((n + 31) / 32), 1, 1}, 32, stream, logits, u32(n), u32(n_expert), u32(n_used), chosen, weights);
}

void group(const int32_t* chosen, size_t n, size_t n_expert, size_t n_used, int32_t* slot_of, int32_t* token_of, int32_t* first, Stream* stream) {
  launch(device::group_pairs, {1, 1, 1}, device::kGroupThreads, 0, stream, chosen, u32(n * n_used), u32(n_expert), u32(n_used), slot_of,
         token_of, first);
}

void combine(const float* y, const int32_t* slot_of, const float* weights, size_t n, size_t n_used, size_t cols, float* residual, Stream* stream) {
  if (n == 0) return;
  launch_apart(device::combine_rows, {u32(n), u32((cols + 255) / 256), 1}, 256, stream, y, slot_of, weights, u32(n_used), u32(cols), residual);
}

}  // namespace duet::gpu
