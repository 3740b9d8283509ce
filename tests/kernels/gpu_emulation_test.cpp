// The emulation of CUDA's execution model finds what a device would leave to chance.
#include "runtime/cuda/emulation.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace duet::gpu {
namespace {

struct Numbers {
  float values[64];
};

std::string error() {
  const char* text = emulation::take_error();
  return text != nullptr ? text : "";
}

void reverse_in_block(const float* x, float* y) {
  auto& shared = device::shared<Numbers>();
  shared.values[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = shared.values[63 - threadIdx.x];
}

TEST_CASE("emulation: threads see what others wrote before a barrier") {
  std::vector<float> x(192), y(192);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  launch(reverse_in_block, {3, 1, 1}, 64, sizeof(Numbers), nullptr, x.data(), y.data());
  for (size_t i = 0; i < x.size(); ++i) CHECK(y[i] == static_cast<float>(i / 64 * 64 + 63 - i % 64));
  CHECK(error() == "");
}

void sum_lanes(float* out) {
  float v = static_cast<float>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  const uint32_t odd = __ballot_sync(~0u, threadIdx.x % 2 == 1);
  out[threadIdx.x] = v + __shfl_sync(~0u, v, 3) + static_cast<float>(__popc(odd));
}

TEST_CASE("emulation: lanes exchange values within their warp") {
  std::vector<float> out(64);
  launch(sum_lanes, {1, 1, 1}, 64, 0, nullptr, out.data());
  for (size_t i = 0; i < 64; ++i) CHECK(out[i] == (i < 32 ? 496.0f : 1520.0f) * 2 + 16);
  CHECK(error() == "");
}

// Every element of a product of random matrices, as PTX's tables of fragments place them.
void multiply_fragments(const int8_t* a, const int8_t* b, int32_t* c) {  // a [16][32], b [8][32] by columns, c [16][8]
  const uint32_t lane = threadIdx.x, group = lane / 4, quarter = lane % 4;
  const auto word = [](const int8_t* p) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return v;
  };
  const int8_t *low = a + group * 32 + 4 * quarter, *high = low + 8 * 32, *column = b + group * 32 + 4 * quarter;
  int32_t sums[4] = {}, halves[4] = {};
  device::mma_k32(sums, word(low), word(high), word(low + 16), word(high + 16), word(column), word(column + 16));
  device::mma_k16(halves, word(low), word(high), word(column));
  device::mma_k16(halves, word(low + 16), word(high + 16), word(column + 16));
  for (uint32_t i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + 2 * quarter + i % 2] = sums[i] == halves[i] ? sums[i] : -1;
}

TEST_CASE("emulation: products of the tensor cores") {
  std::vector<int8_t> a(16 * 32), b(8 * 32);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(i * 37 % 255);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(i * 101 % 251);
  std::vector<int32_t> c(16 * 8);
  launch(multiply_fragments, {1, 1, 1}, 32, 0, nullptr, a.data(), b.data(), c.data());
  for (size_t r = 0; r < 16; ++r)
    for (size_t n = 0; n < 8; ++n) {
      int32_t want = 0;
      for (size_t k = 0; k < 32; ++k) want += a[r * 32 + k] * b[n * 32 + k];
      CHECK(c[r * 8 + n] == want);
    }
  CHECK(error() == "");
}

void miss_barrier(int) {
  if (threadIdx.x != 40) __syncthreads();
}
void miss_shuffle(int) {
  if (threadIdx.x % 32 != 7) __shfl_xor_sync(~0u, 1.0f, 1);
}
void differ(int) {
  if (threadIdx.x < 3) __syncwarp();
  else __shfl_xor_sync(~0u, 1.0f, 1);
}
void overrun(int) { device::shared<Numbers>().values[33 + threadIdx.x] = 1.0f; }
void meet_apart(int) { __syncthreads(); }

TEST_CASE("emulation: what a device leaves to chance is an error") {
  launch(miss_barrier, {1, 1, 1}, 64, 0, nullptr, 0);
  CHECK(error().find("do not come") != std::string::npos);
  launch(miss_shuffle, {1, 1, 1}, 64, 0, nullptr, 0);
  CHECK(error().find("do not come") != std::string::npos);
  launch(differ, {1, 1, 1}, 32, 0, nullptr, 0);
  CHECK(error().find("different things") != std::string::npos);
  launch(overrun, {1, 1, 1}, 32, sizeof(Numbers), nullptr, 0);
  CHECK(error().find("past shared memory") != std::string::npos);
  launch_apart(meet_apart, {1, 1, 1}, 32, nullptr, 0);
  CHECK(error().find("apart") != std::string::npos);
  launch(overrun, {1, 1, 1}, 33, sizeof(Numbers), nullptr, 0);
  CHECK(error().find("a block of so many threads") != std::string::npos);
  launch(miss_barrier, {1, 70000, 1}, 64, 0, nullptr, 0);
  CHECK(error().find("a grid larger") != std::string::npos);
  std::vector<float> x(64, 1.0f), y(64);  // and it works again
  launch(reverse_in_block, {1, 1, 1}, 64, sizeof(Numbers), nullptr, x.data(), y.data());
  CHECK(y == x);
  CHECK(error() == "");
}

void read_fresh(float* out) { out[threadIdx.x] = device::shared<Numbers>().values[threadIdx.x]; }

TEST_CASE("emulation: fresh shared memory is NaN in every block") {
  std::vector<float> out(64);
  launch(read_fresh, {2, 1, 1}, 64, sizeof(Numbers), nullptr, out.data());
  for (const float x : out) CHECK(std::isnan(x));
}

}  // namespace
}  // namespace duet::gpu
