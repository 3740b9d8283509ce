#include "cli/measure.h"

#include <sys/statvfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file_descriptor.h"
#include "base/parallel.h"
#include "base/units.h"

namespace duet::cli {
namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t kTempBytes = uint64_t{256} << 20;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A file that goes away with this object.
class TempFile {
 public:
  explicit TempFile(const std::filesystem::path& folder)
      : path_((folder / "duet-doctor-XXXXXX").string()) {
    const FileDescriptor fd(::mkstemp(path_.data()));
    if (!fd.is_open())
      fail(ErrorKind::io, folder.string(), ": cannot write there: ", std::strerror(errno));
    try {
      fill(fd.get());
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
    std::vector<char> block(size_t{4} << 20);
    for (size_t i = 0; i < block.size(); ++i)
      block[i] = static_cast<char>(i * 2654435761u >> 13);  // disks compress zeros
    for (uint64_t done = 0; done < kTempBytes;) {
      const ssize_t n = ::write(fd, block.data(), block.size());
      if (n <= 0) fail(ErrorKind::io, path_, ": write failed: ", std::strerror(errno));
      done += static_cast<uint64_t>(n);
    }
    if (::fsync(fd) != 0) fail(ErrorKind::io, path_, ": write failed: ", std::strerror(errno));
  }
  std::string path_;
};

}  // namespace

ReadRate measure_disk(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return measure_read_rate(path);
  struct statvfs disk {};
  if (::statvfs(path.c_str(), &disk) != 0)
    fail(ErrorKind::io, path.string(), ": ", std::strerror(errno));
  const uint64_t free_bytes = uint64_t{disk.f_bavail} * disk.f_frsize;
  if (free_bytes < 2 * kTempBytes)
    fail(ErrorKind::io, path.string(), ": only ", format_size(free_bytes), " free");
  const TempFile file(path);
  return measure_read_rate(file.path());
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
