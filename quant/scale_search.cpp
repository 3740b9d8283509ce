#include "quant/scale_search.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "quant/f16.h"

namespace duet {
namespace {

// ---- four groups at a time ---------------------------------------------------------------------
constexpr size_t kLanes = 4;
using Vec = float __attribute__((vector_size(16)));  // one lane per group
using VecInt = int32_t __attribute__((vector_size(16)));

Vec splat(float v) { return Vec{v, v, v, v}; }
Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
Vec vmax(Vec a, Vec b) { return a > b ? a : b; }  // b when a is NaN
Vec vabs(Vec a) { return vmax(a, -a); }
float lane_sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
float lane_max(Vec v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
// Nearest integer, ties to even, for |v| < 2^22: near 1.5 * 2^23 the spacing of floats is one.
Vec vround(Vec v) { return (v + 12582912.0f) - 12582912.0f; }
// 1 / v; 0 where v is zero or so small that 1 / v would overflow: a grid without spacing has one
// level.
Vec inverse(Vec v) {
  const VecInt tiny = vabs(v) < 1e-37f;
  const Vec safe = tiny ? splat(1) : v;
  return tiny ? splat(0) : 1 / safe;
}

// The smallest and largest integer q.
struct Levels {
  Vec lo, hi;
};

// Element i of group `lane` is x[i][lane], scaled by a power of two (`down`; `up` undoes it) that
// brings the largest to [1, 2), so that no sum overflows or vanishes. w: weights of the errors.
template <size_t N>
struct Tile {
  Vec x[N], w[N];
  Vec sum_w;
  Vec up, down;
};

// A candidate: x ~= scale * q + offset, and the weighted squared error it leaves.
struct Grid {
  Vec scale, offset, error;
};
void keep_better(Grid& best, const Grid& next) {
  const VecInt better = next.error < best.error;
  best.scale = better ? next.scale : best.scale;
  best.offset = better ? next.offset : best.offset;
  best.error = better ? next.error : best.error;
}

// Weighted sums over a group of the residual r = x - offset - scale * q to the nearest levels q,
// and of its products. All corrections of a grid follow from them without cancellation.
struct Moments {
  Vec r, rr, q, qq, qr;
};
template <size_t N>
Moments moments(const Tile<N>& t, const Levels& levels, Vec scale, Vec offset) {
  const Vec inv = inverse(scale), zero = splat(0);
  Moments m = {zero, zero, zero, zero, zero};
  for (size_t i = 0; i < N; ++i) {
    const Vec y = t.x[i] - offset;
    const Vec q = vround(vmin(vmax(y * inv, levels.lo), levels.hi));
    const Vec r = y - scale * q;
    const Vec wr = t.w[i] * r, wq = t.w[i] * q;
    m.r += wr;
    m.rr += wr * r;
    m.q += wq;
    m.qq += wq * q;
    m.qr += wr * q;
  }
  return m;
}

// The part of moments() that corrections of the scale alone, and of the offset alone, need.
struct ScaleMoments {
  Vec rr, qq, qr;
};
template <size_t N>
ScaleMoments scale_moments(const Tile<N>& t, const Levels& levels, Vec scale) {
  const Vec inv = inverse(scale), zero = splat(0);
  ScaleMoments m = {zero, zero, zero};
  for (size_t i = 0; i < N; ++i) {
    const Vec q = vround(vmin(vmax(t.x[i] * inv, levels.lo), levels.hi));
    const Vec r = t.x[i] - scale * q;
    const Vec wr = t.w[i] * r;
    m.rr += wr * r;
    m.qq += t.w[i] * q * q;
    m.qr += wr * q;
  }
  return m;
}
struct OffsetMoments {
  Vec r, rr;
};
template <size_t N>
OffsetMoments offset_moments(const Tile<N>& t, const Levels& levels, Vec scale, Vec offset) {
  const Vec inv = inverse(scale), zero = splat(0);
  OffsetMoments m = {zero, zero};
  for (size_t i = 0; i < N; ++i) {
    const Vec y = t.x[i] - offset;
    const Vec r = y - scale * vround(vmin(vmax(y * inv, levels.lo), levels.hi));
    const Vec wr = t.w[i] * r;
    m.r += wr;
    m.rr += wr * r;
  }
  return m;
}

// How far to search, from weighted errors on Gaussian, heavy-tailed and trained weights: beyond
// these the error falls by less than half a percent for each doubling of the time.
constexpr float kCuts[] = {-0.25f, 0.0f, 0.25f, 0.5f};             // steps off either end
constexpr float kStretches[] = {-0.9f, -0.5f, -0.1f, 0.3f, 0.7f};  // levels beyond the last
constexpr int kRefinements = 1;
constexpr int kScaleReach = 4;  // integer scales tried on either side
constexpr int kRounds = 3;

// ---- one group: scale and offset ---------------------------------------------------------------
// The grid with least-squares scale and offset (<= 0 if negative_only) for the integers of `g`.
Grid improve_affine(const Moments& m, Vec sum_w, const Grid& g, bool negative_only) {
  const Vec det = sum_w * m.qq - m.q * m.q;
  const VecInt solvable = det > 1e-5f * sum_w * m.qq;
  const Vec inv_det = inverse(solvable ? det : splat(0));
  Vec ds = (sum_w * m.qr - m.q * m.r) * inv_det;
  Vec doff = (m.qq * m.r - m.q * m.qr) * inv_det;
  if (negative_only) {
    const VecInt clip = g.offset + doff > 0;
    doff = clip ? -g.offset : doff;
    ds = clip ? (m.qr - doff * m.q) * inverse(m.qq) : ds;
  }
  // Expanded: the sum of w (r - doff - ds q)^2, valid for any ds and doff.
  const Vec error =
      m.rr - 2 * (ds * m.qr + doff * m.r) + ds * (ds * m.qq + 2 * doff * m.q) + doff * doff * sum_w;
  return {g.scale + ds, g.offset + doff, error};
}

template <size_t N>
void value_range(const Tile<N>& t, Vec& lo, Vec& hi) {
  lo = hi = t.x[0];
  for (size_t i = 1; i < N; ++i) {
    lo = vmin(lo, t.x[i]);
    hi = vmax(hi, t.x[i]);
  }
}

// Candidates cut the range of the values at either end by a few parts of a step.
template <size_t N>
Grid search_affine(const Tile<N>& t, const Levels& levels, bool negative_only) {
  Vec lo, hi;
  value_range(t, lo, hi);
  if (negative_only) {
    lo = vmin(lo, splat(0));
    hi = vmax(hi, splat(0));
  }
  const Vec step = (hi - lo) / levels.hi;
  Grid best = {step, lo, splat(FLT_MAX)};
  for (const float cut_lo : kCuts) {
    for (const float cut_hi : kCuts) {
      Grid g;
      g.offset = lo + cut_lo * step;
      g.scale = (hi - cut_hi * step - g.offset) / levels.hi;
      keep_better(best,
                  improve_affine(moments(t, levels, g.scale, g.offset), t.sum_w, g, negative_only));
    }
  }
  for (int r = 0; r < kRefinements; ++r) {
    keep_better(best, improve_affine(moments(t, levels, best.scale, best.offset), t.sum_w, best,
                                     negative_only));
  }
  return best;
}

Grid improve_symmetric(const ScaleMoments& m, Vec scale) {
  const Vec ds = m.qr * inverse(m.qq);
  return {scale + ds, splat(0), m.rr - ds * m.qr};
}

// Candidates stretch or cut the grid around the largest value, with either sign of the scale: the
// side that has one level more may serve either tail.
template <size_t N>
Grid search_symmetric(const Tile<N>& t, const Levels& levels) {
  Vec lo, hi;
  value_range(t, lo, hi);
  const Vec amax = vmax(-lo, hi);
  const Vec sign = hi > -lo ? splat(-1) : splat(1);  // the longer tail on the side with more levels
  Grid best = {splat(0), splat(0), splat(FLT_MAX)};
  for (const float stretch : kStretches) {
    const Vec scale = sign * amax / (stretch - levels.lo);
    keep_better(best, improve_symmetric(scale_moments(t, levels, scale), scale));
    keep_better(best, improve_symmetric(scale_moments(t, levels, -scale), -scale));
  }
  for (int r = 0; r < kRefinements; ++r) {
    keep_better(best, improve_symmetric(scale_moments(t, levels, best.scale), best.scale));
  }
  return best;
}

// ---- loading and storing -----------------------------------------------------------------------
float finite_or_zero(float v) { return std::fabs(v) <= FLT_MAX ? v : 0.0f; }

float largest(const float* x, size_t n) {
  float amax = 0;
  for (size_t i = 0; i < n; ++i) amax = std::max(amax, std::fabs(finite_or_zero(x[i])));
  return amax;
}

// Importance over its mean, never zero, so that every group has a unique best grid.
struct ImportanceNorm {
  float scale, floor;
};
ImportanceNorm importance_norm(const float* importance, size_t n) {
  if (importance == nullptr) return {0, 1};
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += static_cast<double>(importance[i]);
  const double mean = sum / static_cast<double>(n);
  return mean > 1e-30 ? ImportanceNorm{static_cast<float>(1 / mean), 1e-4f} : ImportanceNorm{0, 1};
}

// Fills one lane with a group. Errors count by |x| + rms(x), times the importance where there is one: that large
// weights count more measures better (mean KLD of the demo model) than plain squares or x^2, importance or not.
template <size_t N>
void load_group(Tile<N>& t, size_t lane, const float* x, const float* importance,
                ImportanceNorm norm) {
  const float down = t.down[lane];
  float sum_xx = 0;
  for (size_t i = 0; i < N; ++i) {
    const float v = finite_or_zero(x[i]) * down;
    t.x[i][lane] = v;
    sum_xx += v * v;
  }
  const float rms = std::sqrt(sum_xx / N);
  for (size_t i = 0; i < N; ++i) {
    const float own = rms + std::fabs(t.x[i][lane]);
    const float w = importance != nullptr ? own * (importance[i] * norm.scale + norm.floor) : own;
    t.w[i][lane] = w;
    t.sum_w[lane] += w;
  }
}

template <size_t N>
void clear(Tile<N>& t) {
  for (size_t i = 0; i < N; ++i) t.x[i] = t.w[i] = splat(0);
  t.sum_w = splat(0);
  t.up = t.down = splat(1);
}

// The powers of two for values up to amax; 1 for values so small that they are stored as zero.
void set_magnitude(float amax, float& up, float& down) {
  const int exponent = amax < 1e-9f ? 0 : std::min(std::ilogb(amax), 126);
  up = std::ldexp(1.0f, exponent);
  down = std::ldexp(1.0f, -exponent);
}

template <size_t N>
void load_super(Tile<N>* tiles, const float* x, const float* importance) {
  float up, down;
  set_magnitude(largest(x, 256), up, down);
  const ImportanceNorm norm = importance_norm(importance, 256);
  for (size_t group = 0; group < 256 / N; ++group) {
    Tile<N>& t = tiles[group / kLanes];
    const size_t lane = group % kLanes;
    if (lane == 0) clear(t);
    t.up[lane] = up;
    t.down[lane] = down;
    load_group(t, lane, x + group * N, importance != nullptr ? importance + group * N : nullptr,
               norm);
  }
}

// The integers of the grid, counted from the lowest level, in the order of the elements.
template <size_t N>
void store(const Tile<N>& t, const Levels& levels, Vec scale, Vec offset, uint8_t* out) {
  const Vec inv = inverse(scale);
  for (size_t i = 0; i < N; ++i) {
    const Vec q = vround(vmin(vmax((t.x[i] - offset) * inv, levels.lo), levels.hi));
    const VecInt index = __builtin_convertvector(q - levels.lo, VecInt);
    for (size_t lane = 0; lane < kLanes; ++lane)
      out[lane * N + i] = static_cast<uint8_t>(index[lane]);
  }
}

// A half-precision number and its value in the units of a tile.
struct Half {
  uint16_t bits;
  float value;
};
// The one nearest to v, saturated; not zero unless v is.
Half to_half(float v, float up, float down) {
  uint16_t bits = f32_to_f16(std::clamp(v * up, -kF16Max, kF16Max));
  if ((bits & 0x7fff) == 0 && v != 0) bits |= 1;
  return {bits, f16_to_f32(bits) * down};
}
// The next one away from zero when the nearest falls short of v, so that the largest multiple of a
// unit reaches what it must: small weights have units of few half-precision steps.
Half to_half_outward(float v, float up, float down) {
  const Half nearest = to_half(v, up, down);
  const bool short_of_v =
      std::fabs(nearest.value) < std::fabs(v) && (nearest.bits & 0x7fff) < 0x7bff;
  return short_of_v ? Half{static_cast<uint16_t>(nearest.bits + 1),
                           f16_to_f32(static_cast<uint16_t>(nearest.bits + 1)) * down}
                    : nearest;
}

// ---- super-blocks with minima ------------------------------------------------------------------
template <size_t N>
struct AffineSuper {
  static constexpr size_t kTiles = 256 / (N * kLanes);
  Tile<N> tiles[kTiles];
  Levels levels;
  float scale_max;
};
template <size_t N>
struct AffineState {
  Half d, dmin;
  Vec scale[AffineSuper<N>::kTiles], min[AffineSuper<N>::kTiles];  // integers
  float error = FLT_MAX;
};

// For scales around the present ones: the best minimum for each, then the best pair.
template <size_t N>
void choose_integers(const AffineSuper<N>& b, AffineState<N>& s) {
  const Vec zero = splat(0), top = splat(b.scale_max);
  const Vec inv_dmin = inverse(splat(s.dmin.value));
  for (size_t k = 0; k < b.kTiles; ++k) {
    const Tile<N>& t = b.tiles[k];
    const Vec scale0 = s.scale[k], min0 = s.min[k], inv_sum_w = inverse(t.sum_w);
    Grid best = {scale0, min0, splat(FLT_MAX)};
    for (int a = -kScaleReach; a <= kScaleReach; ++a) {
      Grid g;
      g.scale = vmin(vmax(scale0 + static_cast<float>(a), zero), top);
      const OffsetMoments m =
          offset_moments(t, b.levels, s.d.value * g.scale, -s.dmin.value * min0);
      g.offset = vround(vmin(vmax(min0 - m.r * inv_sum_w * inv_dmin, zero), top));
      const Vec shift = (min0 - g.offset) * s.dmin.value;
      g.error = m.rr - 2 * shift * m.r + shift * shift * t.sum_w;
      keep_better(best, g);
    }
    s.scale[k] = best.scale;
    s.min[k] = best.offset;
  }
}

// Sets the error of `s` and returns the least-squares d and dmin for its integers.
struct Units {
  float d, dmin;
};
template <size_t N>
Units solve_units(const AffineSuper<N>& b, AffineState<N>& s) {
  Vec ss = splat(0), sm = ss, mm = ss, sr = ss, mr = ss, rr = ss;
  for (size_t k = 0; k < b.kTiles; ++k) {
    const Vec scale = s.scale[k], min = s.min[k];
    const Moments m = moments(b.tiles[k], b.levels, s.d.value * scale, -s.dmin.value * min);
    ss += scale * scale * m.qq;
    sm -= scale * min * m.q;
    mm += min * min * b.tiles[k].sum_w;
    sr += scale * m.qr;
    mr -= min * m.r;
    rr += m.rr;
  }
  s.error = lane_sum(rr);
  const double a = lane_sum(ss), c = lane_sum(mm), off = lane_sum(sm), p = lane_sum(sr),
               q = lane_sum(mr);
  const double det = a * c - off * off;
  if (det > 1e-5 * a * c) {
    return {s.d.value + static_cast<float>((p * c - q * off) / det),
            s.dmin.value + static_cast<float>((a * q - off * p) / det)};
  }
  return {a > 0 ? s.d.value + static_cast<float>(p / a) : s.d.value, s.dmin.value};
}

// Group grids first, then integers and units in turn, as long as the error falls.
template <size_t N>
AffineState<N> search_affine_super(const AffineSuper<N>& b) {
  const float up = b.tiles[0].up[0], down = b.tiles[0].down[0];
  Grid grids[AffineSuper<N>::kTiles];
  Vec top_scale = splat(0), top_min = splat(0);
  for (size_t k = 0; k < b.kTiles; ++k) {
    grids[k] = search_affine(b.tiles[k], b.levels, true);
    top_scale = vmax(top_scale, grids[k].scale);
    top_min = vmax(top_min, -grids[k].offset);
  }
  AffineState<N> s, best;
  s.d = to_half_outward(lane_max(top_scale) / b.scale_max, up, down);
  s.dmin = to_half_outward(lane_max(top_min) / b.scale_max, up, down);
  const Vec inv_d = inverse(splat(s.d.value)), inv_dmin = inverse(splat(s.dmin.value));
  for (size_t k = 0; k < b.kTiles; ++k) {
    s.scale[k] = vround(vmin(grids[k].scale * inv_d, splat(b.scale_max)));
    s.min[k] = vround(vmin(-grids[k].offset * inv_dmin, splat(b.scale_max)));
  }
  for (int round = 0; round < kRounds; ++round) {
    choose_integers(b, s);
    const Units units = solve_units(b, s);
    if (!(s.error < best.error)) break;
    best = s;
    s.d = to_half(std::max(units.d, 0.0f), up, down);
    s.dmin = to_half(std::max(units.dmin, 0.0f), up, down);
  }
  return best;
}

template <size_t N>
void fit_affine(const AffineSuperSpec& spec, const float* x, const float* importance,
                AffineSuperFit& fit) {
  AffineSuper<N> b;
  load_super(b.tiles, x, importance);
  b.levels = {splat(0), splat(static_cast<float>(spec.q_max))};
  b.scale_max = static_cast<float>(spec.scale_max);
  const AffineState<N> best = search_affine_super(b);
  fit.d = best.d.bits;
  fit.dmin = best.dmin.bits;
  for (size_t k = 0; k < b.kTiles; ++k) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      fit.scale[kLanes * k + lane] = static_cast<uint8_t>(best.scale[k][lane]);
      fit.min[kLanes * k + lane] = static_cast<uint8_t>(best.min[k][lane]);
    }
    store(b.tiles[k], b.levels, best.d.value * best.scale[k], -best.dmin.value * best.min[k],
          fit.q + k * N * kLanes);
  }
}

// ---- super-blocks without minima ---------------------------------------------------------------
struct SymmetricSuper {
  Tile<16> tiles[4];
  Levels levels;
  float scale_max;
};
struct SymmetricState {
  Half d;
  Vec scale[4];  // integers
  float error = FLT_MAX;
};

void choose_integers(const SymmetricSuper& b, SymmetricState& s) {
  for (size_t k = 0; k < 4; ++k) {
    const Vec scale0 = s.scale[k], zero = splat(0);
    Grid best = {scale0, zero, splat(FLT_MAX)};
    for (int a = -kScaleReach; a <= kScaleReach; ++a) {
      const Vec scale =
          vmin(vmax(scale0 + static_cast<float>(a), splat(-b.scale_max - 1)), splat(b.scale_max));
      keep_better(best,
                  {scale, zero, offset_moments(b.tiles[k], b.levels, s.d.value * scale, zero).rr});
    }
    s.scale[k] = best.scale;
  }
}

// Sets the error of `s` and returns the least-squares d for its integers.
float solve_unit(const SymmetricSuper& b, SymmetricState& s) {
  Vec ss = splat(0), sr = ss, rr = ss;
  for (size_t k = 0; k < 4; ++k) {
    const ScaleMoments m = scale_moments(b.tiles[k], b.levels, s.d.value * s.scale[k]);
    ss += s.scale[k] * s.scale[k] * m.qq;
    sr += s.scale[k] * m.qr;
    rr += m.rr;
  }
  s.error = lane_sum(rr);
  const float a = lane_sum(ss);
  return a > 0 ? s.d.value + lane_sum(sr) / a : s.d.value;
}

SymmetricState search_symmetric_super(const SymmetricSuper& b) {
  const float up = b.tiles[0].up[0], down = b.tiles[0].down[0];
  Grid grids[4];
  float top = 0;  // the group scale of largest magnitude becomes -scale_max - 1
  for (size_t k = 0; k < 4; ++k) {
    grids[k] = search_symmetric(b.tiles[k], b.levels);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (std::fabs(grids[k].scale[lane]) > std::fabs(top)) top = grids[k].scale[lane];
    }
  }
  SymmetricState s, best;
  s.d = to_half_outward(top / (-b.scale_max - 1), up, down);
  const Vec inv_d = inverse(splat(s.d.value));
  for (size_t k = 0; k < 4; ++k) {
    s.scale[k] =
        vround(vmin(vmax(grids[k].scale * inv_d, splat(-b.scale_max - 1)), splat(b.scale_max)));
  }
  for (int round = 0; round < kRounds; ++round) {
    choose_integers(b, s);
    const float d = solve_unit(b, s);
    if (!(s.error < best.error)) break;
    best = s;
    s.d = to_half(d, up, down);
  }
  return best;
}

}  // namespace

void fit_affine_super(const AffineSuperSpec& spec, const float* x, const float* importance,
                      AffineSuperFit& fit) {
  if (spec.group_elems == 16) fit_affine<16>(spec, x, importance, fit);
  if (spec.group_elems == 32) fit_affine<32>(spec, x, importance, fit);
}

void fit_symmetric_super(const SymmetricSuperSpec& spec, const float* x, const float* importance,
                         SymmetricSuperFit& fit) {
  SymmetricSuper b;
  load_super(b.tiles, x, importance);
  const float zero = static_cast<float>(spec.zero);
  b.levels = {splat(-zero), splat(zero - 1)};
  b.scale_max = static_cast<float>(spec.scale_max);
  const SymmetricState best = search_symmetric_super(b);
  fit.d = best.d.bits;
  for (size_t k = 0; k < 4; ++k) {
    for (size_t lane = 0; lane < kLanes; ++lane)
      fit.scale[kLanes * k + lane] = static_cast<int8_t>(best.scale[k][lane]);
    store(b.tiles[k], b.levels, best.d.value * best.scale[k], splat(0), fit.q + 64 * k);
  }
}

void fit_blocks(const BlockSpec& spec, const float* x, const float* importance, size_t n_blocks,
                BlockFit* fit) {
  Tile<32> t;
  clear(t);
  for (size_t lane = 0; lane < n_blocks; ++lane) {
    const size_t at = 32 * lane;
    float up, down;
    set_magnitude(largest(x + at, 32), up, down);
    t.up[lane] = up;
    t.down[lane] = down;
    const float* weights = importance != nullptr ? importance + at : nullptr;
    load_group(t, lane, x + at, weights, importance_norm(weights, 32));
  }
  const float zero = spec.has_offset ? 0.0f : static_cast<float>((spec.q_max + 1) / 2);
  const Levels levels = {splat(-zero), splat(static_cast<float>(spec.q_max) - zero)};
  Grid best = spec.has_offset ? search_affine(t, levels, false) : search_symmetric(t, levels);
  for (size_t lane = 0; lane < n_blocks; ++lane) {
    const Half d = to_half(best.scale[lane], t.up[lane], t.down[lane]);
    const Half m = to_half(best.offset[lane], t.up[lane], t.down[lane]);
    best.scale[lane] = d.value;
    best.offset[lane] = m.value;
    fit[lane].d = d.bits;
    fit[lane].m = m.bits;
  }
  uint8_t q[4 * 32];
  store(t, levels, best.scale, best.offset, q);
  for (size_t lane = 0; lane < n_blocks; ++lane) std::copy_n(q + 32 * lane, 32, fit[lane].q);
}

}  // namespace duet
