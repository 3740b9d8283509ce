// The measured limits, for plausibility only: other programs may be running.
#include "runtime/roofline.h"

#include <doctest/doctest.h>

#include <memory>
#include <vector>

using namespace duet;

TEST_CASE("roofline: every table's loops do the work they claim") {
  alignas(64) uint64_t words[64 * 3];
  uint64_t sum = 0;
  for (size_t i = 0; i < std::size(words); ++i) sum += words[i] = i * 0x123456789abcdef;
  for (const KernelTable* table : usable_kernels()) {
    CAPTURE(table->isa);
    CHECK(table->peak.read_sum(words, sizeof(words)) == sum);
    const uint64_t one = table->peak.int8_macs(1), one_float = table->peak.f32_macs(1);
    CHECK(one > 0);
    CHECK(one_float > 0);
    CHECK(table->peak.int8_macs(100) == 100 * one);
    CHECK(table->peak.f32_macs(100) == 100 * one_float);
  }
}

TEST_CASE("roofline: a machine reads and multiplies") {
  for (const int n_threads : {1, 3}) {
    const KernelTable* table = &select_kernels("");
    const Roofline r = measure_rooflines({&table, 1}, n_threads, uint64_t{96} << 20).front();
    CHECK(r.buffer_bytes == uint64_t{96} << 20);
    CHECK(r.read_bytes_per_s > 1e8);
    CHECK(r.read_bytes_per_s < 1e13);
    CHECK(r.int8_macs_per_s > 1e7);
    CHECK(r.f32_macs_per_s > 1e7);
    CHECK(r.f32_macs_per_s < 1e14);
  }
}
