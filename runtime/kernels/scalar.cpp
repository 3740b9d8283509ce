// The reference kernels: the specification of what every other table computes.
#include <bit>
#include <cmath>
#include <cstring>

#include "quant/f16.h"
#include "quant/format.h"
#include "quant/iq_blocks.h"
#include "runtime/kernels/kernels.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

// ---- blocks of 32 with act32: w = d * q + m ----------------------------------------------------
struct Unpacked32 {
  float d, m;
  int8_t q[32];
};

int low_nibble(uint8_t byte) { return byte & 15; }
int high_nibble(uint8_t byte) { return byte >> 4; }

// Element j of the first half is the low nibble of qs[j], of the second half the high nibble.
template <class ToLevel>
void unpack_nibbles(const uint8_t* qs, size_t n, int8_t* q, ToLevel level) {
  for (size_t j = 0; j < n; ++j) {
    q[j] = static_cast<int8_t>(level(low_nibble(qs[j]), j));
    q[j + n] = static_cast<int8_t>(level(high_nibble(qs[j]), j + n));
  }
}

int fifth_bit(const uint8_t* qh, size_t j) { return ((qh[j / 8] >> (j % 8)) & 1) << 4; }

void unpack(const BlockQ4_0& b, Unpacked32& out) {
  out.d = f16_to_f32(b.d);
  unpack_nibbles(b.qs, 16, out.q, [](int v, size_t) { return v - 8; });
}

void unpack(const BlockQ4_1& b, Unpacked32& out) {
  out.d = f16_to_f32(b.d);
  out.m = f16_to_f32(b.m);
  unpack_nibbles(b.qs, 16, out.q, [](int v, size_t) { return v; });
}

void unpack(const BlockQ5_0& b, Unpacked32& out) {
  out.d = f16_to_f32(b.d);
  unpack_nibbles(b.qs, 16, out.q, [&](int v, size_t j) { return (v | fifth_bit(b.qh, j)) - 16; });
}

void unpack(const BlockQ5_1& b, Unpacked32& out) {
  out.d = f16_to_f32(b.d);
  out.m = f16_to_f32(b.m);
  unpack_nibbles(b.qs, 16, out.q, [&](int v, size_t j) { return v | fifth_bit(b.qh, j); });
}

void unpack(const BlockQ8_0& b, Unpacked32& out) {
  out.d = f16_to_f32(b.d);
  std::memcpy(out.q, b.qs, sizeof out.q);
}

void unpack(const BlockIQ4_NL& b, Unpacked32& out) {
  out.d = f16_to_f32(b.d);
  unpack_nibbles(b.qs, 16, out.q, [](int v, size_t) { return kIq4Levels[v]; });
}

template <class Block>
constexpr bool kHasMinimum32 = requires(Block b) {
  b.m;
};

template <class Block>
void matmul32(const MatmulArgs& a) noexcept {
  const size_t n_blocks = a.cols / 32;
  for (size_t r = 0; r < a.n_rows; ++r) {
    for (size_t t = 0; t < a.n_tokens; ++t) a.y[t * a.y_stride + r] = 0.0f;
    for (size_t b = 0; b < n_blocks; ++b) {
      Block block;
      std::memcpy(&block, a.w + r * a.w_stride + b * sizeof block, sizeof block);
      Unpacked32 w;
      unpack(block, w);
      for (size_t t = 0; t < a.n_tokens; ++t) {
        const auto& act = reinterpret_cast<const BlockAct32*>(a.x + t * a.x_stride)[b];
        int32_t dot = 0;
        for (size_t i = 0; i < 32; ++i) dot += w.q[i] * act.qs[i];
        float& y = a.y[t * a.y_stride + r];
        y = std::fma(static_cast<float>(dot), w.d * act.d, y);
        if constexpr (kHasMinimum32<Block>)
          y = std::fma(w.m, act.d * static_cast<float>(act.sum), y);
      }
    }
  }
}

// ---- super-blocks of 256 with act256: w = d * scale[i / 16] * q - dmin * min[i / 16] -----------
struct Unpacked256 {
  float d, dmin;
  int16_t scale[16], min[16];
  int8_t q[256];
};

// Calls set(i, low 2 bits source shifted) in the element order shared by Q2_K and Q3_K.
template <class Set>
void for_two_bits(const uint8_t* qs, Set set) {
  for (size_t i = 0; i < 256; ++i) {
    const size_t half = i / 128, shift = (i % 128) / 32, l = i % 32;
    set(i, (qs[half * 32 + l] >> (2 * shift)) & 3, l);
  }
}

void unpack(const BlockQ2_K& b, Unpacked256& out) {
  out.d = f16_to_f32(b.d);
  out.dmin = f16_to_f32(b.dmin);
  for (size_t g = 0; g < 16; ++g) {
    out.scale[g] = static_cast<int16_t>(low_nibble(b.scales[g]));
    out.min[g] = static_cast<int16_t>(high_nibble(b.scales[g]));
  }
  for_two_bits(b.qs, [&](size_t i, int v, size_t) { out.q[i] = static_cast<int8_t>(v); });
}

void unpack(const BlockQ3_K& b, Unpacked256& out) {
  out.d = f16_to_f32(b.d);
  for (size_t g = 0; g < 16; ++g) {  // 6 bits: 4 in the first 8 bytes, 2 in the last 4
    const int low = g < 8 ? low_nibble(b.scales[g]) : high_nibble(b.scales[g - 8]);
    const int high = (b.scales[8 + g % 4] >> (2 * (g / 4))) & 3;
    out.scale[g] = static_cast<int16_t>((low | (high << 4)) - 32);
  }
  for_two_bits(b.qs, [&](size_t i, int v, size_t l) {
    const int high = (b.hmask[l] >> (i / 32)) & 1;
    out.q[i] = static_cast<int8_t>(v + 4 * high - 4);
  });
}

// The 6-bit scales and minimums of Q4_K and Q5_K: 8 each in 12 bytes, one pair per 32 elements.
void unpack_scales_mins(const uint8_t* s, Unpacked256& out) {
  for (size_t j = 0; j < 8; ++j) {
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
    const int min = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
    out.scale[2 * j] = out.scale[2 * j + 1] = static_cast<int16_t>(scale);
    out.min[2 * j] = out.min[2 * j + 1] = static_cast<int16_t>(min);
  }
}

void unpack(const BlockQ4_K& b, Unpacked256& out) {
  out.d = f16_to_f32(b.d);
  out.dmin = f16_to_f32(b.dmin);
  unpack_scales_mins(b.scales, out);
  for (size_t k = 0; k < 4; ++k) {
    unpack_nibbles(b.qs + 32 * k, 32, out.q + 64 * k, [](int v, size_t) { return v; });
  }
}

void unpack(const BlockQ5_K& b, Unpacked256& out) {
  out.d = f16_to_f32(b.d);
  out.dmin = f16_to_f32(b.dmin);
  unpack_scales_mins(b.scales, out);
  for (size_t k = 0; k < 4; ++k) {
    unpack_nibbles(b.qs + 32 * k, 32, out.q + 64 * k, [&](int v, size_t j) {
      return v | (((b.qh[j % 32] >> (2 * k + j / 32)) & 1) << 4);
    });
  }
}

void unpack(const BlockQ6_K& b, Unpacked256& out) {
  out.d = f16_to_f32(b.d);
  for (size_t g = 0; g < 16; ++g) out.scale[g] = b.scales[g];
  for (size_t half = 0; half < 2; ++half) {
    unpack_nibbles(b.ql + 64 * half, 64, out.q + 128 * half, [&](int v, size_t j) {
      return (v | (((b.qh[32 * half + j % 32] >> (2 * (j / 32))) & 3) << 4)) - 32;
    });
  }
}

void unpack(const BlockIQ4_XS& b, Unpacked256& out) {
  out.d = f16_to_f32(b.d);
  for (size_t j = 0; j < 8; ++j) {
    const int low = (b.scales_l[j / 2] >> (4 * (j % 2))) & 15;
    const int high = (b.scales_h >> (2 * j)) & 3;
    out.scale[2 * j] = out.scale[2 * j + 1] = static_cast<int16_t>((low | (high << 4)) - 32);
    unpack_nibbles(b.qs + 16 * j, 16, out.q + 32 * j, [](int v, size_t) { return kIq4Levels[v]; });
  }
}

template <class Block>
  requires requires(const Block& b, WideBlock& wide) { unpack(b, wide); }
void unpack(const Block& b, Unpacked256& out) {
  WideBlock wide;
  unpack(b, wide);
  out.d = wide.d;
  for (size_t g = 0; g < 16; ++g) out.scale[g] = wide.scale[g];
  std::memcpy(out.q, wide.q, sizeof out.q);
}

template <class Block>
constexpr bool kHasMinimum256 = requires(Block b) {
  b.dmin;
};

// sum over 16 groups of scale[g] * dot of the group; below 2^28 in magnitude for every format.
int32_t scaled_dot(const Unpacked256& w, const int8_t* x) {
  int32_t sum = 0;
  for (size_t g = 0; g < 16; ++g) {
    int32_t dot = 0;
    for (size_t i = 16 * g; i < 16 * g + 16; ++i) dot += w.q[i] * x[i];
    sum += w.scale[g] * dot;
  }
  return sum;
}

template <class Block>
void matmul256(const MatmulArgs& a) noexcept {
  const size_t n_blocks = a.cols / 256;
  for (size_t r = 0; r < a.n_rows; ++r) {
    for (size_t t = 0; t < a.n_tokens; ++t) a.y[t * a.y_stride + r] = 0.0f;
    for (size_t b = 0; b < n_blocks; ++b) {
      Block block;
      std::memcpy(&block, a.w + r * a.w_stride + b * sizeof block, sizeof block);
      Unpacked256 w;
      unpack(block, w);
      for (size_t t = 0; t < a.n_tokens; ++t) {
        const auto& act = reinterpret_cast<const BlockAct256*>(a.x + t * a.x_stride)[b];
        float& y = a.y[t * a.y_stride + r];
        y = std::fma(static_cast<float>(scaled_dot(w, act.qs)), w.d * act.d, y);
        if constexpr (kHasMinimum256<Block>) {
          int32_t mins = 0;
          for (size_t g = 0; g < 16; ++g) mins += w.min[g] * act.bsums[g];
          y = std::fma(static_cast<float>(mins), -(w.dmin * act.d), y);
        }
      }
    }
  }
}

// ---- float weights -----------------------------------------------------------------------------
constexpr size_t kLanes = 16;

float lane_sum(float* lane) {
  for (size_t step = kLanes / 2; step > 0; step /= 2) {
    for (size_t i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}

// sum of w(i) * x[i]: element i goes to partial sum i % 16, then the partial sums as a tree.
template <class LoadW>
float dot_lanes(LoadW w, const float* x, size_t n) {
  float lane[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lane[j] += w(i + j) * x[i + j];
  }
  for (size_t j = 0; i + j < n; ++j) lane[j] += w(i + j) * x[i + j];
  return lane_sum(lane);
}

// Weight rows are only 2-byte aligned.
float load_f32(const std::byte* p, size_t i) {
  float v;
  std::memcpy(&v, p + 4 * i, 4);
  return v;
}

uint16_t load_u16(const std::byte* p, size_t i) {
  uint16_t v;
  std::memcpy(&v, p + 2 * i, 2);
  return v;
}

float load_f16(const std::byte* p, size_t i) { return f16_to_f32(load_u16(p, i)); }
float load_bf16(const std::byte* p, size_t i) { return bf16_to_f32(load_u16(p, i)); }

template <float (*Load)(const std::byte*, size_t)>
void matmul_float(const MatmulArgs& a) noexcept {
  for (size_t r = 0; r < a.n_rows; ++r) {
    const std::byte* w = a.w + r * a.w_stride;
    for (size_t t = 0; t < a.n_tokens; ++t) {
      const auto* x = reinterpret_cast<const float*>(a.x + t * a.x_stride);
      a.y[t * a.y_stride + r] = dot_lanes([w](size_t i) { return Load(w, i); }, x, a.cols);
    }
  }
}

// ---- activations -------------------------------------------------------------------------------
// max |x| by the bits without sign, in which NaN and infinity are above every number.
uint32_t max_magnitude_bits(const float* x, size_t n) {
  uint32_t max = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    max = bits > max ? bits : max;
  }
  return max;
}

// To nearest, ties to even, for |x| < 2^22: the adder rounds at the unit.
int32_t round_even(float x) {
  constexpr float kMagic = 0x1.8p23f;
  return std::bit_cast<int32_t>(x + kMagic) - std::bit_cast<int32_t>(kMagic);
}

// Quantizes n values to q and returns d (rules: kernels.h).
float quantize_block(const float* x, size_t n, int8_t* q) {
  const uint32_t max_bits = max_magnitude_bits(x, n);
  const float max = std::bit_cast<float>(max_bits);
  const bool finite = max_bits < 0x7f800000u;
  const float inverse = finite && max >= kActFloor ? 127.0f / max : 0.0f;
  for (size_t i = 0; i < n; ++i)
    q[i] = inverse == 0.0f ? int8_t{0} : static_cast<int8_t>(round_even(x[i] * inverse));
  if (!finite) return std::bit_cast<float>(0x7fc00000u);
  return inverse == 0.0f ? 0.0f : max / 127.0f;
}

void quantize_act32(const float* x, void* dst, size_t n) noexcept {
  auto* out = static_cast<BlockAct32*>(dst);
  for (size_t b = 0; b < n / 32; ++b) {
    out[b].d = quantize_block(x + 32 * b, 32, out[b].qs);
    int sum = 0;
    for (int8_t q : out[b].qs) sum += q;
    out[b].sum = sum;
  }
}

void quantize_act256(const float* x, void* dst, size_t n) noexcept {
  auto* out = static_cast<BlockAct256*>(dst);
  for (size_t b = 0; b < n / 256; ++b) {
    out[b].d = quantize_block(x + 256 * b, 256, out[b].qs);
    for (size_t g = 0; g < 16; ++g) {
      int sum = 0;
      for (size_t i = 16 * g; i < 16 * g + 16; ++i) sum += out[b].qs[i];
      out[b].bsums[g] = static_cast<int16_t>(sum);
    }
    for (size_t g = 0; g < 8; ++g)
      out[b].bsums32[g] = static_cast<int16_t>(out[b].bsums[2 * g] + out[b].bsums[2 * g + 1]);
  }
}

// ---- element-wise ------------------------------------------------------------------------------
void rms_norm(const float* x, const float* w, float eps, float* y, size_t n) noexcept {
  double sum = 0.0;
  for (size_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double mean = sum / static_cast<double>(n);
  const float scale = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(eps)));
  for (size_t i = 0; i < n; ++i) y[i] = x[i] * scale * w[i];
}

void rope(float* x, const float* cs, size_t n_rot) noexcept {
  for (size_t i = 0; i + 1 < n_rot; i += 2) {
    const float a = x[i], b = x[i + 1], c = cs[i], s = cs[i + 1];
    x[i] = a * c - b * s;
    x[i + 1] = a * s + b * c;
  }
}

void softmax(float* x, size_t n) noexcept {
  float max = x[0];
  for (size_t i = 1; i < n; ++i) max = x[i] > max ? x[i] : max;
  double sum = 0.0;
  for (size_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - max);
    sum += static_cast<double>(x[i]);
  }
  const float inverse = static_cast<float>(1.0 / sum);
  for (size_t i = 0; i < n; ++i) x[i] *= inverse;
}

void silu_mul(const float* gate, const float* up, float* y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void add(float* y, const float* x, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) y[i] += x[i];
}

void add_scaled(float* y, const float* x, float s, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) y[i] += s * x[i];
}

void f32_to_f16_row(const float* x, uint16_t* y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) y[i] = f32_to_f16(x[i]);
}

void f16_to_f32_row(const uint16_t* x, float* y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) y[i] = f16_to_f32(x[i]);
}

// ---- the table ---------------------------------------------------------------------------------
template <DType D>
void decode_row(const void* src, float* dst, size_t n) noexcept {
  format_of(D).decode_row(src, dst, n);
}

template <DType D>
void set_format(KernelTable& table, MatmulFn matmul) {
  table.matmul[static_cast<size_t>(D)] = matmul;
  table.decode_row[static_cast<size_t>(D)] = decode_row<D>;
}

void fill_formats(KernelTable& table) {
  set_format<DType::F32>(table, matmul_float<load_f32>);
  set_format<DType::F16>(table, matmul_float<load_f16>);
  set_format<DType::BF16>(table, matmul_float<load_bf16>);
  set_format<DType::Q4_0>(table, matmul32<BlockQ4_0>);
  set_format<DType::Q4_1>(table, matmul32<BlockQ4_1>);
  set_format<DType::Q5_0>(table, matmul32<BlockQ5_0>);
  set_format<DType::Q5_1>(table, matmul32<BlockQ5_1>);
  set_format<DType::Q8_0>(table, matmul32<BlockQ8_0>);
  set_format<DType::IQ4_NL>(table, matmul32<BlockIQ4_NL>);
  set_format<DType::Q2_K>(table, matmul256<BlockQ2_K>);
  set_format<DType::Q3_K>(table, matmul256<BlockQ3_K>);
  set_format<DType::Q4_K>(table, matmul256<BlockQ4_K>);
  set_format<DType::Q5_K>(table, matmul256<BlockQ5_K>);
  set_format<DType::Q6_K>(table, matmul256<BlockQ6_K>);
  set_format<DType::IQ4_XS>(table, matmul256<BlockIQ4_XS>);
  set_format<DType::IQ1_S>(table, matmul256<BlockIQ1_S>);
  set_format<DType::IQ1_M>(table, matmul256<BlockIQ1_M>);
  set_format<DType::IQ2_XXS>(table, matmul256<BlockIQ2_XXS>);
  set_format<DType::IQ2_XS>(table, matmul256<BlockIQ2_XS>);
  set_format<DType::IQ2_S>(table, matmul256<BlockIQ2_S>);
  set_format<DType::IQ3_XXS>(table, matmul256<BlockIQ3_XXS>);
  set_format<DType::IQ3_S>(table, matmul256<BlockIQ3_S>);
  set_format<DType::TQ1_0>(table, matmul256<BlockTQ1_0>);
  set_format<DType::TQ2_0>(table, matmul256<BlockTQ2_0>);
}

}  // namespace

void fill_scalar(KernelTable& table) {
  fill_formats(table);
  table.quantize_act32 = quantize_act32;
  table.quantize_act256 = quantize_act256;
  table.rms_norm = rms_norm;
  table.rope = rope;
  table.softmax = softmax;
  table.silu_mul = silu_mul;
  table.add = add;
  table.add_scaled = add_scaled;
  table.fit = kPlainFitOps;
  table.f32_to_f16 = f32_to_f16_row;
  table.f16_to_f32 = f16_to_f32_row;
  add_scalar_attention(table);
}

}  // namespace duet
