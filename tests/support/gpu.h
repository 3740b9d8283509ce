// The emulated GPU (runtime/cuda/emulation.h), opened as the program opens a real one, and buffers on it. With
// DUET_TEST_GPU_MODULE=<path of libduet_cuda.so> the tests of operations run on the real one.
#pragma once

#include <dlfcn.h>

#include <doctest/doctest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "runtime/gpu/device.h"

namespace duet::test {

inline gpu::OpenFn gpu_entry(const char* module) {
  void* handle = dlopen(module, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) FAIL(dlerror());
  return reinterpret_cast<gpu::OpenFn>(dlsym(handle, gpu::kOpenName));
}

inline std::unique_ptr<gpu::Device> open_gpu(const char* module) {
  char message[256] = "";
  std::unique_ptr<gpu::Device> device(gpu_entry(module)(gpu::kModuleVersion, 0, message, sizeof message));
  INFO(message);
  REQUIRE(device != nullptr);
  return device;
}

inline std::unique_ptr<gpu::Device> emulated_gpu() { return open_gpu(DUET_GPU_EMULATED); }

inline std::unique_ptr<gpu::Device> test_gpu() {
  const char* module = std::getenv("DUET_TEST_GPU_MODULE");
  return open_gpu(module != nullptr ? module : DUET_GPU_EMULATED);
}

// n elements on a device; fresh ones are NaN.
template <class T>
class GpuArray {
 public:
  GpuArray(gpu::Device& device, size_t n) : device_(device), n_(n), data_(static_cast<T*>(device.allocate(n * sizeof(T)))) {
    REQUIRE(data_ != nullptr);
  }
  GpuArray(gpu::Device& device, const std::vector<T>& values) : GpuArray(device, values.size()) {
    device.upload(data_, values.data(), n_ * sizeof(T));
  }
  ~GpuArray() { device_.release(data_); }
  GpuArray(const GpuArray&) = delete;
  GpuArray& operator=(const GpuArray&) = delete;

  T* data() const { return data_; }
  size_t size() const { return n_; }
  std::vector<T> values() const {
    std::vector<T> out(n_);
    device_.download(out.data(), data_, n_ * sizeof(T));
    return out;
  }

 private:
  gpu::Device& device_;
  size_t n_;
  T* data_;
};

inline void check_no_error(gpu::Device& device) {
  const char* error = device.synchronize();
  CHECK_MESSAGE(error == nullptr, std::string(error != nullptr ? error : ""));
}

}  // namespace duet::test
