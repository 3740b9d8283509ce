// A look at the inputs of the matrix products of the forward pass, for calibration.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string_view>

#include "formats/schema.h"

namespace duet {

// Rows that one weight multiplies: floats, before any 8-bit quantization.
struct ProductInput {
  TensorKind kind;
  int layer = -1;           // -1: not of a layer
  std::string_view tensor;  // tensor_name(kind, layer): the merged name for experts of old files too
  int expert = -1;          // -1: the tensor is one matrix
  size_t n_rows = 0, cols = 0;
  const float* rows = nullptr;             // [n_rows, cols]
  std::span<const float> router_weights;   // [n_rows] what each row's result is multiplied by; empty: 1
};

// Called before the product (experts that are read from the file: as they come) by the thread that
// evaluates, outside of its parallel loops, so that base/parallel.h works inside. Weights that
// multiply the same rows (q, k and v; gate and up) are told one after the other with the same
// `rows`. The rows of an expert come in one call per chunk, those of its down projection in
// one or more. Tied output heads have the kind `output`. What it throws ends the evaluation.
using ProductObserver = std::function<void(const ProductInput&)>;

}  // namespace duet
