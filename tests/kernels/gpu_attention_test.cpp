// Attention on the emulated GPU against doubles; a row's bits whatever shares the call.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quant/f16.h"
#include "runtime/kernels/kernels.h"
#include "tests/support/close.h"
#include "tests/support/gpu.h"

namespace duet::test {
namespace {

struct Sequence {
  size_t first, n;  // positions [first, first + n) are in the chunk, those before were stored earlier
};

// Keys and values of one sequence on the device, and what they are after rounding.
struct Cache {
  static constexpr size_t kMore = 5;  // positions behind the end
  GpuArray<std::byte> keys, values, key_scales, value_scales;
  Cache(gpu::Device& device, const gpu::HeadShape& s, size_t n)
      : keys(device, bytes(s, n)), values(device, bytes(s, n)), key_scales(device, scale_bytes(s, n)), value_scales(device, scale_bytes(s, n)) {}
  static size_t elements(const gpu::HeadShape& s, size_t n) { return (n + kMore) * s.n_head_kv * s.head_dim; }
  static size_t bytes(const gpu::HeadShape& s, size_t n) {
    return elements(s, n) * (s.kv_type == DType::F32 ? 4 : s.kv_type == DType::F16 ? 2 : 1);
  }
  static size_t scale_bytes(const gpu::HeadShape& s, size_t n) { return std::max<size_t>(elements(s, n) / 32 * 2, 2); }
  gpu::KvLayer layer() const { return {keys.data(), values.data(), key_scales.data(), value_scales.data()}; }
};

std::vector<double> floats_of(const gpu::HeadShape& s, const std::vector<std::byte>& data, const std::vector<std::byte>& scales) {
  std::vector<double> out;
  if (s.kv_type == DType::F32)
    for (size_t i = 0; i < data.size() / 4; ++i) out.push_back(double{reinterpret_cast<const float*>(data.data())[i]});
  if (s.kv_type == DType::F16)
    for (size_t i = 0; i < data.size() / 2; ++i) out.push_back(double{f16_to_f32(reinterpret_cast<const uint16_t*>(data.data())[i])});
  if (s.kv_type == DType::Q8_0)
    for (size_t i = 0; i < data.size(); ++i)
      out.push_back(double{f16_to_f32(reinterpret_cast<const uint16_t*>(scales.data())[i / 32])} * static_cast<double>(static_cast<int8_t>(data[i])));
  return out;
}

// A chunk of several sequences. Positions before the chunk are stored by calls of their own.
struct Problem {
  gpu::Device& device;
  gpu::HeadShape shape;
  std::vector<Sequence> sequences;
  std::vector<std::unique_ptr<Cache>> caches;
  std::vector<float> q, cos_sin;  // of the chunk
  size_t n = 0, max_keys = 0;

  Problem(gpu::Device& d, const gpu::HeadShape& s, std::vector<Sequence> which, uint64_t seed) : device(d), shape(s), sequences(std::move(which)) {
    Rng rng(seed);
    for (const Sequence& sequence : sequences) {
      caches.push_back(std::make_unique<Cache>(device, shape, sequence.first + sequence.n));
      if (sequence.first > 0) store({{caches.back()->layer(), 0, static_cast<uint32_t>(sequence.first), 0}}, sequence.first, rng);
      n += sequence.n;
      max_keys = std::max(max_keys, sequence.first + sequence.n);
    }
    if (shape.window > 0) max_keys = std::min<size_t>(max_keys, shape.window);
    q = store(runs(), n, rng);
  }

  std::vector<gpu::KvRun> runs() const {
    std::vector<gpu::KvRun> out;
    uint32_t row = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
      out.push_back({caches[i]->layer(), row, static_cast<uint32_t>(sequences[i].n), static_cast<uint32_t>(sequences[i].first)});
      row += out.back().n;
    }
    return out;
  }

  // Random rows; the rotated queries.
  std::vector<float> store(const std::vector<gpu::KvRun>& which, size_t rows, Rng& rng) {
    const auto random = [&](size_t count) {
      std::vector<float> out(count);
      for (float& x : out) x = 2.0f * rng.symmetric();
      return out;
    };
    cos_sin = random(rows * shape.n_rot);
    const std::vector<float> query = random(rows * shape.n_head * shape.head_dim), key = random(rows * shape.n_head_kv * shape.head_dim);
    const std::vector<float> value = random(key.size());
    const GpuArray<float> cs(device, cos_sin), gq(device, query), gk(device, key), gv(device, value);
    const GpuArray<gpu::KvRun> gruns(device, which);
    device.rotate_and_store(shape, gruns.data(), which.size(), rows, cs.data(), gq.data(), gk.data(), gv.data());
    check_rotated(query, gq.values(), rows, shape.n_head);
    check_rotated(key, gk.values(), rows, shape.n_head_kv);
    return gq.values();
  }

  void check_rotated(std::vector<float> before, const std::vector<float>& after, size_t rows, size_t heads) const {
    for (size_t i = 0; i < rows * heads; ++i)
      select_kernels("scalar").rope(before.data() + i * shape.head_dim, cos_sin.data() + i / heads * shape.n_rot, shape.n_rot);
    CHECK(before == after);
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape.head_dim)); }

  // Rows [row, row + count) of the first sequence, or all rows.
  std::vector<float> attend(const std::vector<gpu::KvRun>& which, const std::vector<float>& queries) {
    const size_t rows = queries.size() / (shape.n_head * shape.head_dim);
    const GpuArray<float> gq(device, queries), out(device, queries.size());
    const GpuArray<gpu::KvRun> gruns(device, which);
    const GpuArray<std::byte> scratch(device, device.attention_scratch_bytes(shape, rows, max_keys));
    device.attend(shape, gruns.data(), which.size(), rows, max_keys, scale(), gq.data(), scratch.data(), out.data());
    return out.values();
  }

  // In doubles.
  std::vector<double> row(size_t i, size_t t, size_t head, const float* query) const {
    const size_t pos = sequences[i].first + t, group = shape.n_head / shape.n_head_kv, dim = shape.head_dim;
    const size_t begin = shape.window > 0 && pos + 1 > shape.window ? pos + 1 - shape.window : 0;
    const Cache& cache = *caches[i];
    const std::vector<double> k = floats_of(shape, cache.keys.values(), cache.key_scales.values());
    const std::vector<double> v = floats_of(shape, cache.values.values(), cache.value_scales.values());
    std::vector<double> out(dim, 0.0), scores;
    for (size_t key = begin; key <= pos; ++key) {
      double score = 0.0;
      for (size_t d = 0; d < dim; ++d) score += double{query[d]} * k[(key * shape.n_head_kv + head / group) * dim + d];
      scores.push_back(score * double{scale()});
    }
    const double max = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (size_t key = begin; key <= pos; ++key) {
      const double weight = std::exp(scores[key - begin] - max);
      sum += weight;
      for (size_t d = 0; d < dim; ++d) out[d] += weight * v[(key * shape.n_head_kv + head / group) * dim + d];
    }
    for (double& x : out) x /= sum;
    return out;
  }
};

void check(gpu::Device& device, const gpu::HeadShape& shape, const std::vector<Sequence>& sequences, uint64_t seed) {
  Problem p(device, shape, sequences, seed);
  const std::vector<float> got = p.attend(p.runs(), p.q);
  check_no_error(device);
  const size_t dim = shape.head_dim;
  double worst = 0.0;
  size_t row = 0;
  for (size_t i = 0; i < sequences.size(); ++i)
    for (size_t t = 0; t < sequences[i].n; ++t, ++row)
      for (size_t head = t % 2; head < shape.n_head; head += 2) {
        const size_t at = (row * shape.n_head + head) * dim;
        const std::vector<double> want = p.row(i, t, head, p.q.data() + at);
        for (size_t d = 0; d < dim; ++d) worst = std::max(worst, std::abs(double{got[at + d]} - want[d]));
      }
  INFO("head_dim ", dim, " window ", shape.window, " type ", static_cast<int>(shape.kv_type), " rows ", row);
  CHECK(worst < 2e-5);
  CHECK(std::none_of(got.begin(), got.end(), [](float x) { return std::isnan(x); }));
}

TEST_CASE("gpu attention within bounds") {
  const auto device = test_gpu();
  uint64_t seed = 1;
  for (const DType type : {DType::F32, DType::F16, DType::Q8_0}) {
    check(*device, {4, 2, 32, 32, 0, type}, {{0, 1}}, seed++);
    check(*device, {4, 2, 64, 64, 0, type}, {{0, 19}}, seed++);
    check(*device, {8, 2, 128, 64, 0, type}, {{300, 1}}, seed++);
    check(*device, {6, 2, 64, 32, 0, type}, {{250, 11}}, seed++);
    check(*device, {4, 4, 64, 64, 0, type}, {{5, 3}, {260, 1}, {0, 2}}, seed++);
    check(*device, {4, 1, 96, 96, 40, type}, {{500, 30}}, seed++);
    check(*device, {2, 1, 32, 32, 300, type}, {{520, 9}, {40, 5}}, seed++);
  }
  check(*device, {2, 1, 256, 256, 0, DType::F16}, {{30, 5}}, seed++);
  check(*device, {2, 1, 80, 80, 0, DType::F16}, {{30, 5}}, seed++);
}

TEST_CASE("gpu attention of a row does not depend on its neighbours") {
  const auto device = test_gpu();
  for (const uint32_t window : {0u, 60u}) {
    Problem p(*device, {4, 2, 64, 64, window, DType::F16}, {{240, 40}}, 9);
    const std::vector<float> all = p.attend(p.runs(), p.q);
    const size_t row_floats = p.shape.n_head * p.shape.head_dim;
    for (const auto& [first, count] : {std::pair<size_t, size_t>{0, 1}, {39, 1}, {7, 13}, {15, 2}}) {
      std::vector<gpu::KvRun> run = p.runs();
      run[0].first += static_cast<uint32_t>(first);
      run[0].n = static_cast<uint32_t>(count);
      const auto* begin = p.q.data() + first * row_floats;
      const std::vector<float> part = p.attend(run, {begin, begin + count * row_floats});
      CHECK(std::memcmp(part.data(), all.data() + first * row_floats, part.size() * sizeof(float)) == 0);
    }
  }
  check_no_error(*device);
}

// What is set aside for the longest context and the largest chunk is enough for all others.
TEST_CASE("gpu attention needs no more memory for fewer rows or keys") {
  const auto device = test_gpu();
  for (const uint32_t window : {0u, 4096u}) {
    const gpu::HeadShape shape{32, 8, 128, 128, window, DType::F16};
    size_t before = 0;
    for (size_t keys = 0; keys <= 32768; keys += 61) {
      size_t fewer = 0;
      for (const size_t n : {0u, 1u, 7u, 30u, 31u, 32u, 512u}) {
        const size_t n_bytes = device->attention_scratch_bytes(shape, n, keys);
        CHECK(n_bytes >= fewer);
        fewer = n_bytes;
      }
      CHECK(fewer >= before);
      before = fewer;
    }
  }
}

TEST_CASE("gpu attention: a NaN value reaches the rows that see it") {
  const auto device = test_gpu();
  Problem p(*device, {2, 1, 32, 32, 0, DType::F32}, {{20, 6}}, 11);
  const float nan = NAN;
  device->upload(p.caches[0]->values.data() + (23 * 32 + 5) * sizeof(float), &nan, sizeof nan);
  const std::vector<float> got = p.attend(p.runs(), p.q);
  bool right = true;
  for (size_t i = 0; i < got.size(); ++i) right = right && std::isnan(got[i]) == (i / 64 >= 3 && i % 32 == 5);
  CHECK(right);
  device->upload(p.caches[0]->keys.data() + (24 * 32 + 5) * sizeof(float), &nan, sizeof nan);
  const std::vector<float> later = p.attend(p.runs(), p.q);
  for (size_t i = 0; i < got.size(); ++i) right = right && std::isnan(later[i]) == (i / 64 >= 4 || (i / 64 == 3 && i % 32 == 5));
  CHECK(right);
  check_no_error(*device);
}

TEST_CASE("gpu keys and values of 8 bits are quantized as the cache of the CPU") {
  const auto device = test_gpu();
  Rng rng(12);
  const gpu::HeadShape shape{2, 2, 64, 0, 0, DType::Q8_0};
  const Cache cache(*device, shape, 1);
  std::vector<float> k(128), v(128);
  for (float& x : k) x = rng.symmetric();
  for (float& x : v) x = rng.symmetric();
  const GpuArray<float> q(*device, k), keys(*device, k), values(*device, v), cs(*device, std::vector<float>(1));
  const GpuArray<gpu::KvRun> runs(*device, std::vector<gpu::KvRun>{{cache.layer(), 0, 1, 2}});
  device->rotate_and_store(shape, runs.data(), 1, 1, cs.data(), q.data(), keys.data(), values.data());
  for (const bool of_keys : {true, false}) {
    std::vector<BlockAct32> want(4);
    select_kernels("scalar").quantize_act32((of_keys ? k : v).data(), want.data(), 128);
    const std::vector<std::byte> data = (of_keys ? cache.keys : cache.values).values(), scales = (of_keys ? cache.key_scales : cache.value_scales).values();
    for (size_t b = 0; b < 4; ++b) {
      CHECK(std::memcmp(data.data() + 256 + 32 * b, want[b].qs, 32) == 0);
      CHECK(reinterpret_cast<const uint16_t*>(scales.data())[8 + b] == f32_to_f16(want[b].d));
    }
  }
  check_no_error(*device);
}

}  // namespace
}  // namespace duet::test
