// Shared by kernel tests: how close is close, seeded random numbers, buffers that trap over-reads.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

namespace duet::test {

// Bound on |got - exact| for a sum of products in float, abs_sum = sum of |w * x| (for weights
// d * q - m: of |d * q * x| + |m * x|). The factor covers the rounding of each product and scale
// and of partial sums a few hundred terms long; an indexing or scale error is orders above it.
inline double sum_bound(double abs_sum) {
  constexpr double kFactor = 32.0;
  return kFactor * double{std::numeric_limits<float>::epsilon()} * abs_sum;
}

// splitmix64: the same numbers on every machine.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>(next() % n); }
  // Uniform in [-1, 1).
  float symmetric() { return static_cast<float>(static_cast<int64_t>(next()) >> 40) * 0x1p-23f; }
  void fill(std::span<std::byte> bytes) {
    for (std::byte& b : bytes) b = static_cast<std::byte>(next() & 255u);
  }

 private:
  uint64_t state_;
};

// Bytes between two inaccessible pages: reading or writing one byte past the guarded end is a
// crash.
class GuardedBuffer {
 public:
  enum class Side { after, before };  // which end touches an inaccessible page
  explicit GuardedBuffer(size_t bytes, Side side = Side::after);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  std::span<std::byte> bytes() const { return {data_, size_}; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* map_;
  size_t map_bytes_;
  std::byte* data_;
  size_t size_;
};

}  // namespace duet::test
