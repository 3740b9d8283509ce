// What a calibration may keep in memory at once, so that it stays within a limit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "converters/source.h"

namespace duet {

// Without a limit: residual rows of 1 GiB, full squares of moments up to 4096 columns.
struct CalibrationSizes {
  size_t max_tokens = 0;       // whole sequences that residual rows are kept for
  size_t moment_cols = 4096;   // columns of a square of second moments; wider matrices get several
  size_t chunk_tokens = 4096;  // tokens looked at together
};

// The largest sizes that calibration_bytes() keeps below ram_bytes (0: no limit): rather more tokens than full squares
// where both do not fit, at least 16 sequences of n_ctx. Error(memory) with what is needed at least. n_tokens: of the text.
CalibrationSizes plan_calibration(const ConversionSource& source, size_t n_ctx, size_t n_tokens, uint64_t ram_bytes);

// Most memory that a calibration of these sizes takes, beside the pages of the source, which the kernel may drop.
uint64_t calibration_bytes(const ConversionSource& source, const CalibrationSizes& sizes);

}  // namespace duet
