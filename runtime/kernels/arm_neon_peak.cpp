// NEON with dot products: the loops behind the roofline (PeakLoops in kernels.h).
#include <arm_neon.h>

#include "runtime/kernels/tables.h"

namespace duet {
namespace {

// Enough independent sums to cover four units of latency 4.
constexpr int kSums = 16;

uint64_t int8_macs(uint64_t n_steps) noexcept {
  int32x4_t sums[kSums] = {};
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(-1);
  for (uint64_t step = 0; step < n_steps; ++step) {
    __asm__ volatile("" : "+w"(a), "+w"(b));  // not known to be the same in every step
    for (int32x4_t& sum : sums) sum = vdotq_s32(sum, a, b);
  }
  for (int32x4_t& sum : sums) __asm__ volatile("" : : "w"(sum));
  return n_steps * kSums * 16;
}

uint64_t f32_macs(uint64_t n_steps) noexcept {
  float32x4_t sums[kSums] = {}, a = vdupq_n_f32(1.0f), b = vdupq_n_f32(0.5f);
  for (uint64_t step = 0; step < n_steps; ++step) {
    __asm__ volatile("" : "+w"(a), "+w"(b));
    for (float32x4_t& sum : sums) sum = vfmaq_f32(sum, a, b);
  }
  for (float32x4_t& sum : sums) __asm__ volatile("" : : "w"(sum));
  return n_steps * kSums * 4;
}

uint64_t read_sum(const void* data, size_t n_bytes) noexcept {
  const auto* p = static_cast<const uint64_t*>(data);
  uint64x2_t sums[4] = {};
  for (size_t i = 0; i < n_bytes / 8; i += 8)
    for (size_t j = 0; j < 4; ++j) sums[j] = vaddq_u64(sums[j], vld1q_u64(p + i + 2 * j));
  return vaddvq_u64(vaddq_u64(vaddq_u64(sums[0], sums[1]), vaddq_u64(sums[2], sums[3])));
}

}  // namespace

void add_neon_peak(KernelTable& table) { table.peak = {int8_macs, f32_macs, read_sum}; }

}  // namespace duet
