// A block taken apart into units, scales and integers, and put together again: what a search over
// scales and integers of any block format works on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/format.h"

namespace duet {

// Element i, of group g = i / group_elems, has the value
//   unit * scale[g] * level(q[i]) + offset_sign * offset_unit * offset[g],
// level(q) = q - zero, or an entry of a table.
struct BlockParts {
  uint16_t unit = 0, offset_unit = 0;  // IEEE half
  int16_t scale[16] = {}, offset[16] = {};
  uint8_t q[256] = {};
};

// Which values the parts of a format may have. Units are free (half precision, not negative where
// `unit_positive`); a format without stored scales has scale_lo = scale_hi = 1.
struct BlockGrid {
  int group_elems, n_groups;
  int q_max, zero;  // q in [0, q_max]
  int scale_lo, scale_hi;
  int offset_max;  // offset in [0, offset_max]; 0: none
  float offset_sign;
  bool unit_positive;
  void (*unpack)(const void* block, BlockParts& parts) noexcept;
  void (*pack)(const BlockParts& parts, void* block) noexcept;
  const int8_t* levels = nullptr;  // ascending, q_max + 1 of them; null: q - zero

  float level(int q) const { return static_cast<float>(levels != nullptr ? levels[q] : q - zero); }
};

// Null for formats without blocks, and for those that have no such form.
const BlockGrid* block_grid(DType dtype);

}  // namespace duet
