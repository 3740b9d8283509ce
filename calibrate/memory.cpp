#include "calibrate/memory.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/units.h"
#include "calibrate/moments.h"
#include "calibrate/source_model.h"

namespace duet {
namespace {

constexpr uint64_t kStreamBytes = uint64_t{1} << 30;
constexpr size_t kFewestSequences = 16;
// Code, kernels' scratch, metadata, vocabulary.
constexpr uint64_t kOwnBytes = uint64_t{64} << 20;

// Of one token, while a layer is at work: two residuals, and either all heads of both or what experts add.
uint64_t token_bytes(const HParams& h) {
  const uint64_t heads = uint64_t{h.n_head} * h.head_dim, embd = h.n_embd;
  return sizeof(float) * (2 * embd + std::max(2 * heads, embd));
}

// The tensors of the layer with most of them, or one tensor of no layer.
uint64_t most_encoded(const ConversionSource& source) {
  const SourceModel model(source);
  std::map<int, uint64_t> layers;
  uint64_t most = 0;
  for (size_t i = 0; i < source.jobs.size(); ++i) {
    const int layer = model.layer_of(i);
    const uint64_t n = output_bytes(source.jobs[i]);
    most = std::max(most, layer < 0 ? n : layers[layer] += n);
  }
  return most;
}

// One matrix being encoded: itself, its change and its corrected side, squares in blocks, sums for the residual stream,
// tokens in all columns where there are several blocks.
uint64_t matrix_bytes(const TensorJob& job, const HParams& h, size_t moment_cols) {
  const uint64_t rows = matrix_rows(job), cols = job.shape.back(), width = std::min<uint64_t>(cols, moment_cols);
  const uint64_t squares = cols * width * (3 * sizeof(double) + 4 * sizeof(float)) + width * width * sizeof(double);
  const bool to_residual = rows == h.n_embd;
  const uint64_t sample = Moments::sample_bytes(cols, moment_cols, to_residual ? rows : 0);
  return 2 * rows * cols * sizeof(float) + squares + (to_residual ? 2 * rows * cols * sizeof(double) : 0) +
         rows * cols * sizeof(float) + sample;
}

// Rows of a chunk at the widest place: inputs, hidden rows of both streams, their columns and transposes.
uint64_t chunk_bytes(const HParams& h, size_t chunk_tokens) {
  return uint64_t{chunk_tokens} * sizeof(float) * (6 * uint64_t{h.n_embd} + 6 * uint64_t{h.n_ff});
}

}  // namespace

uint64_t calibration_bytes(const ConversionSource& source, const CalibrationSizes& sizes) {
  uint64_t matrix = 0, expert = 0;
  for (const TensorJob& job : source.jobs) {
    if (job.shape.size() < 2) continue;
    matrix = std::max(matrix, matrix_bytes(job, source.hparams, sizes.moment_cols));
    expert = std::max(expert, 3 * uint64_t{matrix_rows(job)} * job.shape.back() * sizeof(float));
  }
  return kOwnBytes + sizes.max_tokens * token_bytes(source.hparams) + most_encoded(source) + matrix + expert +
         chunk_bytes(source.hparams, sizes.chunk_tokens);
}

CalibrationSizes plan_calibration(const ConversionSource& source, size_t n_ctx, size_t n_tokens, uint64_t ram_bytes) {
  CalibrationSizes sizes;
  const uint64_t rows = token_bytes(source.hparams), fewest = std::min(kFewestSequences * n_ctx, n_tokens);
  if (ram_bytes == 0) {
    sizes.max_tokens = kStreamBytes / (2 * source.hparams.n_embd * sizeof(float));
    return sizes;
  }
  for (const size_t chunk : {size_t{4096}, size_t{1024}, size_t{256}}) {
    for (size_t cols = 4096; cols >= 256; cols /= 2) {
      sizes = {0, cols, chunk};
      const uint64_t fixed = calibration_bytes(source, sizes);
      if (fixed + fewest * rows > ram_bytes) continue;
      sizes.max_tokens = (ram_bytes - fixed) / rows;
      return sizes;
    }
  }
  sizes.max_tokens = fewest;
  fail(ErrorKind::memory, "calibration needs at least ", format_size(calibration_bytes(source, sizes)), " for this model, ",
       format_size(ram_bytes), " are allowed; give more, or convert without --calibrate");
}

}  // namespace duet
