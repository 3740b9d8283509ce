#include "quant/group_search.h"

#include <algorithm>
#include <cmath>

#include "quant/f16.h"

namespace duet {
namespace {

using Vec = float __attribute__((vector_size(16)));  // one lane per scale tried
constexpr size_t kLanes = 4;
Vec splat(float v) { return Vec{v, v, v, v}; }
// Nearest integer, ties to even, for |v| < 2^22.
Vec round_even(Vec v) { return (v + 12582912.0f) - 12582912.0f; }

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

// q of the level nearest to v, and the level.
void nearest(const BlockGrid& grid, Vec v, Vec& q, Vec& level) {
  const Vec lo = splat(grid.level(0)), hi = splat(grid.level(grid.q_max));
  if (grid.levels == nullptr) {
    level = round_even(v < lo ? lo : (v > hi ? hi : v));
    q = level - lo;
    return;
  }
  q = splat(0);
  level = lo;
  for (int k = 1; k <= grid.q_max; ++k) {
    const auto above = v > splat(0.5f * (grid.level(k - 1) + grid.level(k)));
    q = above ? splat(static_cast<float>(k)) : q;
    level = above ? splat(grid.level(k)) : level;
  }
}

// Up to four scales at once, one per lane.
template <size_t N>
struct Lanes {
  Vec s, o, inv, acc[N], q[N], cost;

  Lanes(const GroupProblem& p, const GroupScale* scales, size_t n) : cost(splat(0)) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const GroupScale& scale = scales[std::min(lane, n - 1)];
      s[lane] = scale.s;
      o[lane] = scale.o;
      inv[lane] = std::fabs(scale.s) > 1e-30f ? 1 / scale.s : 0.0f;
    }
    for (size_t i = 0; i < N; ++i) acc[i] = splat(p.before[i]);
  }

  void round(const BlockGrid& grid, const GroupProblem& p) {
    for (size_t i = 0; i < N; ++i) {
      const float* row = p.factor + i * p.stride;
      Vec level;
      nearest(grid, (splat(p.x[i]) + acc[i] * (1 / row[i]) - o) * inv, q[i], level);
      const Vec e = splat(p.x[i]) - (s * level + o);
      const Vec left = acc[i] + e * row[i];
      cost += left * left;
      for (size_t k = i + 1; k < N; ++k) acc[k] += e * row[k];
    }
  }
};

template <size_t N>
void try_four(const BlockGrid& grid, const GroupProblem& p, const GroupScale* scales, size_t n,
              GroupChoice& best) {
  Lanes<N> lanes(p, scales, n);
  lanes.round(grid, p);
  for (size_t lane = 0; lane < n; ++lane) {
    if (!(lanes.cost[lane] < best.cost)) continue;
    best.cost = lanes.cost[lane];
    best.scale = scales[lane];
    for (size_t i = 0; i < N; ++i) best.q[i] = static_cast<uint8_t>(static_cast<int>(lanes.q[i][lane]));
  }
}

}  // namespace

int nearest_level(const BlockGrid& grid, float v) {
  Vec q, level;
  nearest(grid, splat(v), q, level);
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

GroupChoice search_group(const BlockGrid& grid, const GroupProblem& problem,
                         const std::vector<GroupScale>& scales) {
  GroupChoice best;
  for (size_t i = 0; i < scales.size(); i += kLanes) {
    const size_t n = std::min(kLanes, scales.size() - i);
    if (grid.group_elems == 16) try_four<16>(grid, problem, scales.data() + i, n, best);
    if (grid.group_elems == 32) try_four<32>(grid, problem, scales.data() + i, n, best);
  }
  return best;
}

}  // namespace duet
