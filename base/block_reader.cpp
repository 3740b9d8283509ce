#include "base/block_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/block_reader_core.h"
#include "base/error.h"

namespace duet {
namespace {

using detail::SourceFile;
namespace fs = std::filesystem;

constexpr unsigned kMaxDepth = 256;

// O_NONBLOCK: opening a pipe must not wait for its writer. No effect on regular files.
FileDescriptor open_file(const fs::path& path, int flags) {
  return FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags));
}

// Accepted at open proves nothing: only a read shows whether the file system can.
bool reads_directly(const FileDescriptor& fd, const ReadFault& fault) {
  alignas(kReadAlignment) std::byte block[kReadAlignment];
  if (!fd.is_open() || (fault && fault(0, sizeof(block)) > 0)) return false;
  ssize_t n = 0;
  do n = ::pread(fd.get(), block, sizeof(block), 0);
  while (n < 0 && errno == EINTR);
  return n >= 0;
}

SourceFile open_source(const fs::path& path, bool direct, const FileIdentity* expected, const ReadFault& fault) {
  SourceFile file;
  file.cached = open_file(path, 0);
  if (!file.cached.is_open())
    fail(ErrorKind::io, path.string(), ": cannot open: ", std::strerror(errno));
  struct stat info {};
  if (::fstat(file.cached.get(), &info) != 0 || !(S_ISREG(info.st_mode) || S_ISBLK(info.st_mode)))
    fail(ErrorKind::io, path.string(), ": not a file that can be read in blocks");
  file.identity = identify(file.cached.get()).value_or(FileIdentity{});
  if (expected != nullptr && file.identity != *expected)
    fail(ErrorKind::io, path.string(), ": the file has been changed or replaced since it was opened; try again");
  // Read what is asked for and no further: what is read ahead would be dropped, or worse, kept.
  static_cast<void>(::posix_fadvise(file.cached.get(), 0, 0, POSIX_FADV_RANDOM));
  if (!direct) return file;
  file.direct = open_file(path, O_DIRECT);
  if (file.direct.is_open() && identify(file.direct.get()) != file.identity)
    fail(ErrorKind::io, path.string(), ": the file is being replaced; try again");
  if (!reads_directly(file.direct, fault)) file.direct = FileDescriptor();
  return file;
}

}  // namespace

std::unique_ptr<BlockReader> BlockReader::open(std::span<const fs::path> files, ReadDone done,
                                               BlockReaderOptions options) {
  if (options.depth == 0 || options.depth > kMaxDepth)
    fail(ErrorKind::usage, "reads under way at once: 1 to ", kMaxDepth, ", not ", options.depth);
  const ReadBackend backend = options.backend;
  detail::ReaderSetup setup;
  DUET_ASSERT(options.expected.empty() || options.expected.size() == files.size());
  for (size_t i = 0; i < files.size(); ++i)
    setup.files.push_back(open_source(files[i], backend != ReadBackend::buffered,
                                      options.expected.empty() ? nullptr : &options.expected[i], options.fault));
  setup.done = std::move(done);
  setup.options = std::move(options);
  const bool direct = std::any_of(setup.files.begin(), setup.files.end(),
                                  [](const SourceFile& f) { return f.direct.is_open(); });
  // One thread would copy all from the page cache; a pool does it side by side.
  if (backend == ReadBackend::io_uring || (backend == ReadBackend::automatic && direct)) {
    std::string refusal;
    if (auto reader = detail::make_uring_reader(setup, refusal)) return reader;
    if (backend == ReadBackend::io_uring)
      fail(ErrorKind::unsupported, "no io_uring: ", refusal, "; read with pread instead");
  }
  return detail::make_pread_reader(std::move(setup));
}

}  // namespace duet
