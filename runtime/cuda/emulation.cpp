#include "runtime/cuda/emulation.h"

#include <csetjmp>
#include <memory>
#include <mutex>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace duet::gpu::emulation {

Index3 thread_index, block_index, block_size, grid_size;
std::byte* shared_memory;

namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 64 << 10;
constexpr size_t kMaxThreads = 1024, kMaxShared = 99 << 10, kCanaryBytes = 4096;
constexpr std::byte kFresh{0xff}, kCanary{0xa5};

enum class State : uint8_t { ready, at_warp, at_block, done };

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::byte* stack = nullptr;
  bool started = false;
  State state = State::ready;
  uint64_t seen = 0;  // generation of what it waits for
};

struct Warp {
  uint32_t n_arrived = 0;
  uint64_t generation = 0;
  Meeting kind{};
  Words brought[2][32];
};

struct Machine {
  std::mutex one_launch;
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  std::unique_ptr<Warp[]> warps{new Warp[kMaxThreads / 32]};
  std::vector<std::byte> shared = std::vector<std::byte>(kMaxShared + kCanaryBytes);
  jmp_buf scheduler;
  Body body{};
  size_t running = 0;
  unsigned n_threads = 0;
  uint32_t n_arrived = 0;  // at the block's barrier
  uint64_t generation = 0;
  bool meets = false;
  const char *error = nullptr, *told = nullptr;

  ~Machine() {
    for (size_t i = 0; i < kMaxThreads; ++i)
      if (fibers[i].stack != nullptr) munmap(fibers[i].stack - kGuardBytes, kStackBytes + kGuardBytes);
  }
};
Machine machine;

void blame(const char* what) {
  if (machine.error == nullptr) machine.error = what;
}

// ---- fibers ------------------------------------------------------------------------------------
// AddressSanitizer is told on which stack the program goes on.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_bytes;
void leave(bool to_fiber, void** fake) {
  const void* to = to_fiber ? machine.fibers[machine.running].stack : scheduler_stack;
  __sanitizer_start_switch_fiber(fake, to, to_fiber ? kStackBytes : scheduler_bytes);
}
void arrive_in_fiber(void* fake) { __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_bytes); }
void arrive_in_scheduler(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
#else
void leave(bool, void**) {}
void arrive_in_fiber(void*) {}
void arrive_in_scheduler(void*) {}
#endif

[[gnu::noinline]] void to_scheduler() {
  void* fake = nullptr;
  leave(false, &fake);
  if (_setjmp(machine.fibers[machine.running].at) == 0) _longjmp(machine.scheduler, 1);
  arrive_in_fiber(fake);
}

// A fiber serves one thread of a block after the other.
void fiber_main() {
  arrive_in_fiber(nullptr);
  for (;;) {
    machine.body.run(machine.body.context);
    machine.fibers[machine.running].state = State::done;
    to_scheduler();
  }
}

void make_stack(Fiber& fiber) {
  void* map = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return;
  mprotect(map, kGuardBytes, PROT_NONE);
  fiber.stack = static_cast<std::byte*>(map) + kGuardBytes;
}

[[gnu::noinline]] void start(Fiber& fiber) {
  if (fiber.stack == nullptr) make_stack(fiber);
  if (fiber.stack == nullptr) {
    blame("emulation: no memory for stacks");
    fiber.state = State::done;
    return;
  }
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  fiber.started = true;
  void* fake = nullptr;
  leave(true, &fake);
  if (_setjmp(machine.scheduler) == 0) setcontext(&fiber.start);
  arrive_in_scheduler(fake);
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  if (!fiber.started) return start(fiber);
  void* fake = nullptr;
  leave(true, &fake);
  if (_setjmp(machine.scheduler) == 0) _longjmp(fiber.at, 1);
  arrive_in_scheduler(fake);
}

void wait(State state, uint64_t generation) {
  Fiber& fiber = machine.fibers[machine.running];
  fiber.state = state;
  fiber.seen = generation;
  to_scheduler();
}

// ---- the threads of a block ----------------------------------------------------------------------
bool can_run(size_t i) {
  const Fiber& fiber = machine.fibers[i];
  if (fiber.state == State::at_warp) return machine.warps[i / 32].generation != fiber.seen;
  if (fiber.state == State::at_block) return machine.generation != fiber.seen;
  return fiber.state == State::ready;
}

void run_thread(size_t i) {
  machine.running = i;
  machine.fibers[i].state = State::ready;
  thread_index.x = static_cast<unsigned>(i);
  resume(machine.fibers[i]);
}

// As far as its lanes get among themselves.
bool run_warp(size_t warp) {
  bool any = false;
  for (bool progress = true; progress && machine.error == nullptr; any = any || progress) {
    progress = false;
    for (size_t i = 32 * warp; i < 32 * warp + 32; ++i) {
      if (!can_run(i)) continue;
      run_thread(i);
      progress = true;
    }
  }
  return any;
}

bool all_done() {
  for (size_t i = 0; i < machine.n_threads; ++i)
    if (machine.fibers[i].state != State::done) return false;
  return true;
}

// Stacks of threads that will never end are begun anew.
void abandon() {
  for (size_t i = 0; i < machine.n_threads; ++i)
    if (machine.fibers[i].state != State::done) machine.fibers[i].started = false;
}

void run_fibers() {
  for (size_t i = 0; i < machine.n_threads; ++i) machine.fibers[i].state = State::ready;
  for (size_t w = 0; w < machine.n_threads / 32; ++w) machine.warps[w].n_arrived = 0;
  machine.n_arrived = 0;
  while (machine.error == nullptr && !all_done()) {
    bool progress = false;
    for (size_t w = 0; w < machine.n_threads / 32; ++w) progress = run_warp(w) || progress;
    if (!progress) blame("emulation: a thread waits for others that do not come");
  }
  if (machine.error != nullptr) abandon();
}

void run_block(size_t shared_bytes) {
  std::memset(machine.shared.data(), static_cast<int>(kFresh), shared_bytes);
  if (machine.meets) run_fibers();
  for (unsigned i = 0; !machine.meets && i < machine.n_threads && machine.error == nullptr; ++i) {
    thread_index.x = i;
    machine.body.run(machine.body.context);
  }
  for (size_t i = 0; i < kCanaryBytes; ++i)
    if (machine.shared[shared_bytes + i] != kCanary) return blame("emulation: a write past shared memory");
}

}  // namespace

const Words* meet(Meeting kind, const Words& mine) {
  if (!machine.meets) blame("emulation: threads launched apart meet");
  if (machine.error != nullptr) return machine.warps[0].brought[0];
  Warp& warp = machine.warps[machine.running / 32];
  Words* brought = warp.brought[warp.generation % 2];
  brought[machine.running % 32] = mine;
  if (warp.n_arrived == 0) warp.kind = kind;
  if (warp.kind != kind) blame("emulation: lanes of a warp do different things");
  if (++warp.n_arrived < 32) {
    wait(State::at_warp, warp.generation);
  } else {
    warp.n_arrived = 0;
    ++warp.generation;
  }
  return brought;
}

void sync_block() {
  if (!machine.meets) blame("emulation: threads launched apart meet");
  if (machine.error != nullptr) return;
  if (++machine.n_arrived < machine.n_threads) return wait(State::at_block, machine.generation);
  machine.n_arrived = 0;
  ++machine.generation;
}

void run_grid(Index3 grid, unsigned block, size_t shared_bytes, bool meets, Body body) {
  const std::lock_guard lock(machine.one_launch);
  if (block == 0 || block > kMaxThreads || block % 32 != 0) return blame("emulation: a block of so many threads cannot be");
  if (shared_bytes > kMaxShared) return blame("emulation: more shared memory than devices have");
  if (grid.y > 65535 || grid.z > 65535) return blame("emulation: a grid larger than devices take");
  machine.body = body;
  machine.meets = meets;
  machine.n_threads = block;
  std::memset(machine.shared.data() + shared_bytes, static_cast<int>(kCanary), kCanaryBytes);
  shared_memory = machine.shared.data();
  block_size = {block, 1, 1};
  grid_size = grid;
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x && machine.error == nullptr; ++block_index.x) run_block(shared_bytes);
}

const char* take_error() {
  const std::lock_guard lock(machine.one_launch);
  machine.told = machine.error;
  machine.error = nullptr;
  return machine.told;
}

}  // namespace duet::gpu::emulation
