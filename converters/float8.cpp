#include "converters/float8.h"

#include <memory>
#include <vector>

#include "base/error.h"
#include "quant/float8.h"

namespace duet {
namespace {

constexpr uint64_t kBlock = 128;

uint64_t n_blocks(uint64_t n) { return (n + kBlock - 1) / kBlock; }

const TensorView& find_scales(const Safetensors& weights, const TensorView& tensor) {
  for (const char* ending : {"_scale", "_scale_inv"})
    if (const TensorView* scales = weights.find_tensor(tensor.name + ending)) return *scales;
  fail(ErrorKind::format, "tensor '", tensor.name, "' is of 8-bit floats, but '", tensor.name, "_scale' and '", tensor.name,
       "_scale_inv' are missing");
}

// Which of the numbers belongs to element (row, column).
struct Grid {
  uint64_t matrix_rows, blocks_down, blocks_across;  // of a matrix of the stack
  uint64_t block_rows, block_cols;

  uint64_t index(uint64_t row, uint64_t block) const {
    return (row / matrix_rows * blocks_down + row % matrix_rows / block_rows) * blocks_across + block;
  }
};

Grid find_grid(const TensorView& tensor, const TensorView& scales) {
  const uint64_t cols = tensor.cols(), rows = tensor.shape.size() < 2 ? 1 : tensor.shape[tensor.shape.size() - 2];
  const uint64_t n_matrices = tensor.rows() / rows, n = scales.n_elems();
  std::vector<uint64_t> by_row(tensor.shape.begin(), tensor.shape.end() - 1), by_row_and_one = by_row;
  by_row_and_one.push_back(1);
  if (n == 1) return {tensor.rows(), 1, 1, tensor.rows(), cols};
  if (scales.shape == by_row || scales.shape == by_row_and_one) return {rows, rows, 1, 1, cols};
  if (n == n_matrices * n_blocks(rows) * n_blocks(cols) && scales.cols() == n_blocks(cols))
    return {rows, n_blocks(rows), n_blocks(cols), kBlock, kBlock};
  if (n == n_matrices) return {rows, 1, 1, rows, cols};
  fail(ErrorKind::format, "tensor '", scales.name, "' has ", n, " scales for '", tensor.name, "' of ", n_matrices, " x ", rows, " x ", cols,
       " elements; expected one, one per matrix or row, or one per block of ", kBlock, " x ", kBlock);
}

}  // namespace

RowChange float8_scales(const Safetensors& weights, const TensorView& tensor, std::string& scale_name) {
  if (tensor.format != &f8_e4m3()) return {};
  const TensorView& scales = find_scales(weights, tensor);
  scale_name = scales.name;
  const Grid grid = find_grid(tensor, scales);
  auto values = std::make_shared<std::vector<float>>(scales.n_elems());
  scales.format->decode_row(scales.data.data(), values->data(), values->size());
  return [grid, values, cols = tensor.cols()](uint64_t row, float* out) {
    for (uint64_t c = 0; c < cols; ++c) out[c] *= (*values)[grid.index(row, c / grid.block_cols)];
  };
}

}  // namespace duet
