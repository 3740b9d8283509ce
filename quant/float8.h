// 8-bit floats of safetensors files.
#pragma once

#include "quant/format.h"

namespace duet {

// 1 sign, 4 exponent and 3 mantissa bits, bias 7, no infinities; the scales are in a tensor of their own. It
// decodes only and is no format of GGUF: not in the table, and its id is one that ggml has retired.
const Format& f8_e4m3();

}  // namespace duet
