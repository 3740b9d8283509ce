// A tensor in a file: non-owning view.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "quant/format.h"

namespace duet {

// Valid while the file it came from stays open. shape is row-major, outermost dimension first
// (GGUF's reversed ne[] order exists only inside formats/gguf*). data.size() is exactly the size
// that shape and format demand.
struct TensorView {
  std::string name;
  const Format* format = nullptr;
  std::vector<uint64_t> shape;  // 1..4 dimensions, each > 0
  std::span<const std::byte> data;

  uint64_t n_elems() const {
    uint64_t n = 1;
    for (uint64_t d : shape) n *= d;
    return n;
  }
  uint64_t cols() const { return shape.back(); }
  uint64_t rows() const { return n_elems() / shape.back(); }
};

}  // namespace duet
