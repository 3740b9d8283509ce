#include "converters/write_queue.h"

#include <utility>

namespace duet {

WriteQueue::WriteQueue(size_t n_buffers, WriteFn write)
    : write_(std::move(write)), free_(n_buffers), thread_([this] { run(); }) {}

WriteQueue::~WriteQueue() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

WriteQueue::Buffer WriteQueue::take() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return error_ != nullptr || !free_.empty(); });
  if (error_) std::rethrow_exception(error_);
  Buffer buffer = std::move(free_.back());
  free_.pop_back();
  return buffer;
}

void WriteQueue::put(Buffer buffer) {
  {
    const std::lock_guard lock(mutex_);
    full_.push_back(std::move(buffer));
  }
  changed_.notify_all();
}

void WriteQueue::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return error_ != nullptr || (full_.empty() && !busy_); });
  if (error_) std::rethrow_exception(error_);
}

void WriteQueue::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !full_.empty(); });
    if (stop_) return;
    Buffer buffer = std::move(full_.front());
    full_.pop_front();
    busy_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      write_(buffer);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    busy_ = false;
    free_.push_back(std::move(buffer));
    if (error) error_ = error;
    changed_.notify_all();
    if (error) return;
  }
}

}  // namespace duet
