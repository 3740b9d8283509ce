// Attention over keys and values of a run of positions.
//
// Keys are cut at fixed positions into spans of kSpan and these into tiles of 32, one key for each lane of a warp. Each
// (row, head, span) is evaluated alone (softmax online over its tiles), its unfinished result stored, and those of a
// row merged in order of their spans. So the bits of a row depend on its position and the keys it sees alone.
#include <algorithm>

#include "runtime/cuda/activations.cuh"
#include "runtime/cuda/operations.h"

namespace duet::gpu {
namespace device {

constexpr uint32_t kSpan = 256, kTileKeys = 32, kWarpRows = 4;
constexpr uint32_t kFewWarps = 4, kManyWarps = 8;  // of a block of threads

// Finite, so that differences of two of them are no NaN; below every score.
constexpr float kLowest = -3.0e38f;

struct AttendArgs {
  HeadShape shape;
  const KvRun* runs;
  uint32_t n_runs, row_begin, row_end;  // rows of the chunk that this launch takes
  uint32_t n_spans;                     // that a row sees at most
  float scale;                          // of scores in units of log2(e)
  const float* q;
  float* partials;  // [row_end - row_begin][n_head][n_spans][head_dim + 2]: values, largest score, sum of weights
  float* out;
};

__device__ __forceinline__ uint32_t first_key(const HeadShape& shape, uint32_t position) {
  return shape.window > 0 && position + 1 > shape.window ? position + 1 - shape.window : 0;
}

__device__ __forceinline__ size_t partial_floats(const HeadShape& shape) { return shape.head_dim + 2; }

__device__ __forceinline__ float* partial(const AttendArgs& a, uint32_t row, uint32_t head, uint32_t span) {
  const size_t index = (size_t{row - a.row_begin} * a.shape.n_head + head) * a.n_spans + span;
  return a.partials + index * partial_floats(a.shape);
}

// ---- keys and values ---------------------------------------------------------------------------------
struct F32Kv {
  static __device__ __forceinline__ float at(const std::byte* data, const std::byte*, size_t row, uint32_t head_dim, uint32_t i) {
    return reinterpret_cast<const float*>(data)[row * head_dim + i];
  }
};
struct F16Kv {
  static __device__ __forceinline__ float at(const std::byte* data, const std::byte*, size_t row, uint32_t head_dim, uint32_t i) {
    return half_to_float(reinterpret_cast<const uint16_t*>(data)[row * head_dim + i]);
  }
};
struct Q8Kv {
  static __device__ __forceinline__ float at(const std::byte* data, const std::byte* scales, size_t row, uint32_t head_dim, uint32_t i) {
    const float d = half_to_float(reinterpret_cast<const uint16_t*>(scales)[row * (head_dim / 32) + i / 32]);
    return d * static_cast<float>(reinterpret_cast<const int8_t*>(data)[row * head_dim + i]);
  }
};

// ---- one span ------------------------------------------------------------------------------------------
// Shared memory: queries of the block's rows [rows][pitch], then a tile of keys or values [32][pitch], then weights
// [rows][32]. The pitch puts the lanes' rows into different banks.
__device__ __forceinline__ uint32_t pitch_of(uint32_t head_dim) { return head_dim + 1; }

// Rows of the chunk times query heads of a KV head that a block takes: pair p is row p / group, head p % group.
struct Tile {
  const KvRun* run;
  uint32_t first_pair, n_pairs;  // within the run's rows that the launch takes
  uint32_t first_row;            // of those rows, in the chunk
};

__device__ __forceinline__ Tile find_tile(const AttendArgs& a, uint32_t index, uint32_t size, uint32_t group) {
  for (uint32_t i = 0; i < a.n_runs; ++i) {
    const KvRun& run = a.runs[i];
    const uint32_t begin = run.row > a.row_begin ? run.row : a.row_begin;
    const uint32_t run_end = run.row + run.n, end = run_end < a.row_end ? run_end : a.row_end;
    if (begin >= end) continue;
    const uint32_t n_pairs = (end - begin) * group, n_tiles = (n_pairs + size - 1) / size;
    if (index < n_tiles) return {&run, index * size, n_pairs - index * size < size ? n_pairs - index * size : size, begin};
    index -= n_tiles;
  }
  return {};
}

template <class Kv>
__device__ __forceinline__ void load_tile(const AttendArgs& a, const std::byte* data, const std::byte* scales, uint32_t head_kv,
                                          uint32_t first, uint32_t end, float* tile) {
  const uint32_t dim = a.shape.head_dim, pitch = pitch_of(dim);
  for (uint32_t i = threadIdx.x; i < kTileKeys * dim; i += blockDim.x) {
    const uint32_t key = i / dim, element = i % dim;
    const size_t row = size_t{first + key} * a.shape.n_head_kv + head_kv;
    tile[key * pitch + element] = first + key < end ? Kv::at(data, scales, row, dim, element) : 0.0f;
  }
}

// What a warp knows of one of its rows. Lane l holds elements l + 32 j of the sum of values.
template <uint32_t kDims>
struct RowState {
  uint32_t begin, end;  // keys it sees within the span; none: nothing to do
  float max = kLowest, sum = 0.0f;
  float values[kDims / 32] = {};
};

__device__ __forceinline__ float max_of_warp(float v) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}
__device__ __forceinline__ float sum_of_warp(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// Weights of the tile's keys for the warp's rows; what was summed up to now is scaled to the new largest score.
template <uint32_t kDims>
__device__ __forceinline__ void weigh_tile(const AttendArgs& a, const float* q, const float* keys, uint32_t first, float* weights,
                                           RowState<kDims> (&rows)[kWarpRows]) {
  const uint32_t lane = threadIdx.x % 32, dim = a.shape.head_dim, pitch = pitch_of(dim);
  float scores[kWarpRows] = {};
  for (uint32_t i = 0; i < dim; ++i) {
    const float key = keys[lane * pitch + i];
#pragma unroll
    for (uint32_t r = 0; r < kWarpRows; ++r) scores[r] = __fmaf_rn(q[r * pitch + i], key, scores[r]);
  }
#pragma unroll
  for (uint32_t r = 0; r < kWarpRows; ++r) {
    RowState<kDims>& row = rows[r];
    if (row.begin >= first + kTileKeys || row.end <= first) continue;  // the same for all lanes
    const bool seen = first + lane >= row.begin && first + lane < row.end;
    const float score = seen ? scores[r] * a.scale : kLowest;
    // A NaN must get through, and fmaxf() drops it.
    const float poison = sum_of_warp(seen ? score * 0.0f : 0.0f);
    const float max = fmaxf(row.max, max_of_warp(score)), old = exp2f(row.max - max);
    const float weight = seen ? exp2f(score - max) + poison : 0.0f;
    weights[r * kTileKeys + lane] = weight;
    row.sum = row.sum * old + sum_of_warp(weight);
    row.max = max;
#pragma unroll
    for (float& value : row.values) value *= old;
  }
}

template <uint32_t kDims>
__device__ __forceinline__ void mix_tile(const AttendArgs& a, const float* values, uint32_t first, const float* weights,
                                         RowState<kDims> (&rows)[kWarpRows]) {
  const uint32_t lane = threadIdx.x % 32, dim = a.shape.head_dim, pitch = pitch_of(dim);
#pragma unroll
  for (uint32_t r = 0; r < kWarpRows; ++r) {
    RowState<kDims>& row = rows[r];
    const uint32_t begin = row.begin > first ? row.begin - first : 0, end = row.end < first + kTileKeys ? row.end - first : kTileKeys;
    if (row.begin >= first + kTileKeys || row.end <= first) continue;
    for (uint32_t key = begin; key < end; ++key) {
      const float weight = weights[r * kTileKeys + key];
#pragma unroll
      for (uint32_t j = 0; j < kDims / 32; ++j) {
        const uint32_t element = lane + 32 * j;
        if (element < dim) row.values[j] = __fmaf_rn(weight, values[key * pitch + element], row.values[j]);
      }
    }
  }
}

// blockIdx: x tile of rows, y KV head, z span since the first one that the launch's rows may see.
template <class Kv, uint32_t kDims>
__global__ void attend_spans(AttendArgs a) {
  const uint32_t dim = a.shape.head_dim, pitch = pitch_of(dim), group = a.shape.n_head / a.shape.n_head_kv, head_kv = blockIdx.y;
  const uint32_t n_warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tile tile = find_tile(a, blockIdx.x, n_warps * kWarpRows, group);
  if (tile.run == nullptr) return;
  const KvRun& run = *tile.run;
  const auto position = [&](uint32_t pair) { return run.first + tile.first_row - run.row + pair / group; };
  const uint32_t last_pair = tile.first_pair + tile.n_pairs - 1, key_end = position(last_pair) + 1;
  const uint32_t tile_span = first_key(a.shape, position(tile.first_pair)) / kSpan, span = tile_span + blockIdx.z;
  if (span * kSpan >= key_end) return;
  float* queries = &shared<float>();
  float* keys = queries + n_warps * kWarpRows * pitch;
  float* weights = keys + kTileKeys * pitch + warp * kWarpRows * kTileKeys;
  for (uint32_t i = threadIdx.x; i < tile.n_pairs * dim; i += blockDim.x) {
    const uint32_t pair = tile.first_pair + i / dim, head = head_kv * group + pair % group;
    queries[i / dim * pitch + i % dim] = a.q[(size_t{tile.first_row + pair / group} * a.shape.n_head + head) * dim + i % dim];
  }
  RowState<kDims> rows[kWarpRows];
#pragma unroll
  for (uint32_t r = 0; r < kWarpRows; ++r) {
    const uint32_t in_tile = warp * kWarpRows + r, at = position(tile.first_pair + in_tile);
    const uint32_t begin = first_key(a.shape, at), span_end = span * kSpan + kSpan;
    rows[r].begin = begin > span * kSpan ? begin : span * kSpan;
    rows[r].end = in_tile >= tile.n_pairs ? 0 : at + 1 < span_end ? at + 1 : span_end;
    if (rows[r].end <= rows[r].begin) rows[r].begin = rows[r].end = 0;
  }
  const uint32_t end = key_end < span * kSpan + kSpan ? key_end : span * kSpan + kSpan;
  const float* q = queries + warp * kWarpRows * pitch;
  for (uint32_t first = span * kSpan; first < end; first += kTileKeys) {
    __syncthreads();
    load_tile<Kv>(a, run.kv.keys, run.kv.key_scales, head_kv, first, end, keys);
    __syncthreads();
    weigh_tile(a, q, keys, first, weights, rows);
    __syncthreads();
    load_tile<Kv>(a, run.kv.values, run.kv.value_scales, head_kv, first, end, keys);
    __syncthreads();
    mix_tile(a, keys, first, weights, rows);
  }
#pragma unroll
  for (uint32_t r = 0; r < kWarpRows; ++r) {
    if (rows[r].begin == rows[r].end) continue;
    const uint32_t pair = tile.first_pair + warp * kWarpRows + r, row = tile.first_row + pair / group;
    const uint32_t own_first = first_key(a.shape, position(pair)) / kSpan;
    float* out = partial(a, row, head_kv * group + pair % group, span - own_first);
#pragma unroll
    for (uint32_t j = 0; j < kDims / 32; ++j)
      if (lane + 32 * j < dim) out[lane + 32 * j] = rows[r].values[j];
    if (lane == 0) {
      out[dim] = rows[r].max;
      out[dim + 1] = rows[r].sum;
    }
  }
}

// A block of 32 threads for each row and head.
__global__ void merge_spans(AttendArgs a) {
  const uint32_t row = a.row_begin + blockIdx.x, head = blockIdx.y, dim = a.shape.head_dim;
  uint32_t position = 0;
  for (uint32_t i = 0; i < a.n_runs; ++i)
    if (row >= a.runs[i].row && row < a.runs[i].row + a.runs[i].n) position = a.runs[i].first + row - a.runs[i].row;
  const uint32_t n_spans = position / kSpan - first_key(a.shape, position) / kSpan + 1;
  float max = kLowest, sum = 0.0f;
  for (uint32_t s = 0; s < n_spans; ++s) max = fmaxf(max, partial(a, row, head, s)[dim]);
  for (uint32_t s = 0; s < n_spans; ++s) {
    const float* part = partial(a, row, head, s);
    sum = __fmaf_rn(part[dim + 1], exp2f(part[dim] - max), sum);
  }
  const float inverse = 1.0f / sum;
  for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float value = 0.0f;
    for (uint32_t s = 0; s < n_spans; ++s) {
      const float* part = partial(a, row, head, s);
      value = __fmaf_rn(part[i], exp2f(part[dim] - max), value);
    }
    a.out[(size_t{row} * a.shape.n_head + head) * dim + i] = value * inverse;
  }
}

// ---- rotation and storing --------------------------------------------------------------------------------
struct StoreArgs {
  HeadShape shape;
  const KvRun* runs;
  uint32_t n_runs;
  const float* cos_sin;
  float *q, *k;
  const float* v;
};

__device__ __forceinline__ void rotate(float* x, uint32_t n_heads, const HeadShape& shape, const float* cs) {
  const uint32_t n_pairs = shape.n_rot / 2;
  for (uint32_t i = threadIdx.x; i < n_heads * n_pairs; i += blockDim.x) {
    const uint32_t pair = i % n_pairs;
    float* at = x + i / n_pairs * shape.head_dim + 2 * pair;
    const float a = at[0], b = at[1], c = cs[2 * pair], s = cs[2 * pair + 1];
    at[0] = a * c - b * s;
    at[1] = a * s + b * c;
  }
}

// Row `row` of a cache: `n` floats.
__device__ __forceinline__ void store_row(DType type, const float* x, uint32_t n, size_t row, std::byte* data, std::byte* scales) {
  if (type == DType::Q8_0) {
    for (uint32_t first = threadIdx.x / 32 * 32; first < n; first += blockDim.x) {
      const uint32_t i = first + threadIdx.x % 32;
      const float value = x[i];
      const Quantizer quantizer(max_of(__float_as_uint(value) & 0x7fffffffu, 32));
      reinterpret_cast<int8_t*>(data)[row * n + i] = static_cast<int8_t>(quantizer(value));
      if (threadIdx.x % 32 == 0) reinterpret_cast<uint16_t*>(scales)[row * (n / 32) + first / 32] = float_to_half(quantizer.d);
    }
    return;
  }
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (type == DType::F16) reinterpret_cast<uint16_t*>(data)[row * n + i] = float_to_half(x[i]);
    else reinterpret_cast<float*>(data)[row * n + i] = x[i];
  }
}

__global__ void rotate_and_store_rows(StoreArgs a) {
  const uint32_t row = blockIdx.x, n_kv = a.shape.n_head_kv * a.shape.head_dim;
  const float* cs = a.cos_sin + size_t{row} * a.shape.n_rot;
  float* k = a.k + size_t{row} * n_kv;
  rotate(a.q + size_t{row} * a.shape.n_head * a.shape.head_dim, a.shape.n_head, a.shape, cs);
  rotate(k, a.shape.n_head_kv, a.shape, cs);
  __syncthreads();
  for (uint32_t i = 0; i < a.n_runs; ++i) {
    const KvRun& run = a.runs[i];
    if (row < run.row || row >= run.row + run.n) continue;
    const size_t position = run.first + row - run.row;
    store_row(a.shape.kv_type, k, n_kv, position, run.kv.keys, run.kv.key_scales);
    store_row(a.shape.kv_type, a.v + size_t{row} * n_kv, n_kv, position, run.kv.values, run.kv.value_scales);
  }
}

}  // namespace device

namespace {

uint32_t u32(size_t n) { return static_cast<uint32_t>(n); }

constexpr size_t kScratchBytes = 64 << 20;  // at most, but for one row

// Spans that a row sees at most: its first key may lie anywhere in one.
size_t spans_seen(const HeadShape& shape, size_t max_keys) {
  return (max_keys + device::kSpan - 1) / device::kSpan + (shape.window > 0 ? 1 : 0);
}
size_t row_scratch_bytes(const HeadShape& shape, size_t max_keys) {
  return spans_seen(shape, max_keys) * shape.n_head * (shape.head_dim + 2) * sizeof(float);
}
size_t rows_at_once(const HeadShape& shape, size_t n, size_t max_keys) {
  return std::clamp<size_t>(kScratchBytes / row_scratch_bytes(shape, max_keys), 1, n);
}

template <class Kv, uint32_t kDims>
void attend_rows(const device::AttendArgs& args, Stream* stream) {
  const size_t n_rows = args.row_end - args.row_begin, group = args.shape.n_head / args.shape.n_head_kv, pitch = args.shape.head_dim + 1;
  const uint32_t n_warps = kDims <= 128 && n_rows * group > device::kFewWarps * device::kWarpRows ? device::kManyWarps : device::kFewWarps;
  const size_t tile_rows = n_warps * device::kWarpRows;
  const size_t n_tiles = n_rows * group / tile_rows + std::min<size_t>(args.n_runs, n_rows);
  const size_t shared_bytes = sizeof(float) * (tile_rows * (pitch + device::kTileKeys) + device::kTileKeys * pitch);
  // A tile's rows are a few positions apart: together they may see one more span than each.
  const Index3 grid{u32(n_tiles), args.shape.n_head_kv, args.n_spans + (args.shape.window > 0 ? 1u : 0u)};
  launch(device::attend_spans<Kv, kDims>, grid, 32 * n_warps, shared_bytes, stream, args);
}

template <class Kv>
void attend_type(const device::AttendArgs& args, Stream* stream) {
  if (args.shape.head_dim <= 64) attend_rows<Kv, 64>(args, stream);
  else if (args.shape.head_dim <= 128) attend_rows<Kv, 128>(args, stream);
  else attend_rows<Kv, 256>(args, stream);
}

}  // namespace

bool supports_heads(const HeadShape& shape) {
  if (shape.head_dim == 0 || shape.head_dim > kMaxHeadDim || shape.n_head_kv == 0 || shape.n_head % shape.n_head_kv != 0) return false;
  return shape.kv_type == DType::F32 || shape.kv_type == DType::F16 || (shape.kv_type == DType::Q8_0 && shape.head_dim % 32 == 0);
}

size_t attention_scratch_bytes(const HeadShape& shape, size_t n, size_t max_keys) {
  if (n == 0 || max_keys == 0) return 0;
  const size_t row = row_scratch_bytes(shape, max_keys);
  return std::max(row, std::min(kScratchBytes, n * row));
}

void attend(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, size_t max_keys, float scale, const float* q,
            void* scratch, float* out, Stream* stream) {
  if (n == 0 || max_keys == 0) return;
  constexpr float kScoreUnit = 1.44269504f;
  device::AttendArgs args{shape, runs, u32(n_runs), 0, 0, u32(spans_seen(shape, max_keys)), scale * kScoreUnit, q, static_cast<float*>(scratch), out};
  const size_t step = rows_at_once(shape, n, max_keys);
  for (size_t row = 0; row < n; row += step) {
    args.row_begin = u32(row);
    args.row_end = u32(std::min(n, row + step));
    if (shape.kv_type == DType::F32) attend_type<device::F32Kv>(args, stream);
    if (shape.kv_type == DType::F16) attend_type<device::F16Kv>(args, stream);
    if (shape.kv_type == DType::Q8_0) attend_type<device::Q8Kv>(args, stream);
    launch_apart(device::merge_spans, {args.row_end - args.row_begin, shape.n_head, 1}, 32, stream, args);
  }
}

void rotate_and_store(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, const float* cos_sin, float* q, float* k,
                      const float* v, Stream* stream) {
  if (n == 0) return;
  launch(device::rotate_and_store_rows, {u32(n), 1, 1}, 128, 0, stream, device::StoreArgs{shape, runs, u32(n_runs), cos_sin, q, k, v});
}

}  // namespace duet::gpu
