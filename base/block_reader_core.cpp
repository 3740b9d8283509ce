#include "base/block_reader_core.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "base/error.h"

namespace duet::detail {
namespace {

// A system call moves less than 2 GiB.
constexpr size_t kMaxAttempt = size_t{1} << 30;
// Attempts in a row without a byte, a millisecond apart, before "try again" becomes the error.
constexpr int kMaxIdle = 1000;

size_t index(ReadClass urgency) { return static_cast<size_t>(urgency); }

}  // namespace

ReaderCore::ReaderCore(ReaderSetup setup)
    : files_(std::move(setup.files)),
      done_(std::move(setup.done)),
      options_(std::move(setup.options)) {}

void ReaderCore::check(const ReadRange& r) const {
  const auto aligned = [](uint64_t value) { return value % kReadAlignment == 0; };
  DUET_ASSERT(r.file < files_.size() && r.to != nullptr && r.n_bytes > 0 &&
              r.n_needed <= r.n_bytes);
  DUET_ASSERT(aligned(r.offset) && aligned(r.n_bytes) &&
              aligned(reinterpret_cast<uintptr_t>(r.to)));
  DUET_ASSERT(r.offset <= static_cast<uint64_t>(INT64_MAX) - r.n_bytes);
}

void ReaderCore::submit(std::span<const ReadRange> ranges, ReadClass urgency) {
  for (const ReadRange& range : ranges) check(range);
  {
    const std::lock_guard lock(mutex_);
    Queue& queue = queues_[index(urgency)];
    queue.insert(queue.end(), ranges.begin(), ranges.end());
  }
  if (ranges.size() == 1)
    work_.notify_one();
  else
    work_.notify_all();
  wake();
}

size_t ReaderCore::cancel(uint64_t first_tag, uint64_t n_tags) {
  Queue dropped;
  {
    const std::lock_guard lock(mutex_);
    for (Queue& queue : queues_) take_out(queue, first_tag, n_tags, dropped);
  }
  for (const ReadRange& range : dropped) done_(range.tag, ECANCELED);
  return dropped.size();
}

void ReaderCore::promote(uint64_t first_tag, uint64_t n_tags, ReadClass urgency) {
  const std::lock_guard lock(mutex_);
  for (size_t from = index(urgency) + 1; from < queues_.size(); ++from)
    take_out(queues_[from], first_tag, n_tags, queues_[index(urgency)]);
}

// To the end of `to`, in their order.
void ReaderCore::take_out(Queue& queue, uint64_t first_tag, uint64_t n_tags, Queue& to) {
  const auto moved = std::stable_partition(queue.begin(), queue.end(), [&](const ReadRange& r) { return r.tag - first_tag >= n_tags; });
  to.insert(to.end(), moved, queue.end());
  queue.erase(moved, queue.end());
}

std::optional<size_t> ReaderCore::changed_file() const {
  for (size_t i = 0; i < files_.size(); ++i)
    if (identify(files_[i].cached.get()) != files_[i].identity) return i;
  return std::nullopt;
}

BlockReaderStats ReaderCore::stats() const {
  const std::lock_guard lock(mutex_);
  BlockReaderStats stats = stats_;
  if (n_under_way_ > 0)
    stats.busy_ns +=
        static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - busy_since_).count());
  return stats;
}

bool ReaderCore::direct() const {
  return std::all_of(files_.begin(), files_.end(),
                     [](const SourceFile& f) { return f.direct.is_open(); });
}

bool ReaderCore::take_locked(ReadJob& job) {
  for (Queue& queue : queues_) {
    if (queue.empty()) continue;
    job = ReadJob{.range = queue.front()};
    queue.pop_front();
    job.cached = !files_[job.range.file].direct.is_open();
    if (n_under_way_++ == 0) busy_since_ = Clock::now();
    return true;
  }
  return false;
}

bool ReaderCore::take(ReadJob& job) {
  const std::lock_guard lock(mutex_);
  return take_locked(job);
}

bool ReaderCore::wait_take(ReadJob& job) {
  std::unique_lock lock(mutex_);
  bool taken = false;
  work_.wait(lock, [&] { return stopped_ || (taken = take_locked(job)); });
  return taken;
}

ReadAttempt ReaderCore::attempt(const ReadJob& job) {
  const SourceFile& file = files_[job.range.file];
  const size_t n = std::min(job.range.n_bytes - job.n_done, kMaxAttempt);
  ReadAttempt a = {.fd = job.cached ? file.cached.get() : file.direct.get(),
                   .to = job.range.to + job.n_done,
                   .n_bytes = n,
                   .offset = job.range.offset + job.n_done,
                   .n_most = n};
  if (!options_.fault) return a;
  const std::lock_guard lock(fault_mutex_);
  const int fault = options_.fault(++n_attempts_, n);
  if (fault > 0) a.error = fault;
  if (fault < 0) a.n_most = std::min(n, static_cast<size_t>(-static_cast<int64_t>(fault)));
  return a;
}

std::optional<int> ReaderCore::advance(ReadJob& job, ssize_t result) {
  if (result < 0) return after_error(job, static_cast<int>(-result));
  if (result > 0) {
    job.n_done += static_cast<size_t>(result);
    job.n_idle = 0;
  }
  if (job.n_done >= job.range.n_needed) return 0;
  if (result == 0) return ENODATA;
  // A direct read cannot go on at this offset; usually it ended here because the file does.
  if (job.n_done % kReadAlignment != 0) go_on_cached(job);
  return {};
}

std::optional<int> ReaderCore::after_error(ReadJob& job, int error) {
  if (error == EINVAL && !job.cached) {
    go_on_cached(job);
    return {};
  }
  if (error != EAGAIN && error != EINTR) return error;
  if (++job.n_idle >= kMaxIdle) return error;
  if (error == EAGAIN) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return {};
}

void ReaderCore::go_on_cached(ReadJob& job) {
  if (job.cached) return;
  job.cached = true;
  const std::lock_guard lock(mutex_);
  ++stats_.fallbacks;
}

void ReaderCore::finish(const ReadJob& job, int error) {
  const ReadRange& r = job.range;
  if (job.cached)  // no effect on pages that a process has mapped, or that are being written
    static_cast<void>(::posix_fadvise(files_[r.file].cached.get(), static_cast<off_t>(r.offset),
                                      static_cast<off_t>(r.n_bytes), POSIX_FADV_DONTNEED));
  {
    const std::lock_guard lock(mutex_);
    stats_.bytes += job.n_done;
    if (error == 0) ++stats_.reads;
    if (--n_under_way_ == 0)
      stats_.busy_ns +=
          static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - busy_since_).count());
  }
  done_(r.tag, error);
}

void ReaderCore::stop() {
  Queue dropped;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    for (Queue& queue : queues_) {
      dropped.insert(dropped.end(), queue.begin(), queue.end());
      queue.clear();
    }
  }
  work_.notify_all();
  wake();
  for (const ReadRange& range : dropped) done_(range.tag, ECANCELED);
}

bool ReaderCore::stopped() const {
  const std::lock_guard lock(mutex_);
  return stopped_;
}

}  // namespace duet::detail
