#include <cstdio>

#include <cuda_runtime_api.h>

#include "runtime/cuda/runtime_api.h"

namespace duet::gpu::api {
namespace {

cudaEvent_t cuda(Event* event) { return reinterpret_cast<cudaEvent_t>(event); }

// 0 where the driver does not tell; which is no error of the device.
int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, index) == cudaSuccess) return value;
  cudaGetLastError();
  return 0;
}

}  // namespace

const char* open(int index, DeviceInfo& info) {
  cudaGetLastError();  // of whoever used CUDA before in this thread
  int n = 0, driver = 0;
  // Without any driver the count fails as with one that is too old.
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return kNoDriver;
  const cudaError_t counted = cudaGetDeviceCount(&n);
  if (counted == cudaErrorNoDevice || (counted == cudaSuccess && n == 0)) return kNoDevice;
  if (counted != cudaSuccess) return cudaGetErrorString(counted);
  if (index < 0 || index >= n) return "there is no device of that index";
  if (const cudaError_t error = cudaSetDevice(index); error != cudaSuccess) return cudaGetErrorString(error);
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess) return cudaGetErrorString(error);
  if (properties.major * 10 + properties.minor < 75) return "the device is older than compute capability 7.5";
  std::snprintf(info.name, sizeof info.name, "%.127s", properties.name);
  info.major = properties.major;
  info.minor = properties.minor;
  info.n_processors = properties.multiProcessorCount;
  info.total_bytes = properties.totalGlobalMem;
  // Two transfers in each cycle; kHz, bits.
  info.memory_bytes_per_s = 2e3 * attribute(cudaDevAttrMemoryClockRate, index) * attribute(cudaDevAttrGlobalMemoryBusWidth, index) / 8;
  return nullptr;
}

void use(int index) { cudaSetDevice(index); }

uint64_t free_bytes() {
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

// A refused allocation is no error of the device; any other stays for take_error().
void* allocate(size_t n_bytes) {
  void* p = nullptr;
  const cudaError_t error = cudaMalloc(&p, n_bytes);
  if (error == cudaErrorMemoryAllocation) cudaGetLastError();
  return error == cudaSuccess ? p : nullptr;
}
void release(void* p) { cudaFree(p); }
void* allocate_host(size_t n_bytes) {
  void* p = nullptr;
  if (cudaMallocHost(&p, n_bytes) == cudaSuccess) return p;
  cudaGetLastError();
  return nullptr;
}
void release_host(void* p) { cudaFreeHost(p); }

Stream* make_stream() {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}
void drop_stream(Stream* stream) { cudaStreamDestroy(stream); }
Event* make_event() {
  cudaEvent_t event = nullptr;
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  return reinterpret_cast<Event*>(event);
}
void drop_event(Event* event) { cudaEventDestroy(cuda(event)); }

void copy(void* dst, const void* src, size_t n_bytes, Stream* stream) { cudaMemcpyAsync(dst, src, n_bytes, cudaMemcpyDefault, stream); }
void record(Event* event, Stream* stream) { cudaEventRecord(cuda(event), stream); }
void wait(Stream* stream, Event* event) { cudaStreamWaitEvent(stream, cuda(event), 0); }
void synchronize(Event* event) { cudaEventSynchronize(cuda(event)); }
void synchronize(Stream* stream) { cudaStreamSynchronize(stream); }

const char* take_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace duet::gpu::api
