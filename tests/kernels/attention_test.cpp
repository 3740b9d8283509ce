// The attention kernel of every table against doubles, and one result per row whatever shares a
// call. Keys and values come through KvCache, which lays them out.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "quant/f16.h"
#include "runtime/kv_cache.h"
#include "tests/support/close.h"
#include "tests/support/isa.h"

namespace duet::test {
namespace {

struct Case {
  size_t n_keys, head_dim, group, n_tokens = 1, window = 0;
  KvType type = KvType::f32;
};

// One layer with two KV heads, of which the second is used: n_keys positions of random keys and
// values, then positions that no query sees, with NaN.
struct Problem {
  static constexpr size_t kHeads = 2, kHead = 1, kUnseen = 20;
  Case c;
  KvCache cache;
  std::vector<float> keys, values;  // [n_keys, head_dim] of the head in use, as given
  std::vector<float> queries;       // [n_tokens, 3 * group, head_dim]

  static HParams hparams(const Case& c) {
    HParams h;
    h.n_layer = 1;
    h.n_head_kv = kHeads;
    h.head_dim = static_cast<uint32_t>(c.head_dim);
    return h;
  }
  Problem(const KernelTable& table, const Case& which, uint64_t seed = 1)
      : c(which), cache(hparams(c), c.n_keys + kUnseen, c.type) {
    Rng rng(seed);
    const auto random = [&](size_t n, float magnitude) {
      std::vector<float> out(n);
      for (float& x : out) x = magnitude * rng.symmetric();
      return out;
    };
    for (size_t pos = 0; pos < c.n_keys; ++pos) {
      const auto k = random(kHeads * c.head_dim, 2.0f), v = random(kHeads * c.head_dim, 2.0f);
      cache.store(table, 0, pos, k.data(), v.data());
      keys.insert(keys.end(), k.begin() + static_cast<ptrdiff_t>(kHead * c.head_dim), k.end());
      values.insert(values.end(), v.begin() + static_cast<ptrdiff_t>(kHead * c.head_dim), v.end());
    }
    const std::vector<float> nan(kHeads * c.head_dim, NAN);
    for (size_t pos = c.n_keys; pos < c.n_keys + kUnseen; ++pos) cache.store(table, 0, pos, nan.data(), nan.data());
    queries = random(c.n_tokens * 3 * c.group * c.head_dim, 2.0f);
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c.head_dim)); }
  size_t first() const { return c.n_keys - c.n_tokens; }
  const float* query(size_t t, size_t h) const {
    return queries.data() + ((t * 3 + 1) * c.group + h) * c.head_dim;
  }
  size_t row_floats() const { return attention_row_floats(c.head_dim); }

  // Rows of tokens [t0, t1), as the table leaves them.
  std::vector<float> run(const KernelTable& table, size_t t0, size_t t1, size_t key_begin = 0,
                         size_t key_end = size_t{1} << 20) const {
    const size_t n_rows = (t1 - t0) * c.group;
    const GuardedBuffer scratch(attention_scratch_floats(n_rows, c.head_dim) * sizeof(float));
    const GuardedBuffer out(n_rows * row_floats() * sizeof(float));
    std::fill_n(scratch.as<float>(), attention_scratch_floats(n_rows, c.head_dim), NAN);
    std::fill_n(out.as<float>(), n_rows * row_floats(), NAN);
    table.attention({.kv = cache.view(0, kHead), .q = query(t0, 0), .q_stride = 3 * c.group * c.head_dim,
                     .n_tokens = t1 - t0, .group = c.group, .head_dim = c.head_dim,
                     .first = first() + t0, .window = c.window, .key_begin = key_begin, .key_end = key_end,
                     .scale = scale(), .scratch = scratch.as<float>(), .out = out.as<float>()});
    return {out.as<float>(), out.as<float>() + n_rows * row_floats()};
  }

  size_t first_seen(size_t t) const {
    const size_t end = first() + t + 1;
    return c.window > 0 && end > c.window ? end - c.window : 0;
  }
};

// Largest difference of any mixed value from doubles; `stored` gives what the cache holds for x.
template <class Stored>
double worst_error(const KernelTable& table, const Problem& p, const Stored& stored) {
  const Case& c = p.c;
  const std::vector<float> keys = stored(p.keys), values = stored(p.values), out = p.run(table, 0, c.n_tokens);
  double worst = 0;
  for (size_t t = 0; t < c.n_tokens; ++t)
    for (size_t h = 0; h < c.group; ++h) {
      std::vector<double> weights, exact(c.head_dim);
      double max = -1e300, sum = 0;
      for (size_t j = p.first_seen(t); j <= p.first() + t; ++j) {
        double score = 0;
        for (size_t i = 0; i < c.head_dim; ++i)
          score += double{p.query(t, h)[i]} * double{p.scale()} * double{keys[j * c.head_dim + i]};
        weights.push_back(score);
        max = std::max(max, score);
      }
      for (double& w : weights) sum += w = std::exp(w - max);
      for (size_t j = 0; j < weights.size(); ++j)
        for (size_t i = 0; i < c.head_dim; ++i)
          exact[i] += weights[j] / sum * double{values[(p.first_seen(t) + j) * c.head_dim + i]};
      const float* row = out.data() + (t * c.group + h) * p.row_floats();
      const float got_sum = row[p.row_floats() - 15];
      for (size_t i = 0; i < c.head_dim; ++i) {
        const double error = std::abs(double{row[i]} / double{got_sum} - exact[i]);
        worst = error <= worst ? worst : error;  // NaN counts as larger
      }
    }
  return worst;
}

std::vector<float> unchanged(const std::vector<float>& x) { return x; }
std::vector<float> halves(const std::vector<float>& x) {
  std::vector<float> out;
  for (const float v : x) out.push_back(f16_to_f32(f32_to_f16(v)));
  return out;
}

void check_against_doubles(const KernelTable& table) {
  for (const KvType type : {KvType::f32, KvType::f16})
    for (const size_t head_dim : {32u, 64u, 80u, 96u, 128u, 24u, 2u})
      for (const size_t n_keys : {1u, 15u, 16u, 17u, 255u, 256u, 257u, 1000u})
        for (const size_t group : {1u, 4u, 6u, 8u}) {
          if (head_dim != 128 && n_keys > 256 && group != 6) continue;
          const Problem p(table, {.n_keys = n_keys, .head_dim = head_dim, .group = group, .type = type});
          CAPTURE(head_dim);
          CAPTURE(n_keys);
          CAPTURE(group);
          CHECK(worst_error(table, p, type == KvType::f16 ? halves : unchanged) <= 4e-6);
        }
}
TEST_CASE("attention of one token equals doubles: scalar") { with_isa("scalar", check_against_doubles); }
TEST_CASE("attention of one token equals doubles: avx2") { with_isa("avx2", check_against_doubles); }
TEST_CASE("attention of one token equals doubles: avx512") { with_isa("avx512", check_against_doubles); }

constexpr Case kMany[] = {
    {.n_keys = 40, .head_dim = 128, .group = 4, .n_tokens = 40},
    {.n_keys = 300, .head_dim = 128, .group = 4, .n_tokens = 24, .type = KvType::f16},
    {.n_keys = 600, .head_dim = 80, .group = 6, .n_tokens = 16, .window = 100, .type = KvType::f16},
    {.n_keys = 270, .head_dim = 40, .group = 1, .n_tokens = 96, .window = 17},
    {.n_keys = 530, .head_dim = 64, .group = 3, .n_tokens = 32, .window = 1},
    {.n_keys = 300, .head_dim = 96, .group = 5, .n_tokens = 7, .window = 256, .type = KvType::f16},
    {.n_keys = 520, .head_dim = 64, .group = 8, .n_tokens = 12, .window = 263, .type = KvType::q8_0},
    {.n_keys = 265, .head_dim = 128, .group = 4, .n_tokens = 24, .type = KvType::q8_0},
};

// d = max / 127 in half precision, integers from the unrounded d.
std::vector<float> eights(const std::vector<float>& x) {
  std::vector<float> out;
  for (size_t b = 0; b < x.size(); b += 32) {
    float max = 0;
    for (size_t i = 0; i < 32; ++i) max = std::max(max, std::abs(x[b + i]));
    const float d = f16_to_f32(f32_to_f16(max / 127.0f));
    for (size_t i = 0; i < 32; ++i) {
      out.push_back(d * std::nearbyint(x[b + i] * (127.0f / max)));
      CHECK(std::abs(out.back() - x[b + i]) <= max * (0.5f / 127 + 0x1p-11f) * 1.001f);
    }
  }
  return out;
}

void check_many(const KernelTable& table) {
  for (const Case& c : kMany) {
    const Problem p(table, c);
    CAPTURE(c.n_keys);
    CAPTURE(c.head_dim);
    // 8-bit: queries and weights are rounded to 16 bits.
    const double bound = c.type == KvType::q8_0 ? 2e-4 : 4e-6;
    CHECK(worst_error(table, p, c.type == KvType::f32 ? unchanged : c.type == KvType::f16 ? halves : eights) <= bound);
  }
}
TEST_CASE("attention of many tokens equals doubles: scalar") { with_isa("scalar", check_many); }
TEST_CASE("attention of many tokens equals doubles: avx2") { with_isa("avx2", check_many); }
TEST_CASE("attention of many tokens equals doubles: avx512") { with_isa("avx512", check_many); }

// What the table set: the mixed values, the largest score and the sum.
bool same_rows(const Problem& p, const float* a, const float* b, size_t n_rows) {
  const size_t dims = p.row_floats() - 16;
  for (size_t r = 0; r < n_rows; ++r, a += p.row_floats(), b += p.row_floats()) {
    if (std::memcmp(a + dims, b + dims, 4) != 0) return false;
    if (a[dims] == -std::numeric_limits<float>::infinity()) continue;
    if (std::memcmp(a, b, p.c.head_dim * 4) != 0 || std::memcmp(a + dims, b + dims, 8) != 0) return false;
  }
  return true;
}

void check_invariance(const KernelTable& table) {
  for (const Case& c : kMany) {
    const Problem p(table, c);
    for (const size_t key_begin : {size_t{0}, kKvSegment}) {
      const size_t key_end = key_begin == 0 ? 1000 : 2 * kKvSegment;
      const std::vector<float> all = p.run(table, 0, c.n_tokens, key_begin, key_end);
      for (const size_t n : {size_t{1}, size_t{2}, size_t{7}, c.n_tokens / 2})
        for (size_t t = 0; t < c.n_tokens; t += n) {
          const size_t end = std::min(t + n, c.n_tokens);
          CAPTURE(c.head_dim);
          CAPTURE(n);
          CAPTURE(t);
          const std::vector<float> part = p.run(table, t, end, key_begin, key_end);
          CHECK(same_rows(p, part.data(), all.data() + t * c.group * p.row_floats(), (end - t) * c.group));
        }
    }
  }
}
TEST_CASE("attention bits do not depend on what shares the call: scalar") { with_isa("scalar", check_invariance); }
TEST_CASE("attention bits do not depend on what shares the call: avx2") { with_isa("avx2", check_invariance); }
TEST_CASE("attention bits do not depend on what shares the call: avx512") { with_isa("avx512", check_invariance); }

// Scores far apart: weights vanish without harm; a key that is not finite harms the rows that see it.
void check_extremes(const KernelTable& table) {
  const Case c{.n_keys = 300, .head_dim = 32, .group = 4, .n_tokens = 4};
  Problem p(table, c);
  for (float& x : p.queries) x *= 1e3f;
  const std::vector<float> out = p.run(table, 0, 4);
  for (size_t r = 0; r < 16; ++r) {
    const float* row = out.data() + r * p.row_floats();
    CHECK(row[33] >= 1.0f);
    for (size_t i = 0; i < 32; ++i) CHECK(std::abs(row[i] / row[33]) <= 2.0f);
  }
  const std::vector<float> nan(Problem::kHeads * 32, NAN);
  p.cache.store(table, 0, 298, nan.data(), nan.data());  // seen by the last two tokens only
  const std::vector<float> harmed = p.run(table, 0, 4);
  CHECK(same_rows(p, harmed.data(), out.data(), 8));
  for (size_t r = 8; r < 16; ++r) CHECK(std::isnan(harmed[r * p.row_floats()] / harmed[r * p.row_floats() + 33]));
}
TEST_CASE("attention of extreme scores: scalar") { with_isa("scalar", check_extremes); }
TEST_CASE("attention of extreme scores: avx2") { with_isa("avx2", check_extremes); }
TEST_CASE("attention of extreme scores: avx512") { with_isa("avx512", check_extremes); }

#if defined(__aarch64__)
TEST_CASE("attention of one token equals doubles: neon") { with_isa("neon", check_against_doubles); }
TEST_CASE("attention of many tokens equals doubles: neon") { with_isa("neon", check_many); }
TEST_CASE("attention bits do not depend on what shares the call: neon") { with_isa("neon", check_invariance); }
TEST_CASE("attention of extreme scores: neon") { with_isa("neon", check_extremes); }
#endif

}  // namespace
}  // namespace duet::test
