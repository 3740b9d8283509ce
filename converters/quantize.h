// A stream of tensors -> blocks in a GGUF file: the engine under convert and quantize.
//
// Each tensor is cut into chunks of whole rows. All cores decode and encode the rows of one chunk
// while a writer thread writes the chunk before and the kernel reads the chunk after ahead; source
// pages are given back when used. Memory: three chunks of blocks plus one float row per thread,
// whatever the size of the model.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "converters/convert.h"
#include "converters/recipe.h"
#include "formats/tensor.h"

namespace duet {

// Rows from one source tensor (or a slice of one), appended to those of the run before.
struct RowRun {
  TensorView source;  // borrowed; rows() x cols(), cols as in the output tensor
  // Rows of q and k: Hugging Face rotates pairs (i, i + head_dim/2), GGUF "llama" pairs (2i, 2i+1).
  // Number of heads to reorder the rows of; 0: rows stay as they are.
  uint32_t permute_heads = 0;
  std::function<void(const TensorView&)> drop = {};  // gives pages back; may be null
};

struct TensorJob {
  std::string name;
  const Format* format = nullptr;  // of the output
  std::vector<uint64_t> shape;     // row-major
  std::vector<RowRun> runs = {};   // together exactly the rows of `shape`
  bool must_be_finite = true;      // a NaN or infinity in the source is an error
  // Weights of squared errors, [n_matrices, cols], each for an equal share of the rows; empty: none.
  std::vector<float> importance = {};
};

// Where a row of the output tensor comes from.
struct SourceRow {
  const RowRun* run;
  uint64_t row;  // of run->source

  const std::byte* data() const {
    return run->source.data.data() + row * row_bytes(*run->source.format, run->source.cols());
  }
};
SourceRow find_row(const TensorJob& job, uint64_t row);
uint64_t source_bytes(const TensorJob& job);  // of all runs

// Row of the source from which output row `row` comes. [n_heads * head_dim] rows.
uint64_t rope_source_row(uint64_t row, uint64_t n_rows, uint32_t n_heads);

// rows [first, first + n) of a view, as a view of the same name.
TensorView row_slice(const TensorView& view, uint64_t first, uint64_t n);

// The plan that the jobs amount to, without file header.
ConvertPlan plan_of(const std::vector<TensorJob>& jobs, const std::string& recipe);

// Writes the whole file: metadata, then every job. Throws Error: format (a source value that is
// not finite, naming tensor and row), io, cancelled; nothing is left behind then.
void write_gguf(const std::filesystem::path& output, const std::vector<GgufKeyValue>& metadata,
                const std::vector<TensorJob>& jobs, const ConvertOptions& options);

// Error(io) when output exists and may not be replaced.
void check_overwrite(const std::filesystem::path& output, bool overwrite);
// options.n_threads, or what the host allows.
int thread_count(int n_threads);

}  // namespace duet
