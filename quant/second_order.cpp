#include "quant/second_order.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/parallel.h"
#include "quant/block_parts.h"
#include "quant/f16.h"
#include "quant/group_search.h"

namespace duet {
namespace {

constexpr size_t kMaxBlock = 256;
// Rows that go through the columns together, so that the metric is read once for all of them.
constexpr size_t kRowBatch = 16;

// How far to search: beyond these the error in the metric falls by less than a percent.
constexpr Reach kFirstReach = {3, 2}, kLaterReach = {2, 2};
constexpr int kPasses = 4;
// A choice that is cheaper by less is rounding noise.
constexpr float kGain = 0.9999f;

// What encoders of all batches share.
struct Plan {
  const Format& format;
  const BlockGrid& grid;
  const InputMetric& metric;
  size_t block, group;               // columns of a block and a group
  std::vector<float> group_factors;  // [n_cols][group]: rows of the factors of each group alone
};

// Upper triangular factor of the moments of columns [c, c + n) alone, to out [n, n].
void factor_group(const InputMetric& metric, size_t c, size_t n, float* out) {
  const size_t offset = c - metric.block_begin(c);
  double h[kMaxGroup * kMaxGroup];
  for (size_t i = 0; i < n; ++i)
    for (size_t k = 0; k < n; ++k) h[i * n + k] = double{metric.moments_row(c + i)[offset + k]};
  for (size_t j = n; j-- > 0;) {
    double rest = h[j * n + j];
    for (size_t k = j + 1; k < n; ++k) rest -= h[j * n + k] * h[j * n + k];
    const double pivot = h[j * n + j] = std::sqrt(std::max(rest, 1e-12));
    for (size_t i = 0; i < j; ++i) {
      double sum = h[i * n + j];
      for (size_t k = j + 1; k < n; ++k) sum -= h[i * n + k] * h[j * n + k];
      h[i * n + j] = sum / pivot;
    }
  }
  for (size_t i = 0; i < n; ++i)
    for (size_t k = 0; k < n; ++k) out[i * n + k] = k < i ? 0.0f : static_cast<float>(h[i * n + k]);
}

Plan make_plan(const Format& format, const InputMetric& metric) {
  const BlockGrid* grid = block_grid(format.dtype);
  DUET_ASSERT(grid != nullptr && metric.n_cols() % format.block_elems == 0);
  DUET_ASSERT(metric.block_cols() == metric.n_cols() ||
              metric.block_cols() % format.block_elems == 0);
  const auto group = static_cast<size_t>(grid->group_elems);
  Plan plan{format, *grid, metric, format.block_elems, group, {}};
  plan.group_factors.resize(metric.n_cols() * group);
  for (size_t c = 0; c < metric.n_cols(); c += group)
    factor_group(metric, c, group, plan.group_factors.data() + c * group);
  return plan;
}

// Up to kRowBatch rows. e = w - value; gradient = e H, within blocks of the metric.
class BatchEncoder {
 public:
  explicit BatchEncoder(const Plan& plan)
      : plan_(plan),
        grid_(plan.grid),
        metric_(plan.metric),
        n_cols_(plan.metric.n_cols()),
        block_(plan.block),
        group_(plan.group),
        n_blocks_(n_cols_ / block_),
        n_groups_(block_ / group_),
        error_(kRowBatch * n_cols_),
        gradient_(kRowBatch * n_cols_),
        sums_(kRowBatch * block_),
        moved_(kRowBatch * block_),
        v_(kRowBatch * block_),
        u_(kRowBatch * block_),
        hv_(kRowBatch * block_),
        hu_(kRowBatch * block_),
        parts_(kRowBatch * n_blocks_),
        bytes_(plan.format.block_bytes) {}

  void run(const float* w, size_t n_rows, std::byte* out) {
    w_ = w;
    n_rows_ = n_rows;
    for (size_t b = 0; b < n_blocks_; ++b) enter_block(b);
    start_gradient();
    bool any = true;
    for (int pass = 0; pass < kPasses && any; ++pass) {
      any = false;
      for (size_t b = 0; b < n_blocks_; ++b) any |= polish_block(b);
    }
    for (size_t r = 0; r < n_rows_; ++r)
      for (size_t b = 0; b < n_blocks_; ++b)
        grid_.pack(parts(r, b), out + (r * n_blocks_ + b) * plan_.format.block_bytes);
  }

 private:
  // ---- from block to block ----------------------------------------------------------------------
  void enter_block(size_t b) {
    const size_t c = b * block_, begin = metric_.block_begin(c);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    metric_.ops().add_products({error_.data() + begin, n_cols_, n_rows_, metric_.factor_row(begin) + (c - begin),
                        metric_.block_end(c) - begin, c - begin, sums_.data(), block_, block_});
    for (size_t r = 0; r < n_rows_; ++r) enter_row(r, b, sums_.data() + r * block_);
  }

  // before [block]: the sums that errors of earlier blocks have left at each column.
  void enter_row(size_t r, size_t b, float* before) {
    const size_t c = b * block_, offset = c - metric_.block_begin(c);
    const size_t stride = metric_.block_end(c) - metric_.block_begin(c);
    plain_fit(value(r, c), c, before, parts(r, b));
    for (size_t g = 0; g < n_groups_; ++g) {
      const size_t at = g * group_;
      const float* factor = metric_.factor_row(c + at) + offset + at;
      list_scales(grid_, parts(r, b), g, kFirstReach, scales_);
      const GroupChoice choice = search_group({value(r, c + at), factor, stride, before + at});
      take(choice, r, b, g);
      for (size_t i = 0; i < group_; ++i) {
        const float* row = metric_.factor_row(c + at + i) + offset;
        const float e = error(r, c + at)[i];
        for (size_t k = at + group_; k < block_; ++k) before[k] += e * row[k];
      }
    }
  }

  // The format's own search, on the values that would make up for the errors so far.
  void plain_fit(const float* x, size_t c, const float* before, BlockParts& p) {
    const size_t offset = c - metric_.block_begin(c);
    float target[kMaxBlock], importance[kMaxBlock], rest[kMaxBlock];
    std::copy_n(before, block_, rest);
    for (size_t i = 0; i < block_; ++i) {
      const float* row = metric_.factor_row(c + i) + offset;
      const float change = rest[i] / row[i];
      target[i] = x[i] + change;
      importance[i] = row[i] * row[i];
      for (size_t k = i + 1; k < block_; ++k) {
        rest[k] -= change * row[k];
        importance[i] += row[k] * row[k];
      }
    }
    plan_.format.encode_row(target, bytes_.data(), block_, importance);
    grid_.unpack(bytes_.data(), p);
  }

  GroupChoice search_group(const GroupProblem& problem) const {
    GroupChoice best;
    metric_.ops().search_group(grid_, problem, scales_.data(), scales_.size(), best);
    return best;
  }

  // Where nothing could be compared (sums overflow), what the plain fit has given stays.
  void take(const GroupChoice& choice, size_t r, size_t b, size_t g) {
    BlockParts& p = parts(r, b);
    if (choice.cost < FLT_MAX) {
      p.scale[g] = choice.scale.scale;
      p.offset[g] = choice.scale.offset;
      std::copy_n(choice.q, group_, p.q + g * group_);
      if (n_groups_ == 1) {
        p.unit = choice.scale.unit;
        p.offset_unit = choice.scale.offset_unit;
      }
    }
    set_errors(r, b, g);
  }

  void set_errors(size_t r, size_t b, size_t g) {
    const BlockParts& p = parts(r, b);
    const GroupScale scale = group_scale(grid_, p, g);
    const size_t c = b * block_ + g * group_;
    for (size_t i = 0; i < group_; ++i)
      error(r, c)[i] = value(r, c)[i] - decoded(scale, p.q[g * group_ + i]);
  }
  float decoded(const GroupScale& scale, int q) const { return scale.s * grid_.level(q) + scale.o; }

  // ---- passes over finished rows ----------------------------------------------------------------
  void start_gradient() {
    std::fill(gradient_.begin(), gradient_.end(), 0.0f);
    for (size_t first = 0; first < n_cols_; first = metric_.block_end(first)) {
      const size_t end = metric_.block_end(first);
      metric_.ops().add_products({error_.data() + first, n_cols_, n_rows_, metric_.moments_row(first), end - first, end - first,
                          gradient_.data() + first, n_cols_, end - first});
    }
  }

  // Within the block the gradient is kept up to date, elsewhere brought up to date at the end.
  bool polish_block(size_t b) {
    const size_t c = b * block_;
    bool any = false;
    for (size_t r = 0; r < n_rows_; ++r) {
      float* moved = moved_.data() + r * block_;
      std::copy_n(error(r, c), block_, moved);
      for (size_t g = 0; g < n_groups_; ++g) {
        rescale_group(r, b, g);
        step_integers(r, b, g);
      }
    }
    if (n_groups_ > 1) solve_units(b);
    for (size_t r = 0; r < n_rows_; ++r) {
      float* moved = moved_.data() + r * block_;
      for (size_t i = 0; i < block_; ++i) {
        moved[i] = error(r, c)[i] - moved[i];
        any |= moved[i] != 0;
      }
    }
    const size_t begin = metric_.block_begin(c), end = metric_.block_end(c);
    push_gradient(c, begin, c);
    push_gradient(c, c + block_, end);
    return any;
  }

  // Adds what the errors moved in the block of column c change at columns [from, to).
  void push_gradient(size_t c, size_t from, size_t to) {
    if (from >= to) return;
    const size_t begin = metric_.block_begin(c);
    metric_.ops().add_products({moved_.data(), block_, n_rows_, metric_.moments_row(c) + (from - begin),
                        metric_.block_end(c) - begin, block_, gradient_.data() + from, n_cols_, to - from});
  }

  // A better scale and offset with integers of their own, all else as it is: as a group that starts
  // from the errors e* at which its gradient would vanish. With H = L L^T of the group alone and
  // y L^T = gradient, e - e* = y L^-1, so that what is to be gained is |y|^2.
  void rescale_group(size_t r, size_t b, size_t g) {
    const size_t n = group_, c = b * block_ + g * n;
    const float* factor = plan_.group_factors.data() + c * n;
    const float* slope = gradient(r, c);
    const float* e = error(r, c);
    float y[kMaxGroup], before[kMaxGroup], old[kMaxGroup];
    float now = 0;
    for (size_t j = n; j-- > 0;) {
      float sum = slope[j];
      for (size_t k = j + 1; k < n; ++k) sum -= y[k] * factor[j * n + k];
      y[j] = sum / factor[j * n + j];
      now += y[j] * y[j];
    }
    for (size_t k = 0; k < n; ++k) {
      before[k] = y[k];
      for (size_t j = 0; j <= k; ++j) before[k] -= e[j] * factor[j * n + k];
    }
    list_scales(grid_, parts(r, b), g, kLaterReach, scales_);
    const GroupChoice choice = search_group({value(r, c), factor, n, before});
    if (!(choice.cost < now * kGain)) return;
    std::copy_n(e, n, old);
    take(choice, r, b, g);
    for (size_t i = 0; i < n; ++i) move_gradient(r, b, c + i, e[i] - old[i]);
  }

  // Single integers, each by the exact change of the error.
  void step_integers(size_t r, size_t b, size_t g) {
    const size_t c = b * block_ + g * group_, offset = c - metric_.block_begin(c);
    BlockParts& p = parts(r, b);
    const GroupScale scale = group_scale(grid_, p, g);
    if (!(std::fabs(scale.s) > 1e-30f)) return;
    for (size_t i = 0; i < group_; ++i) {
      uint8_t& q = p.q[g * group_ + i];
      const float wish = gradient(r, c)[i] / (scale.s * metric_.moments_row(c + i)[offset + i]);
      if (!std::isfinite(wish)) continue;
      const float now = grid_.level(q);
      const int q_new = nearest_level(grid_, now + wish);
      const float step = grid_.level(q_new) - now;
      if (!(step * (step - 2 * wish) < 0)) continue;
      q = static_cast<uint8_t>(q_new);
      const float e_new = value(r, c)[i] - decoded(scale, q);
      move_gradient(r, b, c + i, e_new - error(r, c)[i]);
      error(r, c)[i] = e_new;
    }
  }

  // Adds `by` to the error of column c, as far as the gradient in its block goes.
  void move_gradient(size_t r, size_t b, size_t c, float by) {
    if (by == 0) return;
    const size_t first = b * block_;
    const float* row = metric_.moments_row(c) + (first - metric_.block_begin(first));
    float* to = gradient(r, first);
    for (size_t k = 0; k < block_; ++k) to[k] += by * row[k];
  }

  // Least-squares units of the rows' blocks for their integers: value = unit v + offset_unit u.
  void solve_units(size_t b) {
    const bool offsets = grid_.offset_max > 0;
    for (size_t r = 0; r < n_rows_; ++r) {
      const BlockParts& p = parts(r, b);
      float *v = v_.data() + r * block_, *u = u_.data() + r * block_;
      for (size_t i = 0; i < block_; ++i) {
        v[i] = static_cast<float>(p.scale[i / group_]) * grid_.level(p.q[i]);
        u[i] = grid_.offset_sign * static_cast<float>(p.offset[i / group_]);
      }
    }
    times_moments(b, v_, hv_);
    if (offsets) times_moments(b, u_, hu_);
    for (size_t r = 0; r < n_rows_; ++r) solve_units(r, b);
  }

  // to = x H within the block
  void times_moments(size_t b, const std::vector<float>& x, std::vector<float>& to) {
    const size_t c = b * block_, begin = metric_.block_begin(c);
    std::fill(to.begin(), to.end(), 0.0f);
    metric_.ops().add_products({x.data(), block_, n_rows_, metric_.moments_row(c) + (c - begin), metric_.block_end(c) - begin,
                        block_, to.data(), block_, block_});
  }

  void solve_units(size_t r, size_t b) {
    const size_t c = b * block_;
    BlockParts& p = parts(r, b);
    const UnitProducts s = unit_products(r, b);
    const double det = s.vv * s.uu - s.uv * s.uv;
    double by_v = s.vv > 0 ? s.gv / s.vv : 0, by_u = 0;
    if (det > 1e-6 * s.vv * s.uu) {
      by_v = (s.gv * s.uu - s.gu * s.uv) / det;
      by_u = (s.gu * s.vv - s.gv * s.uv) / det;
    }
    const uint16_t unit = moved_unit(p.unit, by_v);
    const uint16_t offset_unit =
        grid_.offset_max > 0 ? moved_unit(p.offset_unit, by_u) : p.offset_unit;
    const double dv = double{f16_to_f32(unit)} - double{f16_to_f32(p.unit)};
    const double du = double{f16_to_f32(offset_unit)} - double{f16_to_f32(p.offset_unit)};
    const double change =
        dv * dv * s.vv + du * du * s.uu + 2 * dv * du * s.uv - 2 * (dv * s.gv + du * s.gu);
    if (!(change < 0)) return;
    p.unit = unit;
    p.offset_unit = offset_unit;
    for (size_t g = 0; g < n_groups_; ++g) set_errors(r, b, g);
    for (size_t k = 0; k < block_; ++k)
      gradient(r, c)[k] -= static_cast<float>(dv) * hv_[r * block_ + k] + static_cast<float>(du) * hu_[r * block_ + k];
  }

  // Of v and u in the metric, and with the gradient.
  struct UnitProducts {
    double vv = 0, uu = 0, uv = 0, gv = 0, gu = 0;
  };
  UnitProducts unit_products(size_t r, size_t b) {
    UnitProducts s;
    for (size_t i = 0; i < block_; ++i) {
      const size_t at = r * block_ + i;
      const double v = double{v_[at]}, u = double{u_[at]}, slope = double{gradient(r, b * block_)[i]};
      s.vv += v * double{hv_[at]};
      s.uu += u * double{hu_[at]};
      s.uv += v * double{hu_[at]};
      s.gv += v * slope;
      s.gu += u * slope;
    }
    return s;
  }

  uint16_t moved_unit(uint16_t bits, double by) const {
    const double v = double{f16_to_f32(bits)} + by, max = double{kF16Max};
    if (!std::isfinite(v)) return bits;
    return f32_to_f16(static_cast<float>(std::clamp(v, grid_.unit_positive ? 0.0 : -max, max)));
  }

  BlockParts& parts(size_t r, size_t b) { return parts_[r * n_blocks_ + b]; }
  const float* value(size_t r, size_t c) const { return w_ + r * n_cols_ + c; }
  float* error(size_t r, size_t c) { return error_.data() + r * n_cols_ + c; }
  float* gradient(size_t r, size_t c) { return gradient_.data() + r * n_cols_ + c; }

  const Plan& plan_;
  const BlockGrid& grid_;
  const InputMetric& metric_;
  size_t n_cols_, block_, group_, n_blocks_, n_groups_;
  const float* w_ = nullptr;
  size_t n_rows_ = 0;
  std::vector<float> error_, gradient_;  // [kRowBatch, n_cols]
  std::vector<float> sums_, moved_;      // [kRowBatch, block]
  std::vector<float> v_, u_, hv_, hu_;   // [kRowBatch, block] of solve_units(): hv = v H, hu = u H
  std::vector<BlockParts> parts_;        // [kRowBatch, n_blocks]
  std::vector<std::byte> bytes_;         // of one block
  std::vector<GroupScale> scales_;
};

void encode_rows(const Plan& plan, const float* w, size_t n_rows, std::byte* out, int n_threads) {
  const size_t n = plan.metric.n_cols(), out_bytes = row_bytes(plan.format, n);
  parallel_for(n_threads, n_rows, kRowBatch, [&](size_t begin, size_t end) {
    BatchEncoder(plan).run(w + begin * n, end - begin, out + begin * out_bytes);
  });
}

}  // namespace

bool has_second_order(const Format& format) {
  return block_grid(format.dtype) != nullptr && format.encode_row != nullptr;
}

void encode_second_order(const Format& format, const InputMetric& metric, const float* w,
                         size_t n_rows, void* out, int n_threads) {
  encode_rows(make_plan(format, metric), w, n_rows, static_cast<std::byte*>(out), n_threads);
}

double metric_error(const InputMetric& metric, const float* w, const float* v, size_t n_rows) {
  const size_t n = metric.n_cols();
  double sum = 0;
  std::vector<double> e(n);
  for (size_t r = 0; r < n_rows; ++r) {
    for (size_t c = 0; c < n; ++c) e[c] = double{w[r * n + c]} - double{v[r * n + c]};
    for (size_t c = 0; c < n; ++c) {
      const size_t first = metric.block_begin(c), end = metric.block_end(c);
      const float* row = metric.moments_row(c);
      double slope = 0;
      for (size_t k = first; k < end; ++k) slope += double{row[k - first]} * e[k];
      sum += e[c] * slope;
    }
  }
  return sum;
}

}  // namespace duet
