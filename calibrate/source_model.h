// The tensors of a conversion's source as weights that a layer is evaluated with.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "converters/source.h"
#include "runtime/model.h"

namespace duet {

// A matrix of the source: in place where the kernels read it as it is, else as floats.
struct SourceMatrix {
  Weight weight;
  std::vector<float> values;
};

class SourceModel {
 public:
  explicit SourceModel(const ConversionSource& source);  // must outlive it

  bool has(TensorKind kind, int layer) const { return index_.contains({kind, layer}); }
  // Index of a tensor among the jobs, the job; Error(internal) when the model has none.
  size_t job_index(TensorKind kind, int layer) const;
  const TensorJob& job(TensorKind kind, int layer) const;
  bool is(size_t job_index, TensorKind kind) const;
  // Layer of a job; -1: of none.
  int layer_of(size_t job_index) const { return layers_[job_index]; }

  // One expert's matrix, or that of a tensor without experts (expert 0).
  SourceMatrix matrix(const TensorJob& job, size_t expert) const;
  std::vector<float> vector(TensorKind kind, int layer) const {
    return floats(job(kind, layer), 0, 1);
  }
  // Rows of the output tensor, decoded; Error(format) when a value is not finite.
  static std::vector<float> floats(const TensorJob& job, uint64_t first_row, uint64_t n_rows);
  // Row `row` of the output tensor as it is stored there, without calibration: bit for bit where
  // the source has the same format. Error(format) when a value is too large for it.
  static void store_row(const TensorJob& job, uint64_t row, std::byte* out);
  void drop(const TensorJob& job) const;  // its pages will not be read again

 private:
  const ConversionSource& source_;
  std::map<std::pair<TensorKind, int>, size_t> index_;
  std::vector<int> layers_;
};

// Rows of one matrix of a tensor, and how many it has.
size_t matrix_rows(const TensorJob& job);
size_t matrix_count(const TensorJob& job);

}  // namespace duet
