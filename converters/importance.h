// Importance matrices for quantizers (formats/imatrix.h): which job gets what.
#pragma once

#include <vector>

#include "converters/convert.h"
#include "converters/quantize.h"

namespace duet {

// Nothing without options.imatrix. Else gives every job that will be quantized its importance and adds
// the quantize.imatrix.* keys. Notices: tensors and experts that it has no data for (tensors are then
// quantized without, experts with the mean of the layer's others). Error: io, format (damaged, or of
// another model).
void apply_imatrix(const ConvertOptions& options, const HParams& hparams,
                   std::vector<TensorJob>& jobs, std::vector<GgufKeyValue>& metadata);

}  // namespace duet
