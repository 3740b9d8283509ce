#include "base/private_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/file_descriptor.h"

namespace duet {
namespace {

void write_all(int fd, std::string_view text, const std::filesystem::path& path) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(ErrorKind::io, path.string(), ": write failed: ", std::strerror(errno));
    text.remove_prefix(static_cast<size_t>(n));
  }
}

}  // namespace

void write_private_file(const std::filesystem::path& path, std::span<const std::string_view> parts) {
  const std::string temporary = concat(path.string(), ".tmp", ::getpid());
  const FileDescriptor fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.is_open()) fail(ErrorKind::io, path.string(), ": cannot write: ", std::strerror(errno));
  try {
    for (const std::string_view part : parts) write_all(fd.get(), part, path);
    if (::rename(temporary.c_str(), path.c_str()) != 0) fail(ErrorKind::io, path.string(), ": cannot rename into place: ", std::strerror(errno));
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
}

std::string read_beginning(const std::filesystem::path& path, size_t n) {
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat status {};
  if (!fd.is_open() || ::fstat(fd.get(), &status) != 0 || !S_ISREG(status.st_mode)) fail(ErrorKind::io, path.string(), ": cannot be read as a file");
  std::string text(n, '\0');
  size_t done = 0;
  while (done < n) {
    const ssize_t got = ::read(fd.get(), text.data() + done, n - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(ErrorKind::io, path.string(), ": cannot read: ", std::strerror(errno));
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  text.resize(done);
  return text;
}

}  // namespace duet
