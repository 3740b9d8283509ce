// The other operations on the emulated GPU against the scalar kernels, and what the device says of errors.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "runtime/kernels/kernels.h"
#include "tests/support/close.h"
#include "tests/support/gpu.h"
#include "tests/support/skip.h"

namespace duet::test {
namespace {

const KernelTable& scalar() { return select_kernels("scalar"); }

std::vector<float> random_floats(size_t n, Rng& rng, float magnitude = 2.0f) {
  std::vector<float> out(n);
  for (float& x : out) x = magnitude * rng.symmetric();
  return out;
}

// n rows of cols in both quantized forms.
struct Acts {
  GpuArray<std::byte> act32, act256;
  size_t n, cols;
  Acts(gpu::Device& device, size_t rows, size_t columns)
      : act32(device, rows * act_row_bytes(ActFormat::act32, columns)), act256(device, rows * act_row_bytes(ActFormat::act256, columns)), n(rows), cols(columns) {}
  gpu::ActRows rows() const { return {act32.data(), act256.data()}; }

  // As the scalar kernels quantize these rows.
  void check(const std::vector<float>& rows) const {
    std::vector<std::byte> want32(act32.size()), want256(act256.size());
    for (size_t r = 0; r < n; ++r) {
      scalar().quantize_act32(rows.data() + r * cols, want32.data() + r * act_row_bytes(ActFormat::act32, cols), cols);
      scalar().quantize_act256(rows.data() + r * cols, want256.data() + r * act_row_bytes(ActFormat::act256, cols), cols);
    }
    CHECK(act32.values() == want32);
    CHECK(act256.values() == want256);
  }
};

TEST_CASE("gpu quantized rows have the bits of the scalar kernels") {
  const auto device = test_gpu();
  Rng rng(1);
  for (const size_t cols : {256u, 1024u, 3072u}) {
    std::vector<float> x = random_floats(5 * cols, rng);
    x[cols + 7] = INFINITY;
    x[2 * cols + 255] = NAN;
    for (size_t i = 3 * cols; i < 3 * cols + 256; ++i) x[i] = 0x1p-101f;  // below kActFloor
    for (size_t i = 4 * cols; i < 4 * cols + 32; ++i) x[i] = static_cast<float>(static_cast<int>(i % 9) - 4) * 0.5f;  // ties
    const GpuArray<float> rows(*device, x);
    const Acts acts(*device, 5, cols);
    device->quantize(rows.data(), 5, cols, acts.rows());
    acts.check(x);
  }
  check_no_error(*device);
}

TEST_CASE("gpu rows of blocks of 32 need not fill a super-block") {
  const auto device = test_gpu();
  Rng rng(2);
  const size_t cols = 288;
  const std::vector<float> x = random_floats(2 * cols, rng);
  const GpuArray<float> rows(*device, x);
  const GpuArray<std::byte> act32(*device, 2 * act_row_bytes(ActFormat::act32, cols));
  device->quantize(rows.data(), 2, cols, {act32.data(), nullptr});
  std::vector<std::byte> want(act32.size());
  for (size_t r = 0; r < 2; ++r) scalar().quantize_act32(x.data() + r * cols, want.data() + r * act_row_bytes(ActFormat::act32, cols), cols);
  CHECK(act32.values() == want);
  check_no_error(*device);
}

bool near(const std::vector<float>& got, const std::vector<float>& want, float bound) {
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::abs(got[i] - want[i]) <= bound * std::max(1.0f, std::abs(want[i])))) return false;
  return got.size() == want.size();
}

TEST_CASE("gpu norms, with quantized forms of what they wrote") {
  const auto device = test_gpu();
  Rng rng(3);
  for (const size_t cols : {256u, 2048u}) {
    const std::vector<float> x = random_floats(3 * cols, rng), w = random_floats(cols, rng);
    const GpuArray<float> in(*device, x), weight(*device, w), y(*device, 3 * cols);
    const Acts acts(*device, 3, cols), alone(*device, 3, cols);
    device->normalize(in.data(), weight.data(), 1e-5f, 3, cols, y.data(), acts.rows());
    device->normalize(in.data(), weight.data(), 1e-5f, 3, cols, nullptr, alone.rows());
    std::vector<float> want(3 * cols);
    for (size_t r = 0; r < 3; ++r) scalar().rms_norm(x.data() + r * cols, w.data(), 1e-5f, want.data() + r * cols, cols);
    CHECK(near(y.values(), want, 2e-6f));
    acts.check(y.values());
    alone.check(y.values());
  }
  check_no_error(*device);
}

TEST_CASE("gpu silu, also in place and not stored") {
  const auto device = test_gpu();
  Rng rng(4);
  const size_t cols = 512, n = 3 * cols;
  const std::vector<float> g = random_floats(n, rng, 20.0f), u = random_floats(n, rng);
  std::vector<float> want(n);
  scalar().silu_mul(g.data(), u.data(), want.data(), n);
  const GpuArray<float> gate(*device, g), up(*device, u);
  const Acts acts(*device, 3, cols);
  device->silu_mul(gate.data(), up.data(), 3, cols, nullptr, acts.rows());
  device->silu_mul(gate.data(), up.data(), 3, cols, gate.data(), {});
  CHECK(near(gate.values(), want, 2e-6f));
  acts.check(gate.values());
  check_no_error(*device);
}

struct Choice {
  std::vector<int32_t> chosen;
  std::vector<float> weights;
};
// The largest first, the lowest index among equals.
Choice choose(const std::vector<float>& logits, size_t n_expert, size_t n_used) {
  Choice out;
  for (size_t row = 0; row < logits.size() / n_expert; ++row) {
    std::vector<int32_t> order(n_expert);
    for (size_t e = 0; e < n_expert; ++e) order[e] = static_cast<int32_t>(e);
    const float* l = logits.data() + row * n_expert;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return l[a] > l[b]; });
    double sum = 0.0;
    for (size_t rank = 0; rank < n_used; ++rank) sum += std::exp(double{l[order[rank]]} - double{l[order[0]]});
    for (size_t rank = 0; rank < n_used; ++rank) {
      out.chosen.push_back(order[rank]);
      out.weights.push_back(static_cast<float>(std::exp(double{l[order[rank]]} - double{l[order[0]]}) / sum));
    }
  }
  return out;
}

TEST_CASE("gpu routing: choice, order of slots, combination") {
  const auto device = test_gpu();
  Rng rng(5);
  for (const auto [n, n_expert, n_used] : {std::array<size_t, 3>{1, 8, 2}, {45, 8, 2}, {70, 60, 6}, {9, 3, 3}}) {
    std::vector<float> l(n * n_expert);
    for (float& x : l) x = static_cast<float>(rng.below(6));  // many ties
    const Choice want = choose(l, n_expert, n_used);
    const GpuArray<float> logits(*device, l), weights(*device, n * n_used);
    const GpuArray<int32_t> chosen(*device, n * n_used), slot_of(*device, n * n_used), token_of(*device, n * n_used), first(*device, n_expert + 1);
    device->choose_experts(logits.data(), n, n_expert, n_used, chosen.data(), weights.data());
    CHECK(chosen.values() == want.chosen);
    CHECK(near(weights.values(), want.weights, 1e-6f));
    device->group(chosen.data(), n, n_expert, n_used, slot_of.data(), token_of.data(), first.data());
    std::vector<int32_t> firsts(n_expert + 1, 0), slots(n * n_used), tokens(n * n_used);
    for (const int32_t e : want.chosen) ++firsts[static_cast<size_t>(e) + 1];
    for (size_t e = 0; e < n_expert; ++e) firsts[e + 1] += firsts[e];
    std::vector<int32_t> next = firsts;
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i] = next[static_cast<size_t>(want.chosen[i])]++;
      tokens[static_cast<size_t>(slots[i])] = static_cast<int32_t>(i / n_used);
    }
    CHECK(first.values() == firsts);
    CHECK(slot_of.values() == slots);
    CHECK(token_of.values() == tokens);

    const size_t cols = 300;
    const std::vector<float> rows = random_floats(n * n_used * cols, rng), before = random_floats(n * cols, rng);
    const GpuArray<float> y(*device, rows), residual(*device, before);
    device->combine(y.data(), slot_of.data(), weights.data(), n, n_used, cols, residual.data());
    std::vector<float> sums = before;
    for (size_t i = 0; i < slots.size(); ++i)
      scalar().add_scaled(sums.data() + i / n_used * cols, rows.data() + static_cast<size_t>(slots[i]) * cols, want.weights[i], cols);
    CHECK(near(residual.values(), sums, 2e-6f));
  }
  check_no_error(*device);
}

TEST_CASE("gpu memory: what does not fit is refused, what is fresh is NaN, what was copied is there") {
  ::setenv("DUET_EMULATED_GPU_BYTES", "1000000", 1);
  const auto device = emulated_gpu();
  CHECK(device->info().total_bytes == 1000000);
  CHECK(device->allocate(1000001) == nullptr);
  CHECK(device->allocate(SIZE_MAX) == nullptr);
  void* p = device->allocate(600000);
  CHECK(p != nullptr);
  CHECK(reinterpret_cast<uintptr_t>(p) % 256 == 0);
  CHECK(device->allocate(600000) == nullptr);
  CHECK(device->free_bytes() < 400001);
  float fresh = 0.0f;
  device->download(&fresh, p, sizeof fresh);
  CHECK(std::isnan(fresh));
  device->release(p);
  device->release(nullptr);
  CHECK(device->free_bytes() == 1000000);
  ::unsetenv("DUET_EMULATED_GPU_BYTES");
  void* host = device->allocate_host(100);
  std::memset(host, 7, 100);
  const GpuArray<std::byte> first(*device, 100), second(*device, 100);
  device->release_slot(1);
  device->upload_beside(1, first.data(), host, 100);
  device->await_slot(1);
  device->copy(second.data(), first.data(), 100);
  CHECK(device->slot_read(1));
  CHECK(second.values() == std::vector<std::byte>(100, std::byte{7}));
  device->release_host(host);
  check_no_error(*device);
}

TEST_CASE("gpu errors are remembered until they are asked for") {
  const auto device = emulated_gpu();
  const GpuArray<std::byte> bytes(*device, 90);
  const auto host = std::vector<std::byte>(97);
  device->upload(bytes.data(), host.data(), 97);  // 96 are allocated
  const char* error = device->synchronize();
  REQUIRE(error != nullptr);
  CHECK(std::string(error).find("past an allocation") != std::string::npos);
  const std::byte canary{0xa5};
  device->upload(bytes.data() + 96, &canary, 1);
  check_no_error(*device);
  const gpu::HeadShape shape{3, 1, 1024, 64, 0, DType::F32};
  CHECK_FALSE(device->supports(shape));
  device->attend(shape, nullptr, 0, 1, 1, 1.0f, nullptr, nullptr, nullptr);
  error = device->synchronize();
  REQUIRE(error != nullptr);
  CHECK(std::string(error).find("1024") != std::string::npos);
  check_no_error(*device);
}

TEST_CASE("gpu module: other versions and devices that are not there are refused") {
  char message[200] = "";
  CHECK(gpu_entry(DUET_GPU_EMULATED)(gpu::kModuleVersion + 1, 0, message, sizeof message) == nullptr);
  CHECK(std::string(message).find("reinstall them together") != std::string::npos);
  CHECK(gpu_entry(DUET_GPU_EMULATED)(gpu::kModuleVersion, 3, message, sizeof message) == nullptr);
  CHECK(std::string(message).find("GPU 3: ") != std::string::npos);
}

// Needs no driver to be loaded, and says what is missing.
TEST_CASE("the CUDA module loads on any machine") {
#ifdef DUET_GPU_MODULE
  if (!std::filesystem::exists(DUET_GPU_MODULE)) DUET_SKIP("the module was not built");
  char message[200] = "";
  CHECK(gpu_entry(DUET_GPU_MODULE)(gpu::kModuleVersion + 1, 0, message, sizeof message) == nullptr);
  CHECK(std::string(message).find("reinstall them together") != std::string::npos);
  const std::unique_ptr<gpu::Device> device(gpu_entry(DUET_GPU_MODULE)(gpu::kModuleVersion, 0, message, sizeof message));
  INFO(message);
  const std::string reason = message;
  CHECK((device != nullptr || reason == gpu::kNoDriver || reason == gpu::kNoDevice || reason.starts_with("GPU 0: ")));
#else
  DUET_SKIP("built without nvcc");
#endif
}

}  // namespace
}  // namespace duet::test
