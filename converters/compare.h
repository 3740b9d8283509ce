// How far the weights of one model are from those of another, tensor by tensor.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "converters/convert.h"

namespace duet {

// Of tensors of the merged layout. Types: one name, or several joined by "+" where experts differ.
struct TensorDifference {
  std::string name, type_a, type_b;
  uint64_t n_elems = 0, bytes_a = 0, bytes_b = 0;
  double rmse = 0;       // root of the mean square of b - a
  double rms = 0;        // of a
  double max_error = 0;  // |b - a|, in row worst_row
  uint64_t worst_row = 0;

  // Infinite where either has values that are not finite.
  double relative() const {
    if (!std::isfinite(rmse)) return HUGE_VAL;
    return rms > 0 ? rmse / rms : rmse > 0 ? 1 : 0;
  }
};

struct ModelDifference {
  std::vector<TensorDifference> tensors;      // of both, in the order of a
  std::vector<std::string> only_a, only_b;
  uint64_t bytes_a = 0, bytes_b = 0;          // of all tensors
};

struct CompareOptions {
  int n_threads = 0;  // 0: HostCores::usable()
  NoticeFn notice;
  std::function<void(const ConvertProgress&)> progress;
  const std::atomic<bool>* cancel = nullptr;  // true -> Error(cancelled)
};

// Each a GGUF file of any layout or a Hugging Face folder. Error: of reading them; format when a tensor
// has another shape in b.
ModelDifference compare_models(const std::filesystem::path& a, const std::filesystem::path& b, const CompareOptions& options);

}  // namespace duet
