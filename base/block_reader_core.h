// What the back ends of BlockReader share: open files, the queue, what follows one attempt to read.
// For base/block_reader*.cpp only.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>

#include "base/block_reader.h"
#include "base/file_descriptor.h"

namespace duet::detail {

struct SourceFile {
  FileDescriptor direct;  // not open: the file allows no direct reads
  FileDescriptor cached;
  FileIdentity identity;  // when it was opened
};

struct ReaderSetup {
  std::vector<SourceFile> files;
  ReadDone done;
  BlockReaderOptions options;
};

// A range under way.
struct ReadJob {
  ReadRange range;
  size_t n_done = 0;
  bool cached = false;  // read through the page cache
  int n_idle = 0;       // attempts in a row that brought nothing
};

// One system call to make, unless a fault says what it gave: then error (an errno) is not 0.
struct ReadAttempt {
  int fd = -1;
  std::byte* to = nullptr;
  size_t n_bytes = 0;
  uint64_t offset = 0;
  size_t n_most = 0;  // of what the call delivers, count no more than this
  int error = 0;
};

class ReaderCore : public BlockReader {
 public:
  explicit ReaderCore(ReaderSetup setup);

  void submit(std::span<const ReadRange> ranges, ReadClass urgency) final;
  size_t cancel(uint64_t first_tag, uint64_t n_tags) final;
  void promote(uint64_t first_tag, uint64_t n_tags, ReadClass urgency) final;
  std::optional<size_t> changed_file() const final;
  BlockReaderStats stats() const final;
  bool direct() const final;

 protected:
  // A derived object's threads go through take -> (attempt -> advance)* -> finish.
  bool take(ReadJob& job);       // the next job; false when none waits
  bool wait_take(ReadJob& job);  // waits for one; false once stopped
  ReadAttempt attempt(const ReadJob& job);
  // result: bytes read, or -errno. Empty: attempt again; else the job is over with this error (or
  // 0).
  std::optional<int> advance(ReadJob& job, ssize_t result);
  void finish(const ReadJob& job, int error);  // calls done

  // Ends the queue: what waits is cancelled, nothing is given out any more. Called by the
  // destructors of derived classes, which then join their threads.
  void stop();
  bool stopped() const;
  unsigned depth() const { return options_.depth; }

 private:
  using Clock = std::chrono::steady_clock;
  using Queue = std::deque<ReadRange>;

  virtual void wake() {}  // there is something to take, or the reader was stopped
  void check(const ReadRange& range) const;
  bool take_locked(ReadJob& job);
  static void take_out(Queue& queue, uint64_t first_tag, uint64_t n_tags, Queue& to);
  std::optional<int> after_error(ReadJob& job, int error);
  void go_on_cached(ReadJob& job);

  const std::vector<SourceFile> files_;
  const ReadDone done_;
  const BlockReaderOptions options_;

  std::mutex fault_mutex_;
  uint64_t n_attempts_ = 0;

  mutable std::mutex mutex_;  // what follows
  std::condition_variable work_;
  std::array<Queue, 3> queues_;  // by ReadClass
  size_t n_under_way_ = 0;
  Clock::time_point busy_since_;
  BlockReaderStats stats_;
  bool stopped_ = false;
};

std::unique_ptr<BlockReader> make_pread_reader(ReaderSetup setup);

// Null, with the reason in `refusal` and setup untouched, when the system or the build has no
// io_uring.
std::unique_ptr<BlockReader> make_uring_reader(ReaderSetup& setup, std::string& refusal);

}  // namespace duet::detail
