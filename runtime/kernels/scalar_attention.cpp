// Attention of the reference table: the specification of KernelTable::attention.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "quant/f16.h"
#include "runtime/kernels/kernels.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

template <class T>
T load(const std::byte* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float half_at(const std::byte* p) { return f16_to_f32(load<uint16_t>(p)); }

// Element i of the key at `pos`.
float key_at(const KvView& kv, size_t pos, size_t i) {
  const size_t j = pos % kKvBlock;
  const std::byte* block = kv.keys + pos / kKvSegment * kv.segment_bytes +
                           pos % kKvSegment / kKvBlock * kv.key_block_bytes;
  if (kv.type == DType::F32) return load<float>(block + 4 * (i * kKvBlock + j));
  return half_at(block + 2 * (i * kKvBlock + j));
}

// Element i of the value at `pos`.
float value_at(const KvView& kv, size_t pos, size_t i) {
  const std::byte* row = kv.values + pos / kKvSegment * kv.segment_bytes +
                         pos % kKvSegment * kv.value_row_bytes;
  return kv.type == DType::F32 ? load<float>(row + 4 * i) : half_at(row + 2 * i);
}

struct Row {
  const float* q;
  size_t begin, end;  // keys it sees
  float* out;
};

// Scores of keys [begin, end) of one segment, in place by position in the segment, become weights.
float weigh(float* weights, size_t begin, size_t end, float* sum) {
  float max = std::numeric_limits<float>::lowest();
  for (size_t pos = begin; pos < end; ++pos)
    max = std::max(max, weights[pos % kKvSegment]);
  float lanes[kKvBlock] = {};
  for (size_t pos = begin; pos < end; ++pos) {
    float& weight = weights[pos % kKvSegment];
    weight = std::exp2(weight - max);
    lanes[pos % kKvBlock] += weight;
  }
  for (size_t step = kKvBlock / 2; step > 0; step /= 2)
    for (size_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  *sum = lanes[0];
  return max;
}

void merge(float* out, const float* mixed, size_t head_dim, size_t dims, float max, float sum) {
  const bool first = out[dims] == kNone;
  const float top = first ? max : std::max(max, out[dims]);
  const float old_factor = first ? 0.0f : std::exp2(out[dims] - top), factor = std::exp2(max - top);
  for (size_t i = 0; i < head_dim; ++i)
    out[i] = first ? mixed[i] : out[i] * old_factor + mixed[i] * factor;
  out[dims + 1] = first ? sum : out[dims + 1] * old_factor + sum * factor;
  out[dims] = top;
}

// Scores into `weights`, by position in the segment; float keys.
void score(const AttentionArgs& a, const Row& row, size_t begin, size_t end, float* weights) {
  const float scale = a.scale * kScoreUnit;
  for (size_t pos = begin; pos < end; ++pos) {
    float sum = 0.0f;
    for (size_t i = 0; i < a.head_dim; ++i) sum += row.q[i] * scale * key_at(a.kv, pos, i);
    weights[pos % kKvSegment] = sum;
  }
}

void mix(const AttentionArgs& a, const float* weights, size_t begin, size_t end, float* mixed) {
  for (size_t i = 0; i < a.head_dim; ++i) {
    mixed[i] = 0.0f;
    for (size_t pos = begin; pos < end; ++pos)
      mixed[i] += weights[pos % kKvSegment] * value_at(a.kv, pos, i);
  }
}

// ---- 8-bit keys and values ----------------------------------------------------------------------
// x * scale becomes integers, to the nearest; returns the unit, NaN when one is not finite.
float quantize16(const float* x, float scale, size_t n, int16_t* out) {
  float max = 0.0f, poison = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    max = std::max(max, std::abs(x[i] * scale));
    poison += x[i] * scale * 0.0f;
  }
  max += poison;
  const float factor = max >= kActFloor ? 32767.0f / max : 0.0f;
  for (size_t i = 0; i < n; ++i)
    out[i] = std::isfinite(max) ? static_cast<int16_t>(std::lrint(double{x[i] * scale} * double{factor})) : int16_t{0};
  return max / 32767.0f;
}

void score_q8(const AttentionArgs& a, const Row& row, size_t begin, size_t end, float* weights) {
  int16_t q[1024];  // formats/schema.cpp refuses larger heads
  const float unit = quantize16(row.q, a.scale * kScoreUnit, a.head_dim, q);
  for (size_t pos = begin; pos < end; ++pos) {
    const size_t lane = pos % kKvBlock;
    const std::byte* group = a.kv.keys + pos / kKvSegment * a.kv.segment_bytes +
                             pos % kKvSegment / kKvBlock * a.kv.key_block_bytes;
    float score = 0.0f;
    for (size_t g = 0; g < a.head_dim; g += 32, group += 34 * kKvBlock) {
      int32_t sum = 0;
      for (size_t i = 0; i < 32; ++i)
        sum += q[g + i] * load<int8_t>(group + 2 * kKvBlock + (i / 2 * kKvBlock + lane) * 2 + i % 2);
      score = std::fma(static_cast<float>(sum), half_at(group + 2 * lane), score);
    }
    weights[pos % kKvSegment] = score * unit;
  }
}

void mix_q8(const AttentionArgs& a, const float* weights, size_t begin, size_t end, float* mixed) {
  const std::byte* segment = a.kv.values + begin / kKvSegment * a.kv.segment_bytes;
  const std::byte* integers = segment + a.head_dim / 32 * 2 * kKvSegment;
  const auto scale = [&](size_t g, size_t j) { return half_at(segment + 2 * (g * kKvSegment + j)); };
  const size_t lo = begin % kKvSegment, hi = lo + (end - begin);
  float max = 0.0f, poison = 0.0f;
  for (size_t j = lo; j < hi; ++j) {
    float largest = 0.0f;
    for (size_t g = 0; g < a.head_dim / 32; ++g) {
      largest = std::max(largest, scale(g, j));
      poison += weights[j] * scale(g, j) * 0.0f;
    }
    max = std::max(max, weights[j] * largest);
  }
  max += poison;
  const float factor = max >= kActFloor ? 32767.0f / max : 0.0f;
  for (size_t i = 0; i < a.head_dim; ++i) {
    int32_t sum = 0;
    for (size_t j = lo; j < hi && std::isfinite(max); ++j) {
      const int32_t value = load<int8_t>(integers + ((i / 32 * kKvSegment + j / 2 * 2) * 32 + i % 32 * 2) + j % 2);
      sum += static_cast<int32_t>(std::lrint(double{weights[j] * factor} * double{scale(i / 32, j)})) * value;
    }
    mixed[i] = static_cast<float>(sum) * (max / 32767.0f);
  }
}

// Keys [begin, end) of one segment.
void attend_segment(const AttentionArgs& a, const Row& row, size_t begin, size_t end) {
  const size_t dims = attention_row_dims(a.head_dim);
  const bool q8 = a.kv.type == DType::Q8_0;
  float* weights = a.scratch;
  float* mixed = weights + kKvSegment;
  (q8 ? score_q8 : score)(a, row, begin, end, weights);
  float sum;
  const float max = weigh(weights, begin, end, &sum);
  (q8 ? mix_q8 : mix)(a, weights, begin, end, mixed);
  merge(row.out, mixed, a.head_dim, dims, max, sum);
}

void attention(const AttentionArgs& a) noexcept {
  const size_t row_floats = attention_row_floats(a.head_dim);
  for (size_t t = 0; t < a.n_tokens; ++t) {
    const size_t end = std::min(a.first + t + 1, a.key_end), after = a.first + t + 1;
    const size_t begin = std::max(a.key_begin, a.window > 0 && after > a.window ? after - a.window : 0);
    for (size_t h = 0; h < a.group; ++h) {
      const Row row{a.q + t * a.q_stride + h * a.head_dim, begin, end,
                    a.out + (t * a.group + h) * row_floats};
      row.out[row_floats - 16] = kNone;
      for (size_t pos = begin; pos < end;) {
        const size_t stop = std::min(end, (pos / kKvSegment + 1) * kKvSegment);
        attend_segment(a, row, pos, stop);
        pos = stop;
      }
    }
  }
}

}  // namespace

void add_scalar_attention(KernelTable& table) { table.attention = attention; }

}  // namespace duet
