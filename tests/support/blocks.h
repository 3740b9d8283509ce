// Random weight rows of any format.
#pragma once

#include "quant/format.h"
#include "tests/support/close.h"

namespace duet::test {

// n elements at dst: random quants, block scales and minimums finite and of one magnitude.
void fill_random_weights(const Format& format, void* dst, size_t n, Rng& rng);

// As above with every block scale `d` and minimum `dmin`/`m` set to the halves given.
void fill_weights_with_scale(const Format& format, void* dst, size_t n, uint16_t d, uint16_t dmin,
                             Rng& rng);

// Byte offsets of the half-precision fields in a block of a quantized format; -1 where absent.
struct ScaleFields {
  int d = -1, dmin = -1;
};
ScaleFields scale_fields(DType dtype);

}  // namespace duet::test
