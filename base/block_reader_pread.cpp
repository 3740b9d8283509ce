// The back end of threads that each wait in one read: where the system refuses io_uring (containers
// do), and for reads through the page cache.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <thread>

#include "base/block_reader_core.h"
#include "base/error.h"

namespace duet::detail {
namespace {

class PreadReader final : public ReaderCore {
 public:
  explicit PreadReader(ReaderSetup setup) : ReaderCore(std::move(setup)) {
    threads_.reserve(depth());
    try {
      while (threads_.size() < depth()) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error& e) {
      if (!threads_.empty()) return;  // fewer reads at once
      fail(ErrorKind::memory, "cannot start a thread that reads: ", e.what());
    }
  }
  ~PreadReader() override {
    stop();
    for (std::thread& thread : threads_) thread.join();
  }

  std::string name() const override { return direct() ? "pread, direct" : "pread, buffered"; }

 private:
  void serve() {
    ReadJob job;
    while (wait_take(job)) {
      std::optional<int> end;
      while (!end) end = advance(job, read(attempt(job)));
      finish(job, *end);
    }
  }
  static ssize_t read(const ReadAttempt& a) {
    if (a.error != 0) return -a.error;
    const ssize_t n = ::pread(a.fd, a.to, a.n_bytes, static_cast<off_t>(a.offset));
    return n < 0 ? -errno : std::min(n, static_cast<ssize_t>(a.n_most));
  }

  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<BlockReader> make_pread_reader(ReaderSetup setup) {
  return std::make_unique<PreadReader>(std::move(setup));
}

}  // namespace duet::detail
