// A stream of tensors -> blocks in a GGUF file: the engine under convert and quantize.
//
// Each tensor is cut into chunks of whole rows. All cores decode and encode the rows of one chunk
// while a writer thread writes the chunk before and the kernel reads the chunk after ahead; source
// pages are given back when used. Memory: three chunks of blocks plus one float row per thread,
// whatever the size of the model.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "converters/convert.h"
#include "converters/recipe.h"
#include "formats/tensor.h"

namespace duet {

// Changes a row in place.
using RowChange = std::function<void(uint64_t row, float* values)>;

// Rows from one source tensor (or a slice of one), appended to those of the run before.
struct RowRun {
  TensorView source;  // borrowed; [rows(), cols()], cols as in the output tensor
  // Rows of q and k: Hugging Face rotates pairs (i, i + head_dim/2), GGUF "llama" pairs (2i, 2i+1).
  // Number of heads to reorder the rows of; 0: rows stay as they are.
  uint32_t permute_heads = 0;
  std::function<void(const TensorView&)> drop = {};  // gives pages back; may be null
  bool transposed = false;  // the source is [cols(), rows()]
  RowChange scale = {};     // of a row of the source, as it was stored; may be null
  RowChange add = {};       // then, of a row of the output tensor: `row` counts from the first of the run

  uint64_t rows() const { return transposed ? source.cols() : source.rows(); }
  uint64_t cols() const { return transposed ? source.rows() : source.cols(); }
  // The bytes of a source row are those of its values.
  bool is_plain() const { return !transposed && !scale && !add; }
  // Rows come in another order than they lie in the file.
  bool is_scattered() const { return transposed || permute_heads != 0; }
  uint64_t source_row(uint64_t row) const;  // of a run that is not transposed
};

// Rows [first, first + n) that a run gives, as values.
void read_rows(const RowRun& run, uint64_t first, uint64_t n, float* out);

struct TensorJob {
  std::string name;
  const Format* format = nullptr;  // of the output
  std::vector<uint64_t> shape;     // row-major
  std::vector<RowRun> runs = {};   // together exactly the rows of `shape`
  // A NaN or infinity in the source is an error; false: only where values are rounded, not where they are copied or
  // unpacked to floats.
  bool must_be_finite = true;
  // Weights of squared errors, [n_matrices, cols], each for an equal share of the rows; empty: none.
  std::vector<float> importance = {};
};

// Where a row of the output tensor comes from.
struct SourceRow {
  const RowRun* run;
  uint64_t row;  // of those that the run gives
};
SourceRow find_row(const TensorJob& job, uint64_t row);
// Error(format) for a row of a source tensor with a value that the format has no number for.
[[noreturn]] void fail_too_large(const std::string& tensor, uint64_t row, const Format& format);
uint64_t source_bytes(const TensorJob& job);  // of all runs
uint64_t output_bytes(const TensorJob& job);  // of all rows, encoded

// Row of the source from which output row `row` comes. [n_heads * head_dim] rows.
uint64_t rope_source_row(uint64_t row, uint64_t n_rows, uint32_t n_heads);

// rows [first, first + n) of a view, as a view of the same name.
TensorView row_slice(const TensorView& view, uint64_t first, uint64_t n);

// The plan that the jobs amount to, without file header.
ConvertPlan plan_of(const std::vector<TensorJob>& jobs, const std::string& recipe);

// How these options and jobs have an output begun or gone on with. source: which files the jobs read
// (ConversionSource::identity); settings: what else the bytes depend on, beside names, types and metadata.
PartOptions part_options(const ConvertOptions& options, const std::vector<TensorJob>& jobs, const std::string& source, const std::string& settings);

// Writes the whole file: metadata, then every job. Throws Error: format (a source value that is
// not finite, naming tensor and row), io, cancelled. It is complete; the caller publishes it, when all else
// that belongs to it is.
std::unique_ptr<GgufWriter> write_gguf(const std::filesystem::path& output, const std::vector<GgufKeyValue>& metadata,
                                       const std::vector<TensorJob>& jobs, const std::string& source, const ConvertOptions& options);

// Error(io) when output exists and may not be replaced.
void check_overwrite(const std::filesystem::path& output, bool overwrite);
// The same; options.resume accepts one that an interrupted run had just completed.
void check_overwrite(const std::filesystem::path& output, const ConvertOptions& options);
// options.n_threads, or what the host allows.
int thread_count(int n_threads);

}  // namespace duet
