#include "quant/group_search.h"

#include <algorithm>
#include <cmath>

#include "quant/f16.h"
#include "quant/group_lanes.h"

namespace duet {
namespace {

// Of formats without stored scales, in parts of the unit.
constexpr float kUnitStep = 0.015f, kOffsetStep = 0.1f;

GroupScale with_values(const BlockGrid& grid, uint16_t unit, uint16_t offset_unit, int scale,
                       int offset) {
  return {unit,
          offset_unit,
          static_cast<int16_t>(scale),
          static_cast<int16_t>(offset),
          f16_to_f32(unit) * static_cast<float>(scale),
          grid.offset_sign * (f16_to_f32(offset_unit) * static_cast<float>(offset))};
}

uint16_t finite_half(float v) { return f32_to_f16(std::clamp(v, -kF16Max, kF16Max)); }

}  // namespace

int nearest_level(const BlockGrid& grid, float v) {
  using Lanes = GroupLanes<4>;
  Lanes::Vec q, level;
  Lanes::nearest(grid, Lanes::splat(v), q, level);
  return static_cast<int>(q[0]);
}

GroupScale group_scale(const BlockGrid& grid, const BlockParts& parts, size_t g) {
  return with_values(grid, parts.unit, parts.offset_unit, parts.scale[g], parts.offset[g]);
}

void list_scales(const BlockGrid& grid, const BlockParts& parts, size_t g, Reach reach,
                 std::vector<GroupScale>& out) {
  const bool stored = grid.scale_lo < grid.scale_hi;
  const float unit = f16_to_f32(parts.unit), offset_unit = f16_to_f32(parts.offset_unit);
  if (grid.offset_max == 0) reach.offset = 0;
  out.clear();
  out.push_back(group_scale(grid, parts, g));
  for (int a = -reach.scale; a <= reach.scale; ++a) {
    for (int b = -reach.offset; b <= reach.offset; ++b) {
      if (a == 0 && b == 0) continue;
      const int scale = parts.scale[g] + a, offset = parts.offset[g] + b;
      if (!stored) {
        const float stretched = unit * (1 + kUnitStep * static_cast<float>(a));
        const float moved = offset_unit + kOffsetStep * static_cast<float>(b) * std::fabs(unit);
        out.push_back(with_values(grid, finite_half(stretched), finite_half(moved), parts.scale[g],
                                  parts.offset[g]));
      } else if (scale >= grid.scale_lo && scale <= grid.scale_hi && offset >= 0 &&
                 offset <= grid.offset_max) {
        out.push_back(with_values(grid, parts.unit, parts.offset_unit, scale, offset));
      }
    }
  }
}

}  // namespace duet
