// Files: read-only mappings, whole small files, and output that appears only when complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/file_descriptor.h"

namespace duet {

// For reading. Error(io) when it is missing, unreadable, or not a regular file.
FileDescriptor open_regular(const std::filesystem::path& path, uint64_t* size = nullptr);

// Which file it is and in which state, to notice that a path leads to another or changed one.
struct FileIdentity {
  uint64_t device = 0, inode = 0, size = 0;
  int64_t modified_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};
std::string identity_line(const std::filesystem::path& path, const FileIdentity& identity);  // name, size and date
// Of an open file; nothing when the system does not tell.
std::optional<FileIdentity> identify(int descriptor);

// Tells the kernel that what it has of this file in its page cache will not be read again soon. Best
// effort; pages that are mapped stay.
void drop_from_cache(const std::filesystem::path& path);

// A read-only shared mapping of a whole regular file. Move-only; views die with it.
// A file truncated by somebody else while mapped still raises SIGBUS on access.
class MappedFile {
 public:
  // Throws Error(io) when the file is missing, unreadable, or not a regular file. An empty file
  // maps to an empty span.
  static MappedFile open(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }
  const FileIdentity& identity() const { return identity_; }  // when it was mapped

  // Tells the kernel that these bytes are read next. It then reads them alone: without, it reads as much around them as
  // its read-ahead takes, half of that before them.
  void fetch(std::span<const std::byte> part) const;
  // Tells the kernel that these bytes will not be read again soon (drops clean pages of this
  // mapping; cached: and those of the page cache). Best effort; nothing happens when `part` is not of this mapping.
  void drop(std::span<const std::byte> part, bool cached = false) const;

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  FileIdentity identity_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Reads a whole file of at most max_bytes; Error(io) when missing, Error(format) when larger.
std::string read_file(const std::filesystem::path& path, uint64_t max_bytes);

// Error(io) when a file cannot come to be there: a folder or a device is, the folder does not exist, or its
// disk has less than n_bytes free (naming both figures; 0: unknown).
void check_destination(const std::filesystem::path& path, uint64_t n_bytes);

// All of the bytes. Error(io) naming the path and how much had been written: `done` before this call.
void write_all(int fd, std::span<const std::byte> bytes, const std::filesystem::path& path, uint64_t done);

// Writes `path` by way of a temporary file in the same folder and a rename, so that a reader sees
// the old file or the complete new one. Without commit() nothing is left behind.
class OutputFile {
 public:
  // Checks first that the folder is writable and has room for expected_bytes (0: unknown).
  // Throws Error(io) naming the bytes needed and free.
  OutputFile(std::filesystem::path path, uint64_t expected_bytes);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  void write(std::span<const std::byte> bytes);  // appends; Error(io) on a short write
  void write(std::string_view text);
  uint64_t size() const { return size_; }
  void commit();  // fsync + rename

 private:
  std::filesystem::path path_, temp_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

}  // namespace duet
