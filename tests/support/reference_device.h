// A card in plain loops over the scalar kernels, which does everything at once. Its memory can be as small, and fail as
// early, as a test wants.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/gpu/device.h"
#include "runtime/gpu/module.h"
#include "runtime/kernels/kernels.h"

namespace duet::test {

class ReferenceDevice : public gpu::Device {
 public:
  explicit ReferenceDevice(uint64_t total_bytes = uint64_t{1} << 30);
  ~ReferenceDevice() override;

  // From now on allocations fail of which fewer than `bytes` would be left, though free_bytes() says otherwise.
  void set_hidden_use(uint64_t n_bytes) { hidden_bytes_ = n_bytes; }
  // So many times from now on the host's memory cannot be pinned.
  void refuse_pinned(int n) { n_refused_ = n; }
  // After so many operations more, everything fails with this message.
  void fail_after(uint64_t n_operations, std::string message);
  uint64_t used_bytes() const { return used_bytes_; }
  uint64_t uploaded_bytes() const { return uploaded_bytes_; }

  const gpu::DeviceInfo& info() const override { return info_; }
  bool supports(DType) const override { return true; }
  bool supports(const gpu::HeadShape&) const override { return true; }
  uint64_t free_bytes() override { return info_.total_bytes - used_bytes_; }
  void* allocate(size_t n_bytes) override;
  void release(void* p) override;
  void* allocate_host(size_t n_bytes) override;
  void release_host(void* p) override;
  void upload(void* dst, const void* src, size_t n_bytes) override;
  void download(void* dst, const void* src, size_t n_bytes) override;
  void copy(void* dst, const void* src, size_t n_bytes) override;
  void upload_beside(int slot, void* dst, const void* src, size_t n_bytes) override;
  void await_slot(int) override {}
  void release_slot(int) override {}
  bool slot_read(int) override { return failure_.empty(); }
  const char* synchronize() override;

  void normalize(const float* x, const float* w, float eps, size_t n, size_t cols, float* y, gpu::ActRows acts) override;
  void quantize(const float* x, size_t n, size_t cols, gpu::ActRows acts) override;
  void silu_mul(const float* gate, const float* up, size_t n, size_t cols, float* h, gpu::ActRows acts) override;
  void multiply(const gpu::Product& product) override;
  void rotate_and_store(const gpu::HeadShape& shape, const gpu::KvRun* runs, size_t n_runs, size_t n, const float* cos_sin, float* q, float* k,
                        const float* v) override;
  void attend(const gpu::HeadShape& shape, const gpu::KvRun* runs, size_t n_runs, size_t n, size_t max_keys, float scale, const float* q, void* scratch,
              float* out) override;
  size_t attention_scratch_bytes(const gpu::HeadShape& shape, size_t n, size_t max_keys) const override;
  void choose_experts(const float* logits, size_t n, size_t n_expert, size_t n_used, int32_t* chosen, float* weights) override;
  void group(const int32_t* chosen, size_t n, size_t n_expert, size_t n_used, int32_t* slot_of, int32_t* token_of, int32_t* first) override;
  void combine(const float* y, const int32_t* slot_of, const float* weights, size_t n, size_t n_used, size_t cols, float* residual) override;

 private:
  bool works();
  void check_inside(const void* p, size_t n_bytes) const;

  const KernelTable* kernels_;
  gpu::DeviceInfo info_{};
  std::map<const std::byte*, size_t> blocks_;  // by address
  mutable std::mutex mutex_;
  std::atomic<uint64_t> used_bytes_{0};
  uint64_t hidden_bytes_ = 0, uploaded_bytes_ = 0;
  int n_refused_ = 0;
  uint64_t operations_left_ = std::numeric_limits<uint64_t>::max();
  std::string message_, failure_;
};

// The card of the module that the variable DUET_GPU_MODULE names (a real one, or kernels compiled for the CPU), else the above.
class AnyCard {
 public:
  AnyCard();
  gpu::Device* get() { return found_.device != nullptr ? found_.device.get() : &reference_; }
  const ReferenceDevice* reference() const { return found_.device != nullptr ? nullptr : &reference_; }

 private:
  gpu::FoundDevice found_;
  ReferenceDevice reference_;
};

}  // namespace duet::test
