#include "base/read_rate.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>

#include "base/error.h"
#include "base/mapped_file.h"
#include "base/pages.h"

namespace duet {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

double seconds_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// Written once: page faults are not the disk's.
PageArray touched_memory(size_t n_bytes, bool huge) {
  PageArray memory(n_bytes, huge);
  std::memset(memory.data(), 0, n_bytes);
  return memory;
}

// The blocks of a file in the order in which they are read, without end.
class BlockOrder {
 public:
  BlockOrder(size_t n_blocks, size_t in_a_row)
      : n_blocks_(n_blocks), in_a_row_(std::min(in_a_row, n_blocks)) {
    for (size_t first = 0; first < n_blocks; first += in_a_row_) starts_.push_back(first);
    // Another order each time: what reads this file next must not profit from caches below.
    std::shuffle(starts_.begin(), starts_.end(), std::mt19937_64(std::random_device{}()));
  }
  size_t next() {
    const size_t block = starts_[run_] + at_;
    if (++at_ == in_a_row_ || starts_[run_] + at_ == n_blocks_) {
      at_ = 0;
      run_ = (run_ + 1) % starts_.size();
    }
    return block;
  }

 private:
  size_t n_blocks_, in_a_row_, run_ = 0, at_ = 0;
  std::vector<size_t> starts_;
};

// When each range (numbered by its tag, which is its place in the order, too) was submitted and
// done.
class Times {
 public:
  ReadDone done() {
    return [this](uint64_t tag, int error) {
      const std::lock_guard lock(mutex_);
      if (error != 0 && error != ECANCELED) error_ = error;
      if (error == 0) done_.push_back({Clock::now(), tag});
      ++n_ended_;
      changed_.notify_one();
    };
  }
  // The tag of the next range, which is submitted now.
  uint64_t submitted() {
    submitted_.push_back(Clock::now());
    return submitted_.size() - 1;
  }
  // Waits until at most n ranges are not ended, or some time has passed; 0 or the error of a range.
  int wait(size_t n) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::milliseconds(100),
                      [&] { return error_ != 0 || submitted_.size() - n_ended_ <= n; });
    return error_;
  }
  size_t n_under_way() {
    const std::lock_guard lock(mutex_);
    return submitted_.size() - n_ended_;
  }
  size_t n_done() {
    const std::lock_guard lock(mutex_);
    return done_.size();
  }
  // Reads done at `end` at latest. A range begins when it is submitted and one of `depth` places is
  // free.
  void evaluate(Clock::time_point end, size_t block_bytes, unsigned depth, ReadRate& rate) {
    std::erase_if(done_, [&](const Done& d) { return d.time > end; });
    rate.n_reads = done_.size();
    rate.n_bytes = rate.n_reads * block_bytes;
    for (const Done& d : done_) {
      Clock::time_point begin = submitted_[d.tag];
      if (d.tag >= depth) begin = std::max(begin, done_[d.tag - depth].time);
      rate.latencies.push_back(seconds_between(begin, d.time));
    }
    std::sort(rate.latencies.begin(), rate.latencies.end());
    // From completion to completion: neither the start nor the end of the measurement counts.
    if (done_.size() > 1)
      rate.bytes_per_second =
          static_cast<double>(rate.n_bytes - block_bytes) /
          std::max(seconds_between(done_.front().time, done_.back().time), 1e-9);
  }

 private:
  struct Done {
    Clock::time_point time;
    uint64_t tag;
  };
  std::vector<Clock::time_point> submitted_;  // of the measuring thread
  std::mutex mutex_;                          // what follows
  std::condition_variable changed_;
  std::vector<Done> done_;
  size_t n_ended_ = 0;
  int error_ = 0;
};

}  // namespace

ReadRate measure_read_rate(const fs::path& file, const ReadRateOptions& o) {
  std::error_code ec;
  const uint64_t size = fs::file_size(file, ec);
  if (ec || size == 0)
    fail(ErrorKind::io, file.string(), ": ", ec ? ec.message() : "an empty file has no read rate");
  const size_t block = std::min<size_t>(
      o.block_bytes, (size + kReadAlignment - 1) / kReadAlignment * kReadAlignment);
  const size_t n_buffers = 2 * size_t{o.depth};
  const PageArray buffers = touched_memory(n_buffers * block, o.large_pages);
  BlockOrder order(std::max<size_t>(size / block, 1), o.blocks_in_a_row);
  Times times;
  auto reader =
      BlockReader::open({&file, 1}, times.done(), {.backend = o.backend, .depth = o.depth});
  ReadRate rate = {.direct = reader->direct(), .reader = reader->name()};
  if (!rate.direct) drop_from_cache(file);
  const size_t n_needed = std::min<uint64_t>(block, size);
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                   std::chrono::duration<double>(o.seconds));
  int error = 0;
  while (error == 0 && (Clock::now() < end || times.n_done() < 2)) {
    std::vector<ReadRange> ranges;
    for (size_t n = times.n_under_way(); n < n_buffers; ++n) {
      const uint64_t tag = times.submitted();  // two reads may share a buffer: nobody looks at it
      ranges.push_back({.offset = order.next() * block,
                        .n_bytes = block,
                        .n_needed = n_needed,
                        .to = buffers.data() + tag % n_buffers * block,
                        .tag = tag});
    }
    reader->submit(ranges, ReadClass::ahead);
    error = times.wait(n_buffers - (o.depth + 1) / 2);
  }
  if (error != 0) fail(ErrorKind::io, file.string(), ": cannot read: ", std::strerror(error));
  const Clock::time_point stop = Clock::now();
  reader.reset();
  times.evaluate(stop, n_needed, o.depth, rate);
  return rate;
}

}  // namespace duet
