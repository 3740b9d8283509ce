#include "base/locked_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace duet {
namespace {

bool has_name(const FileDescriptor& file, const std::filesystem::path& path) {
  struct stat ours {}, named {};
  return ::fstat(file.get(), &ours) == 0 && ::lstat(path.c_str(), &named) == 0 && ours.st_dev == named.st_dev && ours.st_ino == named.st_ino;
}

}  // namespace

FileDescriptor open_locked(const std::filesystem::path& path, const std::function<void()>& opened) {
  for (;;) {
    FileDescriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644));
    if (!file.is_open()) fail(ErrorKind::io, path.string(), ": cannot write: ", std::strerror(errno));
    if (opened) opened();
    if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) return FileDescriptor();
    if (has_name(file, path)) return file;
  }
}

}  // namespace duet
