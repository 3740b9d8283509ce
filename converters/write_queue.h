// One thread that writes buffers in order, so that encoding and writing overlap.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace duet {

// Buffers go round: take() an empty one, fill it, put() it. At most `n_buffers` exist, so a slow
// disk stops the encoder instead of filling memory. One producer thread.
class WriteQueue {
 public:
  using Buffer = std::vector<std::byte>;
  using WriteFn = std::function<void(std::span<const std::byte>)>;

  WriteQueue(size_t n_buffers, WriteFn write);
  WriteQueue(const WriteQueue&) = delete;
  WriteQueue& operator=(const WriteQueue&) = delete;
  ~WriteQueue();  // drops what is not written yet

  // An empty buffer; waits until one is free. Rethrows the writer's error.
  Buffer take();
  void put(Buffer buffer);
  // Waits until all is written; rethrows the writer's error.
  void finish();

 private:
  void run();

  WriteFn write_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Buffer> free_;
  std::deque<Buffer> full_;
  bool busy_ = false, stop_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // last: starts when all else is ready
};

}  // namespace duet
