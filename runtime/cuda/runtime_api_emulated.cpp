// Device memory of the emulation: each allocation ends at an inaccessible page, fresh bytes are NaN in every type, and
// the slack that alignment leaves is watched. DUET_EMULATED_GPU_BYTES is how much there is (default 4 GiB; 0: no device).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include <sys/mman.h>

#include "runtime/cuda/emulation.h"
#include "runtime/cuda/runtime_api.h"

namespace duet::gpu::api {
namespace {

constexpr size_t kPage = 64 << 10, kAlignment = 256;
constexpr uint64_t kDefaultBytes = uint64_t{4} << 30;
constexpr int kFresh = 0xff, kCanary = 0xa5;

struct Allocation {
  std::byte* map;
  size_t map_bytes, n_bytes, padded_bytes;
  bool on_device;
};

struct Memory {
  std::mutex mutex;
  std::map<void*, Allocation> allocations;
  uint64_t used = 0;
  const char* error = nullptr;
};
Memory memory;

uint64_t total_bytes() {
  const char* text = std::getenv("DUET_EMULATED_GPU_BYTES");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : kDefaultBytes;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* make(size_t n_bytes, bool on_device) {
  const std::lock_guard lock(memory.mutex);
  const size_t padded = round_up(n_bytes == 0 ? 1 : n_bytes, kAlignment), body = round_up(padded, kPage), map_bytes = body + 2 * kPage;
  if (on_device && (padded > total_bytes() || memory.used > total_bytes() - padded)) return nullptr;
  void* map = mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  auto* bytes = static_cast<std::byte*>(map);
  mprotect(bytes, kPage, PROT_NONE);
  mprotect(bytes + kPage + body, kPage, PROT_NONE);
  std::byte* p = bytes + kPage + (body - padded);
  std::memset(p, kFresh, n_bytes);
  std::memset(p + n_bytes, kCanary, padded - n_bytes);
  memory.allocations[p] = {bytes, map_bytes, n_bytes, padded, on_device};
  if (on_device) memory.used += padded;
  return p;
}

void check_end(const void* p, const Allocation& a) {
  for (size_t i = a.n_bytes; i < a.padded_bytes; ++i)
    if (static_cast<const std::byte*>(p)[i] != std::byte{kCanary}) memory.error = "emulation: a write past an allocation";
}

void drop(void* p) {
  const std::lock_guard lock(memory.mutex);
  const auto it = memory.allocations.find(p);
  if (it == memory.allocations.end()) {
    memory.error = "emulation: memory released that was not allocated";
    return;
  }
  check_end(p, it->second);
  if (it->second.on_device) memory.used -= it->second.padded_bytes;
  munmap(it->second.map, it->second.map_bytes);
  memory.allocations.erase(it);
}

}  // namespace

const char* open(int index, DeviceInfo& info) {
  if (total_bytes() == 0) return kNoDevice;
  if (index != 0) return "there is no device of that index";
  std::snprintf(info.name, sizeof info.name, "emulated device");
  info.major = 8;
  info.minor = 0;
  info.n_processors = 1;
  info.total_bytes = total_bytes();
  info.memory_bytes_per_s = 0;
  return nullptr;
}

void use(int) {}

uint64_t free_bytes() {
  const std::lock_guard lock(memory.mutex);
  const uint64_t total = total_bytes();
  return total > memory.used ? total - memory.used : 0;
}

void* allocate(size_t n_bytes) { return make(n_bytes, true); }
void release(void* p) { drop(p); }
void* allocate_host(size_t n_bytes) { return make(n_bytes, false); }
void release_host(void* p) { drop(p); }

// Nothing is queued: an operation is done when it returns, so there is nothing to wait for.
Stream* make_stream() { return nullptr; }
void drop_stream(Stream*) {}
Event* make_event() { return nullptr; }
void drop_event(Event*) {}
void record(Event*, Stream*) {}
void wait(Stream*, Event*) {}
void synchronize(Event*) {}
void synchronize(Stream*) {}

void copy(void* dst, const void* src, size_t n_bytes, Stream*) {
  if (n_bytes > 0) std::memmove(dst, src, n_bytes);
}

const char* take_error() {
  const char* of_kernels = emulation::take_error();
  const std::lock_guard lock(memory.mutex);
  for (const auto& [p, allocation] : memory.allocations) check_end(p, allocation);
  const char* of_memory = memory.error;
  memory.error = nullptr;
  return of_kernels != nullptr ? of_kernels : of_memory;
}

}  // namespace duet::gpu::api
