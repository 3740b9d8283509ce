// The scales of weights stored as 8-bit floats, in a tensor beside them: NAME_scale or NAME_scale_inv, by both of
// which the weights are to be multiplied. One number, one per matrix of a stack, one per row, or one per block of
// 128 x 128 elements (the last ones of a row or column may be cut).
#pragma once

#include <cstdint>
#include <string>

#include "converters/quantize.h"
#include "formats/safetensors.h"

namespace duet {

// Of a tensor [.., rows, cols] of those floats; a null function for a tensor of another format. The row counts
// from the first of the tensor. scale_name: of the tensor used. Error(format): no scales, or of a shape that does
// not fit.
RowChange float8_scales(const Safetensors& weights, const TensorView& tensor, std::string& scale_name);

}  // namespace duet
