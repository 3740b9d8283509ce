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
  if (kv.type == DType::F16) return half_at(block + 2 * (i * kKvBlock + j));
  const std::byte* group = block + i / 32 * (34 * kKvBlock);
  return half_at(group + 2 * j) * load<int8_t>(group + (2 + i % 32) * kKvBlock + j);
}

// Element i of the value at `pos`.
float value_at(const KvView& kv, size_t pos, size_t i) {
  const std::byte* row = kv.values + pos / kKvSegment * kv.segment_bytes +
                         pos % kKvSegment * kv.value_row_bytes;
  if (kv.type == DType::F32) return load<float>(row + 4 * i);
  if (kv.type == DType::F16) return half_at(row + 2 * i);
  const std::byte* block = row + i / 32 * sizeof(BlockQ8_0);
  return half_at(block) * load<int8_t>(block + 2 + i % 32);
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
    weight = std::exp(weight - max);
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
  const float old_factor = first ? 0.0f : std::exp(out[dims] - top), factor = std::exp(max - top);
  for (size_t i = 0; i < head_dim; ++i)
    out[i] = first ? mixed[i] : out[i] * old_factor + mixed[i] * factor;
  out[dims + 1] = first ? sum : out[dims + 1] * old_factor + sum * factor;
  out[dims] = top;
}

// Keys [begin, end) of one segment.
void attend_segment(const AttentionArgs& a, const Row& row, size_t begin, size_t end) {
  const size_t dims = attention_row_floats(a.head_dim) - 16;
  float* weights = a.scratch;
  float* mixed = weights + kKvSegment;
  for (size_t pos = begin; pos < end; ++pos) {
    float score = 0.0f;
    for (size_t i = 0; i < a.head_dim; ++i) score += row.q[i] * a.scale * key_at(a.kv, pos, i);
    weights[pos % kKvSegment] = score;
  }
  float sum;
  const float max = weigh(weights, begin, end, &sum);
  for (size_t i = 0; i < a.head_dim; ++i) {
    mixed[i] = 0.0f;
    for (size_t pos = begin; pos < end; ++pos)
      mixed[i] += weights[pos % kKvSegment] * value_at(a.kv, pos, i);
  }
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
