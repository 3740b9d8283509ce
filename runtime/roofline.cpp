#include "runtime/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "base/error.h"
#include "base/host.h"
#include "base/pages.h"
#include "base/parallel.h"
#include "base/stopwatch.h"

namespace duet {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kReadRuns = 5, kMacRuns = 15;
constexpr uint64_t kHugePage = uint64_t{2} << 20;
constexpr uint64_t kMinBytes = uint64_t{64} << 20;  // below, caches would be measured

// Calls body(worker) once for each worker in [0, n_threads), all at once.
template <class Body>
void on_all_threads(int n_threads, const Body& body) {
  parallel_for(n_threads, static_cast<size_t>(n_threads), 1, [&](size_t begin, size_t end) {
    for (size_t worker = begin; worker < end; ++worker) body(worker);
  });
}

uint64_t buffer_size(uint64_t max_bytes, int n_threads) {
  const HostMemory memory = read_host_memory();
  uint64_t room = memory.available_bytes;
  if (memory.cgroup_limit_bytes) {
    const uint64_t used = memory.cgroup_used_bytes.value_or(0);
    room = std::min(room, *memory.cgroup_limit_bytes - std::min(used, *memory.cgroup_limit_bytes));
  }
  const uint64_t unit = kHugePage * static_cast<uint64_t>(n_threads);  // equal parts of whole pages
  const uint64_t least = std::min(kMinBytes, max_bytes);
  // A group may be full of file pages, which the kernel takes back.
  if (memory.available_bytes / 4 < least || memory.cgroup_limit_bytes.value_or(UINT64_MAX) / 4 < least)
    fail(ErrorKind::memory, "only ", room, " bytes of memory are available: too few to measure its speed");
  return std::max(std::min(max_bytes, room / 4), least + unit - 1) / unit * unit;
}

// Each thread writes the part it will read, so that it lies in that thread's memory.
void fill(const PageArray& buffer, int n_threads, uint64_t n_bytes) {
  const uint64_t part = n_bytes / static_cast<uint64_t>(n_threads);
  on_all_threads(n_threads, [&](size_t worker) { std::memset(buffer.data() + worker * part, 1, part); });
}

double best_read_rate(const KernelTable& kernels, const PageArray& buffer, int n_threads, uint64_t n_bytes, int n_runs) {
  const uint64_t part = n_bytes / static_cast<uint64_t>(n_threads) / kHugePage * kHugePage;
  n_bytes = part * static_cast<uint64_t>(n_threads);
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int run = 0; run < n_runs; ++run) {
    const Clock::time_point start = Clock::now();
    on_all_threads(n_threads, [&](size_t worker) { total += kernels.peak.read_sum(buffer.data() + worker * part, part); });
    best = std::max(best, static_cast<double>(n_bytes) / seconds_since(start));
  }
  // Every byte is 1; also keeps the sums from being left out.
  DUET_ASSERT(total.load() == static_cast<uint64_t>(n_runs) * (n_bytes / 8) * uint64_t{0x0101010101010101});
  return best;
}

using MacLoop = uint64_t (*)(uint64_t) noexcept;

// Steps that take about 10 ms on one thread.
uint64_t calibrate(MacLoop loop) {
  for (uint64_t n_steps = 1000;; n_steps *= 4) {
    const Clock::time_point start = Clock::now();
    loop(n_steps);
    const double s = seconds_since(start);
    if (s > 2e-3) return static_cast<uint64_t>(static_cast<double>(n_steps) * 10e-3 / s) + 1;
  }
}

double best_mac_rate(MacLoop loop, int n_threads) {
  const uint64_t n_steps = calibrate(loop);
  double best = 0;
  for (int run = 0; run < kMacRuns; ++run) {
    std::atomic<uint64_t> macs{0};
    const Clock::time_point start = Clock::now();
    on_all_threads(n_threads, [&](size_t) { macs += loop(n_steps); });
    best = std::max(best, static_cast<double>(macs.load()) / seconds_since(start));
  }
  return best;
}

}  // namespace

std::vector<Roofline> measure_rooflines(std::span<const KernelTable* const> tables, int n_threads,
                                        uint64_t max_bytes) {
  const uint64_t n_bytes = buffer_size(max_bytes, n_threads);
  const PageArray buffer(n_bytes);
  fill(buffer, n_threads, n_bytes);
  std::vector<Roofline> out;
  for (const KernelTable* table : tables)
    out.push_back({.read_bytes_per_s = best_read_rate(*table, buffer, n_threads, n_bytes, kReadRuns),
                   .int8_macs_per_s = best_mac_rate(table->peak.int8_macs, n_threads),
                   .f32_macs_per_s = best_mac_rate(table->peak.f32_macs, n_threads),
                   .buffer_bytes = n_bytes});
  return out;
}

struct ReadProbe::Memory {
  explicit Memory(uint64_t n) : n_bytes(n), buffer(n) {}

  uint64_t n_bytes;
  PageArray buffer;
};

ReadProbe::ReadProbe(const KernelTable& kernels, int n_threads, uint64_t max_bytes)
    : kernels_(kernels), memory_(std::make_unique<Memory>(buffer_size(max_bytes, n_threads))) {
  fill(memory_->buffer, n_threads, memory_->n_bytes);
}

ReadProbe::~ReadProbe() = default;

double ReadProbe::bytes_per_s(int n_threads) const {
  return best_read_rate(kernels_, memory_->buffer, n_threads, memory_->n_bytes, 2);
}

}  // namespace duet
