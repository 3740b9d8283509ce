// AVX-512: the loops behind the roofline (PeakLoops in kernels.h).
#include <immintrin.h>

#include "runtime/kernels/tables.h"

namespace duet {
namespace {

// Enough independent sums to cover two units of latency 5.
constexpr int kSums = 12;

uint64_t int8_macs(uint64_t n_steps) noexcept {
  __m512i sums[kSums] = {}, u = _mm512_set1_epi8(1), s = _mm512_set1_epi8(-1);
  for (__m512i& sum : sums) __asm__ volatile("" : "+v"(sum));  // not known to be equal
  for (uint64_t step = 0; step < n_steps; ++step) {
    __asm__ volatile("" : "+v"(u), "+v"(s));  // not known to be the same in every step
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, u, s);
  }
  for (__m512i& sum : sums) __asm__ volatile("" : : "v"(sum));
  return n_steps * kSums * 64;
}

uint64_t f32_macs(uint64_t n_steps) noexcept {
  __m512 sums[kSums] = {}, a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  for (__m512& sum : sums) __asm__ volatile("" : "+v"(sum));  // not known to be equal
  for (uint64_t step = 0; step < n_steps; ++step) {
    __asm__ volatile("" : "+v"(a), "+v"(b));
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(a, b, sum);
  }
  for (__m512& sum : sums) __asm__ volatile("" : : "v"(sum));
  return n_steps * kSums * 16;
}

uint64_t read_sum(const void* data, size_t n_bytes) noexcept {
  const __m512i* p = static_cast<const __m512i*>(data);
  __m512i sums[8] = {};
  for (size_t i = 0; i < n_bytes / 64; i += 8)
    for (size_t j = 0; j < 8; ++j) sums[j] = _mm512_add_epi64(sums[j], _mm512_load_si512(p + i + j));
  for (size_t j = 1; j < 8; ++j) sums[0] = _mm512_add_epi64(sums[0], sums[j]);
  // Not by _mm512_reduce_add_epi64, which adds signed numbers: wrapping around is meant here.
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, sums[0]);
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace

void add_avx512_peak(KernelTable& table) { table.peak = {int8_macs, f32_macs, read_sum}; }

}  // namespace duet
