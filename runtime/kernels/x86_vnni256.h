// What 256-bit VNNI changes in the AVX2 table, whichever way the instructions are encoded: the
// quantized matmuls, whose sources use vpdpbusd and vpdpwssd where the file's flags allow them, and
// the loop that measures the peak.
#pragma once

#include "runtime/kernels/x86_avx2_block32.h"
#include "runtime/kernels/x86_avx2_iq.h"

namespace duet {
namespace {

static_assert(kVnni);

constexpr int kPeakSums = 12;  // two units of latency 4 to 5

uint64_t vnni256_macs(uint64_t n_steps) noexcept {
  __m256i sums[kPeakSums] = {}, u = _mm256_set1_epi8(1), s = _mm256_set1_epi8(-1);
  for (__m256i& sum : sums) __asm__ volatile("" : "+x"(sum));  // not known to be equal
  for (uint64_t step = 0; step < n_steps; ++step) {
    __asm__ volatile("" : "+x"(u), "+x"(s));
    for (__m256i& sum : sums) sum = dpbusd(sum, u, s);
  }
  for (__m256i& sum : sums) __asm__ volatile("" : : "x"(sum));
  return n_steps * kPeakSums * 32;
}

void set_vnni256(KernelTable& table) {
  set_block32_256(table);
  set_k_256(table);
  set_iq_256(table);
  table.peak.int8_macs = vnni256_macs;
}

}  // namespace
}  // namespace duet
