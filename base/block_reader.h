// Reads of large pieces of files into memory, many at once, in order of urgency: what streams
// weights from disk. Direct (O_DIRECT) where the file system allows it, so that nothing is held
// twice and the memory used is the memory asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/mapped_file.h"

namespace duet {

// Reads are direct where one real aligned read of each file succeeds, else through the page cache,
// whose pages are dropped after each read.
// automatic: io_uring where the system allows it and a file can be read directly, else pread.
// io_uring: Error(unsupported) where the system or the build has none.
// pread: a pool of `depth` threads. buffered: as pread, always through the page cache.
enum class ReadBackend { automatic, io_uring, pread, buffered };

// Served in this order; first come, first served within a class.
enum class ReadClass : uint8_t {
  demand,       // a computation waits for it
  ahead,        // needed next, certainly or probably
  speculative,  // perhaps needed later
};

// `offset`, `n_bytes` and `to` are multiples of kReadAlignment. The file must hold at least
// n_needed of the bytes; the rest of the range (up to n_bytes) is padding, which may lie beyond the
// end of the file and whose content is unspecified afterwards.
struct ReadRange {
  size_t file = 0;  // index into the files given to open()
  uint64_t offset = 0;
  size_t n_bytes = 0, n_needed = 0;
  std::byte* to = nullptr;
  uint64_t tag = 0;  // the caller's; comes back with the completion
};

inline constexpr size_t kReadAlignment = 4096;
// What a disk was found to want (docs/measurements.md): large reads, few at once. More under way only
// lengthens each one's wait.
inline constexpr size_t kReadBytes = size_t{1} << 20;
inline constexpr unsigned kReadDepth = 4;

// Called once per range, from a thread of the reader (from cancel() or the destructor for what they
// cancel), and must not throw or call the reader. error: 0, an errno (EIO, ENODATA: the file ends
// before n_needed bytes, ...), ECANCELED.
using ReadDone = std::function<void(uint64_t tag, int error)>;

// For tests: called before each attempt to read (1, 2, ... over all threads, one call at a time),
// with the bytes left of its range. Returns 0 to go on, an errno to fail this attempt with it
// (EAGAIN and EINTR are tried again; EINVAL of a direct read makes the reader go on through the
// page cache), or a negative number -n to let the attempt deliver n bytes only. While opening it is
// called as attempt 0: with 0 bytes before an io_uring is made, with kReadAlignment before the
// trial of direct reads of each file; an errno there means refused.
using ReadFault = std::function<int(uint64_t attempt, size_t n_bytes)>;

struct BlockReaderOptions {
  ReadBackend backend = ReadBackend::automatic;
  unsigned depth = kReadDepth;  // reads under way at once, 1 to 256
  // What the files were when their content was looked at; empty: whatever they are now.
  std::vector<FileIdentity> expected = {};
  ReadFault fault = {};
};

struct BlockReaderStats {
  uint64_t bytes = 0;      // read from the files, padding included
  uint64_t reads = 0;      // ranges that ended without error
  uint64_t busy_ns = 0;    // time with at least one read under way
  uint64_t fallbacks = 0;  // ranges whose direct reads had to go on through the page cache
};

class BlockReader {
 public:
  // Error: io (a file is missing, cannot be read or is another than expected), unsupported (see ReadBackend), usage (depth),
  // memory.
  static std::unique_ptr<BlockReader> open(std::span<const std::filesystem::path> files,
                                           ReadDone done, BlockReaderOptions options = {});
  virtual ~BlockReader() = default;  // cancels what waits, waits for what is under way

  // Queues ranges in this order. Any thread.
  virtual void submit(std::span<const ReadRange> ranges, ReadClass urgency) = 0;
  // Queued ranges with tags first_tag, ... first_tag + n_tags - 1 that have not begun end with ECANCELED
  // before this returns; those under way go on. Returns how many were dropped.
  virtual size_t cancel(uint64_t first_tag, uint64_t n_tags) = 0;
  // Queued ranges with tags first_tag, ... first_tag + n_tags - 1 become more urgent, in their order
  // behind what this class holds already; those that are as urgent or have begun stay.
  virtual void promote(uint64_t first_tag, uint64_t n_tags, ReadClass urgency) = 0;

  // The first file that has been written to since it was opened, or nothing. A file whose path leads
  // to another one by now is read on as it was.
  virtual std::optional<size_t> changed_file() const = 0;

  virtual BlockReaderStats stats() const = 0;
  virtual bool direct() const = 0;  // every file
  // "io_uring, direct", "pread, direct", "pread, buffered"
  virtual std::string name() const = 0;
};

}  // namespace duet
