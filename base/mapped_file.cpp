#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

std::string errno_text() { return std::strerror(errno); }

}  // namespace

FileDescriptor open_regular(const fs::path& path, uint64_t* size) {
  // O_NONBLOCK: opening a pipe must not wait for its writer. No effect on regular files.
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.is_open()) fail(ErrorKind::io, path.string(), ": cannot open: ", errno_text());
  struct stat info {};
  if (::fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) fail(ErrorKind::io, path.string(), ": not a regular file");
  if (size != nullptr) *size = static_cast<uint64_t>(info.st_size);
  return file;
}

std::optional<FileIdentity> identify(int descriptor) {
  struct stat info {};
  if (::fstat(descriptor, &info) != 0) return std::nullopt;
  return FileIdentity{.device = info.st_dev, .inode = info.st_ino, .size = static_cast<uint64_t>(info.st_size),
                      .modified_ns = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

std::string identity_line(const fs::path& path, const FileIdentity& identity) {
  return concat(path.filename().string(), " ", identity.size, " ", identity.modified_ns, "\n");
}

MappedFile MappedFile::open(const fs::path& path) {
  uint64_t size = 0;
  const FileDescriptor fd = open_regular(path, &size);
  MappedFile out;
  out.path_ = path;
  out.size_ = size;
  out.identity_ = identify(fd.get()).value_or(FileIdentity{});
  if (size == 0) return out;
  void* p = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (p == MAP_FAILED)
    fail(ErrorKind::io, path.string(), ": cannot map ", size, " bytes: ", errno_text());
  out.data_ = static_cast<const std::byte*>(p);
  return out;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      identity_(other.identity_),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(identity_, other.identity_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void drop_from_cache(const fs::path& path) {
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.is_open()) static_cast<void>(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED));
}

void MappedFile::fetch(std::span<const std::byte> part) const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(data_), begin = reinterpret_cast<uintptr_t>(part.data());
  if (begin < start || begin + part.size() > start + size_) return;
  const uintptr_t first = begin / page * page;
  ::madvise(const_cast<std::byte*>(data_) + (first - start), begin + part.size() - first, MADV_WILLNEED);
}

void MappedFile::drop(std::span<const std::byte> part, bool cached) const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(data_), stop = start + size_;
  const auto begin = reinterpret_cast<uintptr_t>(part.data()), end = begin + part.size();
  if (begin < start || end > stop) return;
  const uintptr_t first = (begin + page - 1) / page * page;  // whole pages only: neighbours stay
  const uintptr_t last = end == stop ? end : end / page * page;
  if (first < last)
    ::madvise(const_cast<std::byte*>(data_) + (first - start), last - first, MADV_DONTNEED);
  if (!cached || first >= last) return;
  const FileDescriptor fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.is_open()) static_cast<void>(::posix_fadvise(fd.get(), static_cast<off_t>(first - start), static_cast<off_t>(last - first), POSIX_FADV_DONTNEED));
}

std::string read_file(const fs::path& path, uint64_t max_bytes) {
  uint64_t size = 0;
  const FileDescriptor fd = open_regular(path, &size);
  if (size > max_bytes)
    fail(ErrorKind::format, path.string(), ": ", format_size(size), " is larger than the ",
         format_size(max_bytes), " expected at most of such a file");
  std::string text(size, '\0');
  for (size_t done = 0; done < size;) {
    const ssize_t n = ::read(fd.get(), text.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      fail(ErrorKind::io, path.string(), ": cannot read: ", n == 0 ? "file shrank" : errno_text());
    done += static_cast<size_t>(n);
  }
  return text;
}

void check_destination(const fs::path& path, uint64_t n_bytes) {
  std::error_code ec;
  const fs::file_status old = fs::status(path, ec);
  if (fs::is_directory(old)) fail(ErrorKind::io, path.string(), ": is a folder, not a file to write");
  // The rename would replace a device such as /dev/null by a file.
  if (fs::exists(old) && !fs::is_regular_file(old)) fail(ErrorKind::io, path.string(), ": is not a regular file");
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  struct statvfs disk {};
  if (::statvfs(folder.c_str(), &disk) != 0)
    fail(ErrorKind::io, folder.string(), ": cannot write there: ", errno_text());
  const uint64_t free_bytes = uint64_t{disk.f_bavail} * disk.f_frsize;
  if (n_bytes > free_bytes)
    fail(ErrorKind::io, path.string(), ": needs ", format_size(n_bytes), ", the disk has ", format_size(free_bytes),
         " free; make room or choose another folder");
}

void write_all(int fd, std::span<const std::byte> bytes, const fs::path& path, uint64_t done) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(ErrorKind::io, path.string(), ": write failed after ", format_size(done), ": ", errno_text());
    bytes = bytes.subspan(static_cast<size_t>(n));
    done += static_cast<uint64_t>(n);
  }
}

OutputFile::OutputFile(fs::path path, uint64_t expected_bytes) : path_(std::move(path)) {
  check_destination(path_, expected_bytes);
  temp_ = path_;
  temp_ += concat(".tmp", ::getpid());
  fd_ = ::open(temp_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) fail(ErrorKind::io, path_.string(), ": cannot write: ", errno_text());
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temp_.empty()) ::unlink(temp_.c_str());
}

void OutputFile::write(std::span<const std::byte> bytes) {
  write_all(fd_, bytes, path_, size_);
  size_ += bytes.size();
}

void OutputFile::write(std::string_view text) {
  write(std::as_bytes(std::span(text.data(), text.size())));
}

void OutputFile::commit() {
  const int fd = std::exchange(fd_, -1);
  const bool synced = ::fsync(fd) == 0;
  if (::close(fd) != 0 || !synced)
    fail(ErrorKind::io, path_.string(), ": cannot complete the file: ", errno_text());
  if (::rename(temp_.c_str(), path_.c_str()) != 0)
    fail(ErrorKind::io, path_.string(), ": cannot rename into place: ", errno_text());
  temp_.clear();
}

}  // namespace duet
