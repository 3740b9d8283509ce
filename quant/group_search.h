// Scale, offset and integers of one group of a block, chosen together: what there is to choose from.
// The choice itself: quant/fit_ops.h.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "quant/block_parts.h"

namespace duet {

inline constexpr size_t kMaxGroup = 32;

// A way to encode a group: value = s * level(q) + o.
struct GroupScale {
  uint16_t unit, offset_unit;  // IEEE half
  int16_t scale, offset;
  float s, o;
};
GroupScale group_scale(const BlockGrid& grid, const BlockParts& parts, size_t g);

// Steps of scale and offset to either side of the present ones.
struct Reach {
  int scale, offset;
};
// The present scale first: it stays where nothing is better. Formats that store no scales for
// groups vary their units instead, by small parts.
void list_scales(const BlockGrid& grid, const BlockParts& parts, size_t g, Reach reach,
                 std::vector<GroupScale>& out);

// Values x of the group's columns, the upper triangular factor of their metric (element k of row i
// at factor[i * stride + k]), and what errors of other columns have added to the sum at each
// column: the cost of errors e is the sum over k of (before_k + sum over i <= k of e_i
// factor_ik)^2.
struct GroupProblem {
  const float *x, *factor;
  size_t stride;
  const float* before;
};
struct GroupChoice {
  float cost = FLT_MAX;
  GroupScale scale{};
  uint8_t q[kMaxGroup];
};
// The q whose level is nearest to v, which is finite.
int nearest_level(const BlockGrid& grid, float v);

}  // namespace duet
