// Reading .npy files of little-endian float32, C order: the form of the golden data.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <vector>

namespace duet::test {

struct NpyArray {
  std::vector<size_t> shape;
  std::vector<float> data;  // row-major

  // The i-th slice along the first dimension.
  std::span<const float> operator[](size_t i) const {
    const size_t n = data.size() / shape[0];
    return std::span(data).subspan(i * n, n);
  }
};

// Throws Error(format) on anything else.
NpyArray read_npy(const std::filesystem::path& path);

}  // namespace duet::test
