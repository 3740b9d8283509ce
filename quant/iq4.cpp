// IQ4_NL and IQ4_XS: 4-bit indices into a non-uniform table of levels.
//
// Encoding searches the scale of a group: grids on which its largest value falls on or near either end
// of the table, the least-squares scale for the levels that each assigns, the best refined. For IQ4_XS
// the unit and the integer scales are then searched around the real ones against the true error.
#include <algorithm>
#include <array>
#include <cmath>

#include "quant/block_codec.h"
#include "quant/f16.h"

namespace duet {
namespace {

// 32 elements, nibbles as in Q4_0, each an index into the table of levels.
void decode_levels(float scale, const uint8_t qs[16], float* y) {
  for (size_t j = 0; j < 16; ++j) {
    y[j] = scale * static_cast<float>(kIq4Levels[qs[j] & 15]);
    y[j + 16] = scale * static_cast<float>(kIq4Levels[qs[j] >> 4]);
  }
}

void decode_nl(const BlockIQ4_NL& b, float* y) noexcept { decode_levels(f16_to_f32(b.d), b.qs, y); }

// Group g of 32 has the 6-bit scale made of nibble g of scales_l and bits 2g, 2g + 1 of scales_h,
// less 32.
int scale_of(const BlockIQ4_XS& b, size_t g) {
  const int low = (b.scales_l[g / 2] >> (g % 2 * 4)) & 15, high = (b.scales_h >> (2 * g)) & 3;
  return (low | (high << 4)) - 32;
}

void decode_xs(const BlockIQ4_XS& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (size_t group = 0; group < 8; ++group) {
    decode_levels(d * static_cast<float>(scale_of(b, group)), b.qs + 16 * group, y + 32 * group);
  }
}

// ---- encoding -------------------------------------------------------------------------------

constexpr size_t kGroupElems = 32;
constexpr float kUnits = 2;  // entries of the table of nearest levels per unit

// Index of the level nearest to (i - 256) / kUnits.
constexpr std::array<uint8_t, 512> make_nearest() {
  std::array<uint8_t, 512> out{};
  for (int i = 0; i < 512; ++i) {
    const auto distance = [&](size_t level) {
      const int d = i - 256 - 2 * kIq4Levels[level];
      return d < 0 ? -d : d;
    };
    for (size_t level = 1; level < 16; ++level)
      if (distance(level) < distance(out[static_cast<size_t>(i)])) out[static_cast<size_t>(i)] = static_cast<uint8_t>(level);
  }
  return out;
}
constexpr auto kNearest = make_nearest();

float inverse_of(float scale) { return std::fabs(scale) > 1e-37f ? 1 / scale : 0; }

// Of value / scale, by the inverse of the scale.
size_t nearest(float x, float inverse) {
  const float at = std::clamp(x * inverse * kUnits, -256.0f, 255.0f);
  return kNearest[static_cast<size_t>(static_cast<int>(at + 256.5f))];
}

// A group with its largest value scaled to 1 and weights whose largest is 1, so that sums neither
// overflow nor vanish.
struct Group {
  float x[kGroupElems], w[kGroupElems];
  float largest = 0;  // of the values as they came
};

Group load_group(const float* x, const float* importance) {
  Group g;
  float weight = 0;
  for (size_t i = 0; i < kGroupElems; ++i) {
    g.x[i] = std::isfinite(x[i]) ? x[i] : 0.0f;
    g.w[i] = importance != nullptr ? importance[i] : 1.0f;
    g.largest = std::max(g.largest, std::fabs(g.x[i]));
    weight = std::max(weight, g.w[i]);
  }
  if (g.largest < 1e-9f) g.largest = 0;
  for (size_t i = 0; i < kGroupElems; ++i) {
    g.x[i] = g.largest > 0 ? g.x[i] / g.largest : 0.0f;
    g.w[i] = weight > 0 ? g.w[i] / weight : 1.0f;
  }
  return g;
}

// Weighted sums of x * level and level^2 for the nearest levels: the least-squares scale is xl / ll, and
// it leaves xx - xl^2 / ll.
struct Moments {
  float xl = 0, ll = 0;
  float gain() const { return ll > 0 ? xl * xl / ll : 0; }
};
Moments moments(const Group& g, float scale) {
  Moments m;
  const float inverse = inverse_of(scale);
  for (size_t i = 0; i < kGroupElems; ++i) {
    const auto level = static_cast<float>(kIq4Levels[nearest(g.x[i], inverse)]);
    m.xl += g.w[i] * g.x[i] * level;
    m.ll += g.w[i] * level * level;
  }
  return m;
}

// The squared error that this scale leaves; 0 is a scale too.
float error_of(const Group& g, float scale) {
  const float inverse = inverse_of(scale);
  float error = 0;
  for (size_t i = 0; i < kGroupElems; ++i) {
    const float r = g.x[i] - scale * static_cast<float>(kIq4Levels[nearest(g.x[i], inverse)]);
    error += g.w[i] * r * r;
  }
  return error;
}

// Where the largest value falls: at, short of or beyond the last level. Either sign, as the table is not
// symmetric.
constexpr float kEnds[] = {-127, 113}, kReach[] = {0.76f, 0.82f, 0.88f, 0.94f, 1.0f, 1.06f, 1.12f, 1.18f};
constexpr int kRefinements = 2;

// The scale for values scaled to 1.
float fit_group(const Group& g) {
  if (g.largest == 0) return 0;
  float extreme = 0;
  for (const float x : g.x)
    if (std::fabs(x) > std::fabs(extreme)) extreme = x;
  Moments best;
  for (const float end : kEnds)
    for (const float reach : kReach) {
      const Moments m = moments(g, extreme / (end * reach));
      if (m.gain() > best.gain()) best = m;
    }
  for (int i = 0; i < kRefinements && best.xl != 0; ++i) {
    const Moments m = moments(g, best.xl / best.ll);
    if (m.gain() > best.gain()) best = m;
  }
  return best.ll > 0 ? best.xl / best.ll : 0;
}

uint16_t finite_half(float v) { return f32_to_f16(std::clamp(v, -65504.0f, 65504.0f)); }

void nearest_levels(const Group& g, float scale, uint8_t* q) {
  const float inverse = inverse_of(g.largest > 0 ? scale / g.largest : 0);
  for (size_t i = 0; i < kGroupElems; ++i) q[i] = static_cast<uint8_t>(nearest(g.x[i], inverse));
}

void pack_nl(const BlockParts& parts, BlockIQ4_NL& b) noexcept {
  b.d = parts.unit;
  pack_nibbles(parts.q, b.qs);
}

void encode_nl(const float* x, const float* importance, BlockIQ4_NL& b) noexcept {
  const Group g = load_group(x, importance);
  BlockParts parts;
  parts.unit = finite_half(fit_group(g) * g.largest);
  nearest_levels(g, f16_to_f32(parts.unit), parts.q);
  pack_nl(parts, b);
}

// Eight groups with the unit that their integer scales multiply. Weights of groups stay comparable: the
// error of group g counts power[g] times.
struct SuperGroup {
  Group groups[8];
  float scale[8];  // real ones
  float power[8];
};

struct Scales {
  float unit = 0;
  int scale[8] = {};
  float error = HUGE_VALF;
};

float group_error(const SuperGroup& s, size_t g, float scale) {
  return s.power[g] * error_of(s.groups[g], scale / s.groups[g].largest);
}

// The best integer for each group, among those next to the real scale.
Scales with_unit(const SuperGroup& s, float unit, int reach) {
  Scales out;
  out.unit = f16_to_f32(finite_half(unit));
  out.error = 0;
  for (size_t g = 0; g < 8; ++g) {
    if (s.groups[g].largest == 0) continue;
    const float real = out.unit != 0 ? s.scale[g] / out.unit : 0;
    const int middle = static_cast<int>(std::lround(std::clamp(real, -32.0f, 31.0f)));
    float best = HUGE_VALF;
    for (int v = std::max(middle - reach, -32); v <= std::min(middle + reach, 31); ++v) {
      const float error = group_error(s, g, out.unit * static_cast<float>(v));
      if (error >= best) continue;
      best = error;
      out.scale[g] = v;
    }
    out.error += best;
  }
  return out;
}

// Least squares for the integers and the levels at hand.
float refit_unit(const SuperGroup& s, const Scales& at) {
  double xl = 0, ll = 0;
  for (size_t g = 0; g < 8; ++g) {
    const Group& group = s.groups[g];
    const float scale = at.unit * static_cast<float>(at.scale[g]);
    if (group.largest == 0 || scale == 0) continue;
    const Moments m = moments(group, scale / group.largest);
    const double n = at.scale[g], weight = double{s.power[g]};
    xl += weight * n * double{m.xl} / double{group.largest};
    ll += weight * n * n * double{m.ll} / (double{group.largest} * double{group.largest});
  }
  return ll > 0 ? static_cast<float>(xl / ll) : at.unit;
}

Scales fit_super(const SuperGroup& s) {
  float widest = 0;
  for (const float v : s.scale)
    if (std::fabs(v) > std::fabs(widest)) widest = v;
  if (widest == 0) return with_unit(s, 0, 0);
  Scales best;
  const auto try_steps = [&](float steps) {
    const Scales next = with_unit(s, widest / steps, 0);
    if (next.error < best.error) best = next;
  };
  for (const float steps : {-32.0f, -31.0f, -29.5f, -28.0f, 31.0f, 30.0f, 28.5f}) try_steps(steps);
  // Half precision has few numbers so small: larger units are closer.
  if (std::fabs(widest) < 32 * 0x1p-20f)
    for (const float steps : {-16.0f, -8.0f, -4.0f, -2.0f, -1.0f}) try_steps(steps);
  for (int round = 0; round < 2; ++round) {
    const Scales next = with_unit(s, refit_unit(s, best), 1);
    if (next.error >= best.error) break;
    best = next;
  }
  return best;
}

// Weights relative to the largest of the super-block, values to its largest.
SuperGroup load_super(const float* x, const float* importance) {
  SuperGroup s;
  float weight[8], largest_weight = 0, largest = 0;
  for (size_t g = 0; g < 8; ++g) {
    s.groups[g] = load_group(x + kGroupElems * g, importance != nullptr ? importance + kGroupElems * g : nullptr);
    weight[g] = importance != nullptr ? *std::max_element(importance + kGroupElems * g, importance + kGroupElems * (g + 1)) : 1.0f;
    largest_weight = std::max(largest_weight, weight[g]);
    largest = std::max(largest, s.groups[g].largest);
  }
  for (size_t g = 0; g < 8; ++g) {
    const float relative = largest > 0 ? s.groups[g].largest / largest : 0;
    s.power[g] = relative * relative * (largest_weight > 0 ? weight[g] / largest_weight : 1.0f);
    s.scale[g] = fit_group(s.groups[g]) * s.groups[g].largest;
  }
  return s;
}

void pack_xs(const BlockParts& parts, BlockIQ4_XS& b) noexcept {
  b.d = parts.unit;
  b.scales_h = 0;
  std::fill_n(b.scales_l, 4, uint8_t{0});
  for (size_t g = 0; g < 8; ++g) {
    const auto v = static_cast<unsigned>(parts.scale[g] + 32);
    b.scales_l[g / 2] = static_cast<uint8_t>(b.scales_l[g / 2] | (v & 15) << (g % 2 * 4));
    b.scales_h = static_cast<uint16_t>(b.scales_h | (v >> 4) << (2 * g));
    pack_nibbles(parts.q + kGroupElems * g, b.qs + 16 * g);
  }
}

void encode_xs(const float* x, const float* importance, BlockIQ4_XS& b) noexcept {
  const SuperGroup s = load_super(x, importance);
  const Scales fit = fit_super(s);
  BlockParts parts;
  parts.unit = finite_half(fit.unit);
  for (size_t g = 0; g < 8; ++g) {
    parts.scale[g] = static_cast<int16_t>(fit.scale[g]);
    nearest_levels(s.groups[g], fit.unit * static_cast<float>(fit.scale[g]), parts.q + kGroupElems * g);
  }
  pack_xs(parts, b);
}

void unpack_nl(const BlockIQ4_NL& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  parts.scale[0] = 1;
  unpack_nibbles(b.qs, parts.q);
}

void unpack_xs(const BlockIQ4_XS& b, BlockParts& parts) noexcept {
  parts.unit = b.d;
  for (size_t g = 0; g < 8; ++g) {
    parts.scale[g] = static_cast<int16_t>(scale_of(b, g));
    unpack_nibbles(b.qs + 16 * g, parts.q + kGroupElems * g);
  }
}

}  // namespace

extern const BlockGrid kGridIQ4_NL, kGridIQ4_XS;
const BlockGrid kGridIQ4_NL = {.group_elems = 32, .n_groups = 1, .q_max = 15, .zero = 0,
                               .scale_lo = 1, .scale_hi = 1, .offset_max = 0, .offset_sign = 0,
                               .unit_positive = false, .unpack = unpack_block<BlockIQ4_NL, unpack_nl>,
                               .pack = pack_block<BlockIQ4_NL, pack_nl>, .levels = kIq4Levels};
const BlockGrid kGridIQ4_XS = {.group_elems = 32, .n_groups = 8, .q_max = 15, .zero = 0,
                               .scale_lo = -32, .scale_hi = 31, .offset_max = 0, .offset_sign = 0,
                               .unit_positive = false, .unpack = unpack_block<BlockIQ4_XS, unpack_xs>,
                               .pack = pack_block<BlockIQ4_XS, pack_xs>, .levels = kIq4Levels};

extern const Format kFormatIQ4_NL;
const Format kFormatIQ4_NL = {DType::IQ4_NL,
                              "IQ4_NL",
                              32,
                              sizeof(BlockIQ4_NL),
                              ActFormat::act32,
                              decode_blocks<BlockIQ4_NL, 32, decode_nl>,
                              encode_blocks<BlockIQ4_NL, 32, encode_nl>,
                              all_blocks_finite<BlockIQ4_NL, 32, d_finite>};
extern const Format kFormatIQ4_XS;
const Format kFormatIQ4_XS = {
    DType::IQ4_XS,     "IQ4_XS",
    kSuperBlock,       sizeof(BlockIQ4_XS),
    ActFormat::act256, decode_blocks<BlockIQ4_XS, kSuperBlock, decode_xs>,
    encode_blocks<BlockIQ4_XS, kSuperBlock, encode_xs>,
    all_blocks_finite<BlockIQ4_XS, kSuperBlock, d_finite>};

}  // namespace duet
