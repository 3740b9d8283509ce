// The search of quant/group_search.h with a scale per lane of a vector, for files of any instruction
// set: symbols stay inside each file.
#pragma once

#include "quant/group_search.h"

namespace duet {
namespace {

template <size_t kLanes>
struct FloatLanes;
template <>
struct FloatLanes<4> {
  using Vec [[gnu::vector_size(16)]] = float;
};
template <>
struct FloatLanes<8> {
  using Vec [[gnu::vector_size(32)]] = float;
};
template <>
struct FloatLanes<16> {
  using Vec [[gnu::vector_size(64)]] = float;
};

template <size_t kLanes>
struct GroupLanes {
  using Vec = typename FloatLanes<kLanes>::Vec;

  static Vec splat(float v) { return Vec{} + v; }
  // Nearest integer, ties to even, for |v| < 2^22.
  static Vec round_even(Vec v) { return (v + 12582912.0f) - 12582912.0f; }

  // q of the level nearest to v, and the level.
  static void nearest(const BlockGrid& grid, Vec v, Vec& q, Vec& level) {
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

  // n of the scales, at most kLanes, of groups of N.
  template <size_t N>
  static void try_some(const BlockGrid& grid, const GroupProblem& p, const GroupScale* scales, size_t n,
                       GroupChoice& best) {
    Vec s, o, inv, acc[N], q[N], cost = splat(0);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const GroupScale& scale = scales[lane < n ? lane : n - 1];
      s[lane] = scale.s;
      o[lane] = scale.o;
      inv[lane] = __builtin_fabsf(scale.s) > 1e-30f ? 1 / scale.s : 0.0f;
    }
    for (size_t i = 0; i < N; ++i) acc[i] = splat(p.before[i]);
    for (size_t i = 0; i < N; ++i) {
      const float* row = p.factor + i * p.stride;
      Vec level;
      nearest(grid, (p.x[i] + acc[i] * (1 / row[i]) - o) * inv, q[i], level);
      const Vec e = p.x[i] - (s * level + o);
      const Vec left = acc[i] + e * row[i];
      cost += left * left;
      for (size_t k = i + 1; k < N; ++k) acc[k] += e * row[k];
    }
    for (size_t lane = 0; lane < n; ++lane) {
      if (!(cost[lane] < best.cost)) continue;
      best.cost = cost[lane];
      best.scale = scales[lane];
      for (size_t i = 0; i < N; ++i) best.q[i] = static_cast<uint8_t>(static_cast<int>(q[i][lane]));
    }
  }

  static void search(const BlockGrid& grid, const GroupProblem& p, const GroupScale* scales, size_t n_scales,
                     GroupChoice& best) noexcept {
    for (size_t i = 0; i < n_scales; i += kLanes) {
      const size_t n = n_scales - i < kLanes ? n_scales - i : kLanes;
      if (grid.group_elems == 16) try_some<16>(grid, p, scales + i, n, best);
      if (grid.group_elems == 32) try_some<32>(grid, p, scales + i, n, best);
    }
  }
};

}  // namespace
}  // namespace duet
