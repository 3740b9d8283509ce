// What errors in each tensor cost: its share of a file of given size follows from it (converters/target.h).
//
// A few sequences go through the source model, layer by layer. At every tensor whose type is to be chosen a copy of
// their residual rows branches off, for which this tensor alone is encoded coarsely, and goes on through the source
// model to the logits. The mean divergence of a copy's predictions from those of the original, over the tensor's
// relative_error(), is the tensor's sensitivity: small divergences are proportional to squared errors and add up. How many
// tokens that are is said in a notice.
//
// Memory: two rows of n_embd floats per token and tensor, as many tokens as kSensitivityTokens and 1 GiB (or half of
// ram_bytes) allow but at least a sequence of 128; one expert's matrix as floats; logits of the tokens. The source is read once,
// more often where so few tokens are allowed that it takes several rounds to look at 512.
#pragma once

#include <span>
#include <vector>

#include "converters/source.h"
#include "runtime/tokenizer.h"

namespace duet {

inline constexpr size_t kSensitivityTokens = 2048;

// Per job; 0 where the type is not to be chosen. ids: whole sequences of n_ctx. Error(format) when predictions are not finite.
std::vector<double> measure_sensitivity(const ConversionSource& source, std::span<const Token> ids, size_t n_ctx,
                                        uint64_t ram_bytes, const ConvertOptions& options);

}  // namespace duet
