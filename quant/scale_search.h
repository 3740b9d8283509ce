// Weighted least-squares search for the scales of block formats.
//
// A group of elements is approximated by scale * q + offset with integers lo <= q <= hi; what is
// minimised is the sum of w (x - scale q - offset)^2. The search for one group: a set of
// candidate grids, each followed by the exact least-squares scale and offset for its integers, and
// alternating refinement of the best. For super-blocks, whose group scales are small integers times
// a half-precision unit, the integers are then searched around the real optimum against the
// true error, and the units re-solved for the integers found, until nothing improves.
//
// Deterministic: no threads, no randomness, one rounding per operation. All scales returned are
// finite half-precision numbers; values that would need larger ones saturate. Non-finite input
// counts as zero. Groups all below 1e-9 are encoded as zero (half-precision scales end at 6e-8).
#pragma once

#include <cstddef>
#include <cstdint>

namespace duet {

// x ~= d * scale[g] * q - dmin * min[g], for 256 elements in 256 / group_elems groups g.
struct AffineSuperFit {
  uint16_t d, dmin;  // IEEE half
  uint8_t scale[16] = {}, min[16] = {};  // of fewer groups: the first ones
  uint8_t q[256];
};
struct AffineSuperSpec {
  int group_elems;  // 16 or 32
  int q_max;        // q in [0, q_max]
  int scale_max;    // scale and min in [0, scale_max]
};
void fit_affine_super(const AffineSuperSpec& spec, const float* x, const float* importance,
                      AffineSuperFit& fit);

// x ~= d * scale[g] * (q - zero), for 256 elements in groups g of 16.
struct SymmetricSuperFit {
  uint16_t d;  // IEEE half
  int8_t scale[16];
  uint8_t q[256];
};
struct SymmetricSuperSpec {
  int zero;       // q in [0, 2 zero - 1]
  int scale_max;  // scale in [-scale_max - 1, scale_max]
};
void fit_symmetric_super(const SymmetricSuperSpec& spec, const float* x, const float* importance,
                         SymmetricSuperFit& fit);

// x ~= d * (q - zero) + m, for each of n_blocks <= 4 blocks of 32 elements with scales of their
// own.
struct BlockFit {
  uint16_t d, m;  // IEEE half; m = 0 unless the spec has an offset
  uint8_t q[32];
};
struct BlockSpec {
  int q_max;        // q in [0, q_max]
  bool has_offset;  // true: zero = 0 and m is free; false: zero = (q_max + 1) / 2
};
void fit_blocks(const BlockSpec& spec, const float* x, const float* importance, size_t n_blocks,
                BlockFit* fit);

}  // namespace duet
