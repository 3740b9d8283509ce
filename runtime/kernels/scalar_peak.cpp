// Without an instruction set of its own: what the compiler makes of plain loops over arrays in the
// first-level cache (PeakLoops in kernels.h).
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

constexpr size_t kCount = 1024;

// The compiler must take the array as changed in every step.
template <class T>
void touch(T* p) {
  __asm__ volatile("" : "+r"(p) : : "memory");
}

uint64_t int8_macs(uint64_t n_steps) noexcept {
  int8_t a[kCount] = {}, b[kCount] = {};
  for (uint64_t step = 0; step < n_steps; ++step) {
    touch(a);
    touch(b);
    int32_t sum = 0;
    for (size_t i = 0; i < kCount; ++i) sum += a[i] * b[i];
    touch(&sum);
  }
  return n_steps * kCount;
}

uint64_t f32_macs(uint64_t n_steps) noexcept {
  float a[kCount] = {}, b[kCount] = {};
  for (uint64_t step = 0; step < n_steps; ++step) {
    touch(a);
    touch(b);
    float sums[16] = {};
    for (size_t i = 0; i < kCount; i += 16)
      for (size_t j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
    touch(sums);
  }
  return n_steps * kCount;
}

uint64_t read_sum(const void* data, size_t n_bytes) noexcept {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64_t sums[8] = {};
  for (size_t i = 0; i < n_bytes / 8; i += 8)
    for (size_t j = 0; j < 8; ++j) sums[j] += p[i + j];
  for (size_t j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0];
}

}  // namespace

void add_scalar_peak(KernelTable& table) { table.peak = {int8_macs, f32_macs, read_sum}; }

}  // namespace duet
