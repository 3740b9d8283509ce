// The device of this module: operations queued on its stream, errors kept until somebody asks.
#include <cstdio>
#include <memory>
#include <new>
#include <string>

#include "runtime/cuda/runtime_api.h"
#include "runtime/gpu/device.h"

namespace duet::gpu {
namespace {

constexpr int kSlots = 2;
constexpr size_t kWholeLoads = 16;  // kernels read whole words, also the one that holds the last byte

MultiplyFn multiply_of(DType dtype) {
  for (const auto find : {float_product, block32_product, super_block_product, codebook_product})
    if (const MultiplyFn multiply = find(dtype); multiply != nullptr) return multiply;
  return nullptr;
}

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, const DeviceInfo& info) : index_(index), info_(info), stream_(api::make_stream()), beside_(api::make_stream()) {
    for (int i = 0; i < kSlots; ++i) {
      filled_[i] = api::make_event();
      released_[i] = api::make_event();
    }
  }
  ~CudaDevice() override {
    enter();
    wait_for_all();
    for (int i = 0; i < kSlots; ++i) {
      api::drop_event(filled_[i]);
      api::drop_event(released_[i]);
    }
    api::drop_stream(stream_);
    api::drop_stream(beside_);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const DeviceInfo& info() const override { return info_; }
  bool supports(DType dtype) const override { return multiply_of(dtype) != nullptr; }
  bool supports(const HeadShape& shape) const override { return supports_heads(shape); }
  uint64_t free_bytes() override {
    enter();
    return api::free_bytes();
  }

  void* allocate(size_t n_bytes) override {
    enter();
    if (n_bytes > SIZE_MAX - kWholeLoads) return nullptr;
    return api::allocate((n_bytes + kWholeLoads - 1) / kWholeLoads * kWholeLoads);
  }
  void release(void* p) override {
    enter();
    if (p != nullptr) api::release(p);
  }
  void* allocate_host(size_t n_bytes) override {
    enter();
    return api::allocate_host(n_bytes);
  }
  // Copies from it may be on their way, when an error ended what queued them.
  void release_host(void* p) override {
    if (p == nullptr) return;
    enter();
    wait_for_all();
    api::release_host(p);
  }

  void upload(void* dst, const void* src, size_t n_bytes) override { copy(dst, src, n_bytes); }
  void download(void* dst, const void* src, size_t n_bytes) override {
    copy(dst, src, n_bytes);
    api::synchronize(stream_);
  }
  void copy(void* dst, const void* src, size_t n_bytes) override {
    enter();
    api::copy(dst, src, n_bytes, stream_);
  }
  void upload_beside(int slot, void* dst, const void* src, size_t n_bytes) override {
    enter();
    api::wait(beside_, released_[slot]);
    api::copy(dst, src, n_bytes, beside_);
    api::record(filled_[slot], beside_);
  }
  void await_slot(int slot) override {
    enter();
    api::wait(stream_, filled_[slot]);
  }
  void release_slot(int slot) override {
    enter();
    api::record(released_[slot], stream_);
  }
  bool slot_read(int slot) override {
    enter();
    api::synchronize(filled_[slot]);
    remember();
    return error_.empty();
  }
  const char* synchronize() override {
    enter();
    wait_for_all();
    remember();
    told_.swap(error_);
    error_.clear();
    return told_.empty() ? nullptr : told_.c_str();
  }

  void normalize(const float* x, const float* w, float eps, size_t n, size_t cols, float* y, ActRows acts) override {
    enter();
    gpu::normalize(x, w, eps, n, cols, y, acts, stream_);
  }
  void quantize(const float* x, size_t n, size_t cols, ActRows acts) override {
    enter();
    gpu::quantize(x, n, cols, acts, stream_);
  }
  void silu_mul(const float* gate, const float* up, size_t n, size_t cols, float* h, ActRows acts) override {
    enter();
    gpu::silu_mul(gate, up, n, cols, h, acts, stream_);
  }
  void multiply(const Product& product) override {
    enter();
    if (const MultiplyFn queue = multiply_of(product.w.dtype)) return queue(product, stream_);
    fail("weights of type " + std::to_string(static_cast<uint32_t>(product.w.dtype)) + " cannot be multiplied on the GPU");
  }
  void rotate_and_store(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, const float* cos_sin, float* q, float* k,
                        const float* v) override {
    enter();
    if (can_attend(shape)) gpu::rotate_and_store(shape, runs, n_runs, n, cos_sin, q, k, v, stream_);
  }
  void attend(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, size_t max_keys, float scale, const float* q,
              void* scratch, float* out) override {
    enter();
    if (can_attend(shape)) gpu::attend(shape, runs, n_runs, n, max_keys, scale, q, scratch, out, stream_);
  }
  size_t attention_scratch_bytes(const HeadShape& shape, size_t n, size_t max_keys) const override {
    return gpu::attention_scratch_bytes(shape, n, max_keys);
  }
  void choose_experts(const float* logits, size_t n, size_t n_expert, size_t n_used, int32_t* chosen, float* weights) override {
    enter();
    gpu::choose_experts(logits, n, n_expert, n_used, chosen, weights, stream_);
  }
  void group(const int32_t* chosen, size_t n, size_t n_expert, size_t n_used, int32_t* slot_of, int32_t* token_of, int32_t* first) override {
    enter();
    gpu::group(chosen, n, n_expert, n_used, slot_of, token_of, first, stream_);
  }
  void combine(const float* y, const int32_t* slot_of, const float* weights, size_t n, size_t n_used, size_t cols, float* residual) override {
    enter();
    gpu::combine(y, slot_of, weights, n, n_used, cols, residual, stream_);
  }

 private:
  void enter() const { api::use(index_); }
  void wait_for_all() const {
    api::synchronize(stream_);
    api::synchronize(beside_);
  }
  void remember() {
    if (const char* error = api::take_error(); error != nullptr && error_.empty()) error_ = error;
  }
  void fail(const std::string& what) {
    if (error_.empty()) error_ = what;
  }
  bool can_attend(const HeadShape& shape) {
    if (supports_heads(shape)) return true;
    fail("attention heads of " + std::to_string(shape.head_dim) + " elements cannot be computed on the GPU");
    return false;
  }

  const int index_;
  const DeviceInfo info_;
  Stream *stream_, *beside_;
  api::Event *filled_[kSlots], *released_[kSlots];
  std::string error_, told_;
};

}  // namespace
}  // namespace duet::gpu

extern "C" [[gnu::visibility("default")]] duet::gpu::Device* duet_gpu_open(uint32_t version, int index, char* message, size_t n_message);

extern "C" duet::gpu::Device* duet_gpu_open(uint32_t version, int index, char* message, size_t n_message) {
  using namespace duet::gpu;
  if (version != kModuleVersion) {
    std::snprintf(message, n_message, "the GPU module is of version %u, the program needs %u: reinstall them together", kModuleVersion, version);
    return nullptr;
  }
  DeviceInfo info{};
  if (const char* error = api::open(index, info); error != nullptr) {
    if (error == kNoDriver || error == kNoDevice) std::snprintf(message, n_message, "%s", error);
    else std::snprintf(message, n_message, "GPU %d: %s", index, error);
    return nullptr;
  }
  auto* device = new (std::nothrow) CudaDevice(index, info);
  const char* error = device == nullptr ? "no memory" : device->synchronize();
  if (error == nullptr) return device;
  std::snprintf(message, n_message, "GPU %d: %s", index, error);
  delete device;
  return nullptr;
}
