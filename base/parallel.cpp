#include "base/parallel.h"

#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"

namespace duet {
namespace {

// A thread that waits spins so long before it sleeps: more than the straight code between two
// loops of a forward pass takes, little of the milliseconds that a busy machine gives a thread.
constexpr std::chrono::microseconds kSpinTime{30};
// Two lines: processors fetch neighbours in pairs.
constexpr size_t kLine = 128;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // "yield" takes one cycle on most cores
#endif
}

// True as soon as done() is, false when it was not for kSpinTime.
template <class Done>
bool spin_until(const Done& done) {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < 64; ++i) {
    if (done()) return true;
    pause_briefly();
  }
  for (const auto end = Clock::now() + kSpinTime; Clock::now() < end;)
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause_briefly();
    }
  return done();
}

// Plain futex calls: std::atomic::wait yields the processor before it sleeps, which on a busy
// machine costs a time slice, and this module decides itself how long to spin.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// What all members learn of a job in one read: its number, how many members may work on it, and
// into how many units it is cut. No members: the threads end.
struct Ticket {
  static constexpr int kUnitBits = 20, kMemberBits = 12;
  static constexpr size_t kMaxUnits = (size_t{1} << kUnitBits) - 1;
  static constexpr size_t kMaxMembers = (size_t{1} << kMemberBits) - 1;

  uint32_t number;
  size_t n_members, n_units;

  static Ticket unpack(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 32), bits >> kUnitBits & kMaxMembers, bits & kMaxUnits};
  }
  uint64_t pack() const { return uint64_t{number} << 32 | n_members << kUnitBits | n_units; }
  // Units of one member's share: [share(i), share(i + 1)).
  size_t share(size_t member) const { return n_units * member / n_members; }
};

// Why this is free of races:
// - A unit is claimed by a compare-exchange on its share's counter, which is tagged with the job's
//   number; counters of earlier jobs count as zero, so a new job resets nothing.
// - A job ends when all its units are finished, so all are claimed: a member that comes late, with
//   the ticket of an ended job, finds every counter of that job exhausted or a later number. Hence
//   whoever claims a unit reads the fields of just that job: they were written before its ticket
//   was (release, acquire), and member 0 writes them again only after n_open_ is 0.
// - Members subtract what they finished from n_open_ (release); member 0 reads 0 (acquire) and then
//   sees all they wrote.
// - Sleeping: the sleeper announces itself, then looks again; the waker publishes, then looks for
//   sleepers. These four are sequentially consistent, so one sees the other. A wake-up between the
//   look and the sleep changes the futex word, and the sleep returns at once.
// Numbers are compared by signed difference, so that counters may lag by 2^31 jobs; renumber() keeps
// them closer.
class Team {
 public:
  // Starts n_members - 1 threads. Error(memory) when the system refuses.
  Team(size_t n_members, const Placement& placement);
  ~Team() { stop(); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  size_t size() const { return counters_.size(); }
  const Placement& placement() const { return placement_; }
  // Member 0: shares a job, works on it, returns when it is finished.
  void run(size_t n_threads, size_t n, size_t grain, detail::ChunkFn fn, void* context);

 private:
  struct alignas(kLine) Counter {
    std::atomic<uint64_t> bits{0};  // number of the job << 32 | units claimed
  };

  void serve(size_t member);  // the others: work on jobs until the end
  void stop();
  void renumber();
  void publish(const Ticket& ticket);
  uint64_t await_change(uint64_t seen);
  void await_end();
  void work(size_t member, const Ticket& ticket);
  bool claim(const Ticket& ticket, size_t share, size_t& unit);
  void run_unit(size_t member, size_t unit);

  uint32_t number_ = 0;  // of the last job; member 0 only
  // The job; constant while it is open.
  detail::ChunkFn fn_ = nullptr;
  void* context_ = nullptr;
  size_t n_ = 0, grain_ = 1, unit_size_ = 1;
  std::exception_ptr error_;  // of whoever set failed_

  alignas(kLine) std::atomic<bool> failed_{false};
  alignas(kLine) std::atomic<uint64_t> ticket_{0};
  alignas(kLine) std::atomic<uint32_t> n_open_{0};  // units not finished; member 0 sleeps on it
  std::atomic<bool> leader_sleeps_{false};
  alignas(kLine) std::atomic<uint32_t> bell_{0};  // others sleep on it
  std::atomic<uint32_t> n_sleepers_{0};
  std::vector<Counter> counters_;  // by member
  Placement placement_;
  std::vector<std::thread> threads_;
};

// What this thread is to the loops it meets, and its team.
struct ThreadRole {
  bool leads = false;      // inside run_team
  bool in_loop = false;    // inside the body of a loop
  size_t n_threads = 1;    // of the team it leads
  CpuSet bound_to;         // empty: as it was when it came
  CpuSet unbound;          // CPUs it may use then
  std::vector<int> interleave;
  std::unique_ptr<Team> team;  // kept, asleep, from one use to the next
};

ThreadRole& role() {
  thread_local ThreadRole value;
  return value;
}

void place_thread(const CpuSet& cpus, const std::vector<int>& interleave) {
  ThreadRole& r = role();
  if (cpus != r.bound_to) {
    if (r.bound_to.empty()) r.unbound = allowed_cpus();
    if (set_allowed_cpus(cpus.empty() ? r.unbound : cpus)) r.bound_to = cpus;
  }
  if (interleave != r.interleave && set_interleave(interleave)) r.interleave = interleave;
}

void place_member(const Placement& placement, size_t member) {
  place_thread(placement.cpus.empty() ? CpuSet{} : placement.cpus[member % placement.cpus.size()],
               placement.interleave);
}

Team::Team(size_t n_members, const Placement& placement) : counters_(n_members), placement_(placement) {
  threads_.reserve(n_members - 1);
  try {
    for (size_t member = 1; member < n_members; ++member) threads_.emplace_back([this, member] { serve(member); });
  } catch (const std::system_error& e) {
    stop();
    fail(ErrorKind::memory, "cannot start thread ", threads_.size() + 2, " of ", n_members, ": ", e.what(),
         "; use fewer threads");
  }
}

void Team::stop() {
  publish({++number_, 0, 0});
  for (std::thread& thread : threads_) thread.join();
}

// Between jobs: marks all counters as used up by the last job.
void Team::renumber() {
  for (Counter& counter : counters_) counter.bits.store(uint64_t{number_} << 32 | UINT32_MAX, std::memory_order_relaxed);
}

void Team::run(size_t n_threads, size_t n, size_t grain, detail::ChunkFn fn, void* context) {
  const size_t n_chunks = n / grain + (n % grain != 0);
  const size_t chunks_per_unit = (n_chunks - 1) / Ticket::kMaxUnits + 1;
  fn_ = fn, context_ = context, n_ = n, grain_ = grain, unit_size_ = chunks_per_unit * grain;
  error_ = nullptr;
  failed_.store(false, std::memory_order_relaxed);
  if (number_ % (1u << 30) == 0) renumber();
  const Ticket ticket{++number_, std::min(n_threads, counters_.size()),
                      (n_chunks - 1) / chunks_per_unit + 1};
  n_open_.store(static_cast<uint32_t>(ticket.n_units), std::memory_order_relaxed);
  publish(ticket);
  work(0, ticket);
  await_end();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Team::serve(size_t member) {
  place_member(placement_, member);
  omp_set_num_threads(1);  // a setting of each thread
  for (uint64_t seen = 0;;) {
    seen = await_change(seen);
    const Ticket ticket = Ticket::unpack(seen);
    if (ticket.n_members == 0) return;
    if (member < ticket.n_members) work(member, ticket);
  }
}

void Team::publish(const Ticket& ticket) {
  ticket_.store(ticket.pack(), std::memory_order_seq_cst);
  if (n_sleepers_.load(std::memory_order_seq_cst) == 0) return;
  bell_.fetch_add(1, std::memory_order_seq_cst);
  wake_all(bell_);
}

uint64_t Team::await_change(uint64_t seen) {
  uint64_t now = seen;
  const auto changed = [&] { return (now = ticket_.load(std::memory_order_acquire)) != seen; };
  if (spin_until(changed)) return now;
  n_sleepers_.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t bell = bell_.load(std::memory_order_seq_cst);
    if ((now = ticket_.load(std::memory_order_seq_cst)) != seen) break;
    sleep_while(bell_, bell);
  }
  n_sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return now;
}

void Team::await_end() {
  if (spin_until([&] { return n_open_.load(std::memory_order_acquire) == 0; })) return;
  leader_sleeps_.store(true, std::memory_order_seq_cst);
  for (uint32_t n; (n = n_open_.load(std::memory_order_seq_cst)) != 0;) sleep_while(n_open_, n);
  leader_sleeps_.store(false, std::memory_order_relaxed);
}

void Team::work(size_t member, const Ticket& ticket) {
  for (size_t i = 0; i < ticket.n_members; ++i) {
    const size_t share = member + i < ticket.n_members ? member + i : member + i - ticket.n_members;
    uint32_t n_finished = 0;
    for (size_t unit; claim(ticket, share, unit); ++n_finished) run_unit(member, unit);
    if (n_finished == 0) continue;
    const bool last = n_open_.fetch_sub(n_finished, std::memory_order_seq_cst) == n_finished;
    if (last && leader_sleeps_.load(std::memory_order_seq_cst)) wake_all(n_open_);
  }
}

bool Team::claim(const Ticket& ticket, size_t share, size_t& unit) {
  const size_t begin = ticket.share(share), size = ticket.share(share + 1) - begin;
  std::atomic<uint64_t>& counter = counters_[share].bits;
  uint64_t seen = counter.load(std::memory_order_relaxed);
  for (;;) {
    const auto ahead = static_cast<int32_t>(static_cast<uint32_t>(seen >> 32) - ticket.number);
    const size_t n_claimed = ahead < 0 ? 0 : static_cast<uint32_t>(seen);
    if (ahead > 0 || n_claimed >= size) return false;
    const uint64_t mine = uint64_t{ticket.number} << 32 | (n_claimed + 1);
    if (counter.compare_exchange_weak(seen, mine, std::memory_order_relaxed)) {
      unit = begin + n_claimed;
      return true;
    }
  }
}

// An exception must not leave the thread, nor stop the count of finished units.
void Team::run_unit(size_t member, size_t unit) {
  const size_t begin = unit * unit_size_, end = begin + std::min(unit_size_, n_ - begin);
  role().in_loop = true;
  for (size_t i = begin; i < end && !failed_.load(std::memory_order_relaxed);) {
    const size_t chunk_end = i + std::min(grain_, end - i);
    try {
      fn_(context_, member, i, chunk_end);
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
    }
    i = chunk_end;
  }
  role().in_loop = false;
}

// What a thread is while it leads a team, and was before.
class Lead {
 public:
  explicit Lead(size_t n_threads) : library_threads_(omp_get_max_threads()) {
    role().leads = true;
    role().n_threads = n_threads;
    place_member(role().team->placement(), 0);
    omp_set_num_threads(1);
  }
  ~Lead() {
    role().leads = false;
    place_thread({}, {});
    omp_set_num_threads(library_threads_);
  }
  Lead(const Lead&) = delete;
  Lead& operator=(const Lead&) = delete;

 private:
  int library_threads_;
};

}  // namespace

void detail::run_team(int n_threads, const Placement* placement, BodyFn fn, void* context) {
  ThreadRole& r = role();
  if (r.leads || r.in_loop) return fn(context);
  const size_t n = std::clamp<size_t>(static_cast<size_t>(std::max(n_threads, 1)), 1, Ticket::kMaxMembers);
  if (!r.team || r.team->size() < n || (placement != nullptr && r.team->placement() != *placement)) {
    r.team.reset();
    r.team = std::make_unique<Team>(n, placement != nullptr ? *placement : Placement{});
  }
  const Lead lead(n);
  fn(context);
}

void detail::run_parallel(int n_threads, size_t n, size_t grain, ChunkFn fn, void* context) {
  grain = std::max<size_t>(grain, 1);
  const ThreadRole& r = role();
  if (n_threads <= 1 || n <= grain || r.in_loop) {
    // Chunk by chunk here too: bodies size their scratch by the grain.
    for (size_t i = 0; i < n; i += std::min(grain, n - i))
      fn(context, 0, i, i + std::min(grain, n - i));
    return;
  }
  const auto run = [&] {
    r.team->run(std::min(static_cast<size_t>(n_threads), r.n_threads), n, grain, fn, context);
  };
  if (r.leads) return run();
  using Run = decltype(run);
  run_team(n_threads, nullptr, [](void* f) { (*static_cast<const Run*>(f))(); }, erase(run));
}

void set_library_threads(int n_threads) { omp_set_num_threads(std::max(n_threads, 1)); }

}  // namespace duet
