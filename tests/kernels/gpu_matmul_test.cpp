// Products on the emulated GPU have the bits of the scalar kernels; with float weights they are within bounds.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/kernels/kernels.h"
#include "tests/support/blocks.h"
#include "tests/support/gpu.h"

namespace duet::test {
namespace {

const KernelTable& scalar() { return select_kernels("scalar"); }

struct Sizes {
  size_t n_matrices, rows, cols, n_tokens;
};

// Matrices, rows of activations and what the scalar kernels make of them.
struct Problem {
  const Format& format;
  Sizes sizes;
  size_t w_bytes, x_bytes;
  std::vector<std::vector<std::byte>> w;
  std::vector<std::byte> x;  // [n_tokens]

  Problem(const Format& f, const Sizes& s, Rng& rng) : format(f), sizes(s), w_bytes(row_bytes(f, s.cols)), x_bytes(act_row_bytes(f.act, s.cols)) {
    w.resize(s.n_matrices, std::vector<std::byte>(s.rows * w_bytes));
    for (auto& matrix : w)
      for (size_t r = 0; r < s.rows; ++r) fill_random_weights(f, matrix.data() + r * w_bytes, s.cols, rng);
    x.resize(s.n_tokens * x_bytes);
    std::vector<float> values(s.cols);
    for (size_t t = 0; t < s.n_tokens; ++t) {
      for (float& v : values) v = rng.symmetric();
      set_token(t, values);
    }
  }

  void set_token(size_t t, const std::vector<float>& values) {
    std::byte* dst = x.data() + t * x_bytes;
    if (format.act == ActFormat::f32) std::memcpy(dst, values.data(), x_bytes);
    if (format.act == ActFormat::act32) scalar().quantize_act32(values.data(), dst, values.size());
    if (format.act == ActFormat::act256) scalar().quantize_act256(values.data(), dst, values.size());
  }

  // Row `token` times matrix `e`.
  std::vector<float> product(size_t e, size_t token) const {
    std::vector<float> y(sizes.rows);
    scalar().matmul[static_cast<size_t>(format.dtype)]({.w = w[e].data(), .w_stride = w_bytes, .n_rows = sizes.rows, .cols = sizes.cols,
                                                        .x = x.data() + token * x_bytes, .x_stride = x_bytes, .n_tokens = 1,
                                                        .y = y.data(), .y_stride = sizes.rows});
    return y;
  }
};

// Slots of matrices, sorted by them: slot i of matrix e reads row token[i].
struct Slots {
  std::vector<int32_t> first, token;
  size_t size() const { return token.size(); }
  size_t matrix(size_t slot) const {
    return static_cast<size_t>(std::upper_bound(first.begin(), first.end(), static_cast<int32_t>(slot)) - first.begin()) - 1;
  }
};

// On the device: its matrices, and products of slots.
class OnGpu {
 public:
  OnGpu(gpu::Device& device, const Problem& p) : device_(device), p_(p), x_(device, p.x) {
    std::vector<const std::byte*> pointers;
    for (const auto& matrix : p.w) {
      w_.push_back(std::make_unique<GpuArray<std::byte>>(device, matrix));
      pointers.push_back(w_.back()->data());
    }
    pointers_ = std::make_unique<GpuArray<const std::byte*>>(device, pointers);
  }
  gpu::Matrices matrices() const {
    return {p_.format.dtype, pointers_->data(), p_.w.size(), p_.sizes.rows, p_.sizes.cols, p_.w_bytes};
  }
  // y[slot][rows + 3]: what lies behind the rows must stay as it was.
  std::vector<float> multiply(const Slots* slots, size_t n, const std::vector<float>& before, bool add) {
    const GpuArray<float> y(device_, before);
    gpu::Product product{matrices(), {}, x_.data(), n, y.data(), p_.sizes.rows + 3, add};
    if (slots == nullptr) {
      device_.multiply(product);
      return y.values();
    }
    const GpuArray<int32_t> first(device_, slots->first), token(device_, slots->token);
    product.grouping = {first.data(), token.data()};
    device_.multiply(product);
    return y.values();
  }

 private:
  gpu::Device& device_;
  const Problem& p_;
  GpuArray<std::byte> x_;
  std::vector<std::unique_ptr<GpuArray<std::byte>>> w_;
  std::unique_ptr<GpuArray<const std::byte*>> pointers_;
};

bool near(float got, float want, const Problem& p) {
  if (p.format.act != ActFormat::f32) return std::memcmp(&got, &want, sizeof got) == 0;
  return std::abs(double{got} - double{want}) <= sum_bound(static_cast<double>(p.sizes.cols));
}

void check_products(gpu::Device& device, const Problem& p, const Slots* slots, bool add) {
  const size_t n = slots != nullptr ? slots->size() : p.sizes.n_tokens, stride = p.sizes.rows + 3;
  const std::vector<float> before(n * stride, 0.75f);
  OnGpu on_gpu(device, p);
  const std::vector<float> got = on_gpu.multiply(slots, n, before, add);
  check_no_error(device);
  size_t n_wrong = 0;
  for (size_t slot = 0; slot < n; ++slot) {
    const size_t token = slots != nullptr ? static_cast<size_t>(slots->token[slot]) : slot;
    const std::vector<float> want = p.product(slots != nullptr ? slots->matrix(slot) : 0, token);
    for (size_t r = 0; r < stride; ++r) {
      const float value = got[slot * stride + r];
      if (r < p.sizes.rows ? !near(value, add ? 0.75f + want[r] : want[r], p) : value != 0.75f) ++n_wrong;
    }
  }
  INFO(p.format.name, " rows ", p.sizes.rows, " cols ", p.sizes.cols, " slots ", n);
  CHECK(n_wrong == 0);
}

size_t unit_cols(const Format& f, size_t n) { return f.block_elems == 1 ? 37 * n : f.block_elems * n; }

TEST_CASE("gpu products with one matrix: few rows and many") {
  const auto device = test_gpu();
  Rng rng(1);
  for (const Format& format : all_formats()) {
    CHECK(device->supports(format.dtype));
    for (const size_t n : {1u, 2u, 7u, 33u, 70u}) {
      const Problem p(format, {1, n > 8 ? 67u : 19u, unit_cols(format, n % 2 == 0 ? 2 : 3), n}, rng);
      check_products(*device, p, nullptr, n == 2 || n == 33);
    }
  }
}

// n slots over matrices, some of which get none.
Slots random_slots(size_t n, size_t n_matrices, size_t n_tokens, Rng& rng) {
  Slots slots;
  std::vector<size_t> count(n_matrices, 0);
  for (size_t i = 0; i < n; ++i) ++count[rng.below(n_matrices) / 2 * 2];
  slots.first.push_back(0);
  for (const size_t c : count) slots.first.push_back(slots.first.back() + static_cast<int32_t>(c));
  for (size_t i = 0; i < n; ++i) slots.token.push_back(static_cast<int32_t>(rng.below(n_tokens)));
  return slots;
}

TEST_CASE("gpu products of experts: also none, one, and more than a tile") {
  const auto device = test_gpu();
  Rng rng(2);
  for (const Format& format : all_formats()) {
    for (const size_t n : {2u, 20u, 130u}) {
      const Problem p(format, {5, 21, unit_cols(format, 2), 9}, rng);
      const Slots slots = random_slots(n, 5, 9, rng);
      check_products(*device, p, &slots, false);
    }
  }
}

TEST_CASE("gpu products of long rows") {
  const auto device = test_gpu();
  Rng rng(3);
  for (const DType dtype : {DType::Q4_1, DType::Q8_0, DType::Q4_K, DType::Q6_K, DType::F16}) {
    for (const size_t n : {3u, 12u}) {
      const Problem p(format_of(dtype), {1, 5, 4096 + 256 * 3, n}, rng);
      check_products(*device, p, nullptr, false);
    }
  }
}

TEST_CASE("gpu products pass NaN on, and to their own row only") {
  const auto device = test_gpu();
  Rng rng(4);
  for (const DType dtype : {DType::Q4_0, DType::Q4_K, DType::F32}) {
    for (const size_t n : {4u, 40u}) {
      Problem p(format_of(dtype), {1, 6, 512, n}, rng);
      std::vector<float> values(p.sizes.cols, 0.5f);
      values[300] = NAN;
      p.set_token(1, values);
      OnGpu on_gpu(*device, p);
      const std::vector<float> got = on_gpu.multiply(nullptr, n, std::vector<float>(n * 9), false);
      bool right = true;
      for (size_t i = 0; i < got.size(); ++i) right = right && std::isnan(got[i]) == (i / 9 == 1 && i % 9 < 6);
      CHECK(right);
    }
  }
}

// The bits of a slot are the same in every company.
TEST_CASE("gpu products with float weights do not depend on neighbours") {
  const auto device = test_gpu();
  Rng rng(5);
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    Problem p(format_of(dtype), {1, 7, 131, 21}, rng);
    OnGpu on_gpu(*device, p);
    const std::vector<float> all = on_gpu.multiply(nullptr, 21, std::vector<float>(21 * 10), false);
    for (size_t n = 1; n < 21; n += 5) {
      const std::vector<float> part = on_gpu.multiply(nullptr, n, std::vector<float>(n * 10), false);
      CHECK(std::memcmp(part.data(), all.data(), part.size() * sizeof(float)) == 0);
    }
  }
}

}  // namespace
}  // namespace duet::test
