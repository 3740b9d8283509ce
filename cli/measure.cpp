#include "cli/measure.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/parallel.h"
#include "base/units.h"

namespace duet::cli {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kBlock = size_t{4} << 20;  // large enough that the disk, not the call, is measured
constexpr uint64_t kTempBytes = uint64_t{256} << 20, kMaxBytes = uint64_t{512} << 20;
constexpr double kSeconds = 1.0;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Fd {
  int value;
  explicit Fd(int fd) : value(fd) {}
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() {
    if (value >= 0) ::close(value);
  }
};

// Direct I/O wants page alignment.
struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeDeleter>;
Buffer make_buffer() {
  Buffer buffer(static_cast<char*>(std::aligned_alloc(4096, kBlock)));
  if (!buffer) throw std::bad_alloc();
  for (size_t i = 0; i < kBlock; ++i)
    buffer.get()[i] = static_cast<char>(i * 2654435761u >> 13);  // disks compress zeros
  return buffer;
}

DiskRate read_rate(const std::filesystem::path& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  DiskRate rate;
  rate.direct = fd.value >= 0;
  if (!rate.direct) fd.value = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd.value < 0) fail(ErrorKind::io, path.string(), ": cannot open: ", std::strerror(errno));
  if (!rate.direct) static_cast<void>(::posix_fadvise(fd.value, 0, 0, POSIX_FADV_DONTNEED));
  const Buffer buffer = make_buffer();
  const Clock::time_point start = Clock::now();
  while (rate.n_bytes < kMaxBytes && since(start) < kSeconds) {
    const ssize_t n = ::read(fd.value, buffer.get(), kBlock);
    if (n < 0 && errno != EINTR)
      fail(ErrorKind::io, path.string(), ": cannot read: ", std::strerror(errno));
    if (n == 0) break;
    rate.n_bytes += static_cast<uint64_t>(std::max<ssize_t>(n, 0));
  }
  rate.bytes_per_second = static_cast<double>(rate.n_bytes) / std::max(since(start), 1e-9);
  return rate;
}

// A file that goes away with this object.
class TempFile {
 public:
  explicit TempFile(const std::filesystem::path& folder)
      : path_((folder / "duet-doctor-XXXXXX").string()) {
    Fd fd(::mkstemp(path_.data()));
    if (fd.value < 0)
      fail(ErrorKind::io, folder.string(), ": cannot write there: ", std::strerror(errno));
    try {
      fill(fd.value);
    } catch (...) {
      ::unlink(path_.c_str());
      throw;
    }
  }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile() { ::unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  void fill(int fd) {
    const Buffer buffer = make_buffer();
    for (uint64_t done = 0; done < kTempBytes;) {
      const ssize_t n = ::write(fd, buffer.get(), kBlock);
      if (n <= 0) fail(ErrorKind::io, path_, ": write failed: ", std::strerror(errno));
      done += static_cast<uint64_t>(n);
    }
    if (::fsync(fd) != 0) fail(ErrorKind::io, path_, ": write failed: ", std::strerror(errno));
  }
  std::string path_;
};

}  // namespace

DiskRate measure_disk(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return read_rate(path);
  struct statvfs disk {};
  if (::statvfs(path.c_str(), &disk) != 0)
    fail(ErrorKind::io, path.string(), ": ", std::strerror(errno));
  const uint64_t free_bytes = uint64_t{disk.f_bavail} * disk.f_frsize;
  if (free_bytes < 2 * kTempBytes)
    fail(ErrorKind::io, path.string(), ": only ", format_size(free_bytes), " free");
  const TempFile file(path);
  return read_rate(file.path());
}

double measure_memory(int n_threads, uint64_t n_bytes) {
  const std::vector<uint64_t> data(n_bytes / sizeof(uint64_t), 1);
  std::atomic<uint64_t> total{0};  // keeps the sums from being optimised away
  constexpr size_t kGrain = size_t{1} << 17;
  uint64_t read_bytes = 0;
  const Clock::time_point start = Clock::now();
  do {
    parallel_for(n_threads, data.size(), kGrain, [&](size_t begin, size_t end) {
      total += std::accumulate(data.begin() + static_cast<ptrdiff_t>(begin),
                               data.begin() + static_cast<ptrdiff_t>(end), uint64_t{0});
    });
    read_bytes += data.size() * sizeof(uint64_t);
  } while (since(start) < 0.3);
  return static_cast<double>(read_bytes) / since(start);
}

}  // namespace duet::cli
