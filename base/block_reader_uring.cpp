// The back end of one thread that keeps the kernel supplied with reads through io_uring and sleeps
// otherwise.
#include "base/block_reader_core.h"

#if DUET_WITH_URING

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>

#include "base/error.h"

namespace duet::detail {
namespace {

// A ring, and an event whose reading by the ring wakes the thread that waits for completions.
class Ring {
 public:
  static constexpr uint64_t kEvent = UINT64_MAX;  // user data of the event's reading

  Ring() = default;
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() {
    if (made_) io_uring_queue_exit(&ring_);
  }

  // 0, or why not (an errno). n_reads: at most so many under way.
  int make(unsigned n_reads) {
    const int rc = io_uring_queue_init(n_reads + 1, &ring_, 0);
    if (rc < 0) return -rc;
    made_ = true;
    event_ = FileDescriptor(::eventfd(0, EFD_CLOEXEC));
    return event_.is_open() ? try_event() : errno;
  }
  void signal() const {
    const uint64_t one = 1;
    static_cast<void>(!::write(event_.get(), &one, sizeof(one)));
  }
  // The next signal (or one given already) completes as kEvent, once.
  void listen() { read(event_.get(), &event_value_, sizeof(event_value_), 0, kEvent); }
  void read(int fd, void* to, size_t n, uint64_t offset, uint64_t user_data) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    DUET_ASSERT(sqe != nullptr);  // it has room for all that may be under way
    io_uring_prep_read(sqe, fd, to, static_cast<unsigned>(n), offset);
    sqe->user_data = user_data;
  }
  // Hands over what was asked for, sleeps until something has completed, and calls
  // on_end(user_data, result) for all that has.
  template <class OnEnd>
  int wait(const OnEnd& on_end) {
    const int rc = io_uring_submit_and_wait(&ring_, 1);
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      const uint64_t user_data = cqe->user_data;
      const int result = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      on_end(user_data, result);
    }
    return rc < 0 ? -rc : 0;
  }

 private:
  // A ring that can be made may still refuse to be used, or not know reads (before Linux 5.6).
  int try_event() {
    signal();
    listen();
    int result = 0;
    const int error = wait([&](uint64_t, int r) { result = r; });
    if (error != 0) return error;
    return result < 0 ? -result : 0;
  }

  io_uring ring_{};
  FileDescriptor event_;
  uint64_t event_value_ = 0;
  bool made_ = false;
};

class UringReader final : public ReaderCore {
 public:
  UringReader(ReaderSetup setup, std::unique_ptr<Ring> ring)
      : ReaderCore(std::move(setup)), ring_(std::move(ring)), slots_(depth()) {
    for (size_t i = 0; i < slots_.size(); ++i) free_.push_back(i);
    try {
      thread_ = std::thread([this] { serve(); });
    } catch (const std::system_error& e) {
      fail(ErrorKind::memory, "cannot start a thread that reads: ", e.what());
    }
  }
  ~UringReader() override {
    stop();
    thread_.join();
  }

  std::string name() const override { return direct() ? "io_uring, direct" : "io_uring, buffered"; }

 private:
  struct Slot {
    ReadJob job;
    size_t n_most = 0;
  };

  void wake() override { ring_->signal(); }

  // Ends only when the kernel holds no pointer into this object or to a caller's memory.
  void serve() {
    bool listening = false;
    for (;;) {
      while (!free_.empty() && take(slots_[free_.back()].job)) begin();
      const bool last = stopped();
      if (last && !listening && free_.size() == slots_.size()) return;
      if (!last && !listening) {
        ring_->listen();
        listening = true;
      }
      const int error = ring_->wait([&](uint64_t user_data, int result) {
        if (user_data == Ring::kEvent)
          listening = false;
        else
          end_attempt(user_data, result);
      });
      // The kernel is short of something; what was not handed over is handed over next time.
      if (error != 0 && error != EINTR) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void begin() {
    const size_t slot = free_.back();
    free_.pop_back();
    go_on(slot);
  }
  void go_on(size_t slot) {
    ReadJob& job = slots_[slot].job;
    for (;;) {
      const ReadAttempt a = attempt(job);
      slots_[slot].n_most = a.n_most;
      if (a.error == 0) return ring_->read(a.fd, a.to, a.n_bytes, a.offset, slot);
      if (const std::optional<int> error = advance(job, -a.error)) return end(slot, *error);
    }
  }
  void end_attempt(size_t slot, int result) {
    const ssize_t n = std::min<ssize_t>(result, static_cast<ssize_t>(slots_[slot].n_most));
    if (const std::optional<int> error = advance(slots_[slot].job, n)) return end(slot, *error);
    go_on(slot);
  }
  void end(size_t slot, int error) {
    finish(slots_[slot].job, error);
    free_.push_back(slot);
  }

  const std::unique_ptr<Ring> ring_;
  std::vector<Slot> slots_;  // what follows belongs to the thread
  std::vector<size_t> free_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<BlockReader> make_uring_reader(ReaderSetup& setup, std::string& refusal) {
  auto ring = std::make_unique<Ring>();
  const ReadFault& fault = setup.options.fault;
  int error = fault ? fault(0, 0) : 0;
  if (error <= 0) error = ring->make(setup.options.depth);
  if (error > 0) {
    refusal = concat("the system refuses it (", std::strerror(error), ")");
    return nullptr;
  }
  return std::make_unique<UringReader>(std::move(setup), std::move(ring));
}

}  // namespace duet::detail

#else

namespace duet::detail {

std::unique_ptr<BlockReader> make_uring_reader(ReaderSetup&, std::string& refusal) {
  refusal = "this build has no liburing";
  return nullptr;
}

}  // namespace duet::detail

#endif
