// Adapters merged into the tensors of a conversion.
#pragma once

#include "converters/convert.h"
#include "converters/source.h"

namespace duet {

// options.loras: adds what they say to the rows of the source's jobs. Errors as of read_lora().
void apply_loras(const ConvertOptions& options, ConversionSource& source);

}  // namespace duet
