// Conversion with calibration: a text is run through the model layer by layer, and every matrix is
// encoded with the second moments of its own inputs (quant/second_order.h) before the next is
// looked at.
//
// Two residual streams of all tokens are kept: that of the source weights and that of the weights
// encoded so far. Moments are those of the second, so that a matrix is fitted to the inputs it will
// get; targets are the outputs of the first, so that it makes up for what went before it, and
// matrices that write to the residual stream also for what it has drifted. Per layer: q, k, v; the
// output projection; then for each expert alone, over the tokens routed to it and weighted by the
// square of their router weights, gate and up, then down; an expert that no token chose is fitted to
// tokens from all over the text. At last the output head. The router and
// the norms stay as they are.
//
// Memory: four rows of n_embd floats per token (two of them as wide as all heads), one layer of
// encoded weights, the source matrices of one expert as floats, three rows of n_ff floats for each
// of 4096 tokens, and for one matrix at a time: itself and its change as floats, three squares of
// doubles and four of floats of n_cols, and, where it writes to the residual stream, two of n_embd
// x n_cols doubles. Squares are full up to 4096 columns, else in blocks of as many columns: errors
// then make up for each other within a block, and 512 tokens are kept in all columns (calibrate/moments.h);
// a limit makes blocks, pieces and the text smaller. Some 4 GB for a down projection of 4096 x 14336.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "converters/convert.h"

namespace duet {

// What their metadata say of files made here, in u32: how many tokens weights were fitted to. Such weights were moved, not only
// rounded.
inline constexpr std::string_view kCalibratedKey = "quantize.calibration.tokens_count";

struct CalibrationOptions {
  std::string text;
  size_t n_ctx = 512;  // tokens of a sequence; each begins with BOS where the vocabulary wants one
  size_t max_tokens = 0;  // 0: as many as 1 GiB of residual rows holds, or ram_bytes allow
  uint64_t ram_bytes = 0;  // most memory to take (calibrate/memory.h); 0: no limit
};

// As convert() and quantize() (converters/convert.h). Error(usage) when the text has less than a
// sequence, and for an importance matrix: inputs are measured here. Notices: tokens used; experts that saw few of them.
void convert_calibrated(const std::filesystem::path& folder, const std::filesystem::path& output,
                        const ConvertOptions& options, const CalibrationOptions& calibration);
// What they would write, as plan_convert() and plan_quantize(). With a size to hit (converters/target.h) the text decides
// types: what errors in each tensor cost is measured on it (calibrate/sensitivity.h); else it is not looked at.
ConvertPlan plan_convert_calibrated(const std::filesystem::path& folder, const ConvertOptions& options,
                                    const CalibrationOptions& calibration);
ConvertPlan plan_quantize_calibrated(const std::filesystem::path& input, const ConvertOptions& options,
                                     const CalibrationOptions& calibration);
void quantize_calibrated(const std::filesystem::path& input, const std::filesystem::path& output,
                         const ConvertOptions& options, const CalibrationOptions& calibration);

}  // namespace duet
