// Importance matrices: how large the inputs of each weight matrix are, column by column, measured by
// running a model over a text. They weight the squared errors of quantizers.
//
// GGUF form (llama-imatrix): for each matrix two F32 tensors, "NAME.in_sum2" [n_matrices, cols], the
// sums of squared inputs, and "NAME.counts" [n_matrices, 1], the rows summed over; n_matrices is 1, or
// the number of experts of a merged tensor. Keys general.type "imatrix", imatrix.datasets,
// imatrix.chunk_count, imatrix.chunk_size.
// Legacy form (.dat): i32 n_entries; per entry i32 length, name, i32 n_calls, i32 n_values,
// f32 values[n_values] = n_calls * mean square (1 instead of a mean for experts without data); then
// optionally i32 n_chunks, i32 length, name of the text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/schema.h"

namespace duet {

struct ImatrixEntry {
  std::vector<float> sums;      // [n_matrices, cols] of squares
  std::vector<float> counts;    // [n_matrices] rows; legacy: one count for all

  size_t n_matrices() const { return counts.size(); }
};

struct Imatrix {
  std::map<std::string, ImatrixEntry> entries;  // by tensor name with ".weight"
  std::vector<std::string> datasets;
  uint32_t n_chunks = 0, chunk_size = 0;
  bool legacy = false;
};

// Either form. Error: io, format (damage, values that are negative or not finite, pieces that do not
// belong together).
Imatrix read_imatrix(const std::filesystem::path& path);
Imatrix parse_imatrix(std::span<const std::byte> bytes, const std::string& source);
// The GGUF form. Error(io).
void write_imatrix(const std::filesystem::path& path, const Imatrix& imatrix);

// Mean squares of the inputs of one tensor of a model.
struct TensorImportance {
  std::vector<float> weights;        // [n_matrices, cols]
  std::vector<size_t> without_data;  // matrices (experts) nothing is known of: they have the mean of the others
};
// By the merged name or the names of the experts' own tensors (old files). Nothing when the imatrix has
// no data for the tensor; Error(format) when what it has is of another shape.
std::optional<TensorImportance> find_importance(const Imatrix& imatrix, const TensorSpec& spec, const std::string& source);

}  // namespace duet
