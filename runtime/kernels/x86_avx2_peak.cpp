// AVX2 + FMA: the loops behind the roofline (PeakLoops in kernels.h).
#include <immintrin.h>

#include "runtime/kernels/tables.h"

namespace duet {
namespace {

constexpr int kFloatSums = 12;  // two units of latency 4 to 5
constexpr int kIntSums = 4;     // their chain is one addition long, and registers are few

// 32 multiply-adds are three instructions here: vpmaddubsw, vpmaddwd with ones, vpaddd.
uint64_t int8_macs(uint64_t n_steps) noexcept {
  __m256i sums[kIntSums] = {}, u = _mm256_set1_epi8(1), s = _mm256_set1_epi8(-1);
  const __m256i ones = _mm256_set1_epi16(1);
  for (__m256i& sum : sums) __asm__ volatile("" : "+x"(sum));  // not known to be equal
  for (uint64_t step = 0; step < n_steps; ++step) {
    for (__m256i& sum : sums) {
      __asm__ volatile("" : "+x"(u), "+x"(s));  // else one product would serve all sums
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones));
    }
  }
  for (__m256i& sum : sums) __asm__ volatile("" : : "x"(sum));
  return n_steps * kIntSums * 32;
}

uint64_t f32_macs(uint64_t n_steps) noexcept {
  __m256 sums[kFloatSums] = {}, a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
  for (__m256& sum : sums) __asm__ volatile("" : "+x"(sum));  // not known to be equal
  for (uint64_t step = 0; step < n_steps; ++step) {
    __asm__ volatile("" : "+x"(a), "+x"(b));
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(a, b, sum);
  }
  for (__m256& sum : sums) __asm__ volatile("" : : "x"(sum));
  return n_steps * kFloatSums * 8;
}

uint64_t read_sum(const void* data, size_t n_bytes) noexcept {
  const __m256i* p = static_cast<const __m256i*>(data);
  __m256i sums[8] = {};
  for (size_t i = 0; i < n_bytes / 32; i += 8)
    for (size_t j = 0; j < 8; ++j) sums[j] = _mm256_add_epi64(sums[j], _mm256_load_si256(p + i + j));
  for (size_t j = 1; j < 8; ++j) sums[0] = _mm256_add_epi64(sums[0], sums[j]);
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[0]);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

void add_avx2_peak(KernelTable& table) { table.peak = {int8_macs, f32_macs, read_sum}; }

}  // namespace duet
