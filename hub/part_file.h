// A file that is being downloaded: FILE.part with what has arrived, FILE.part.json with what of it counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/file_descriptor.h"

namespace duet::hub {

struct Journal {
  std::string url, etag, sha256;  // etag: or the date of the last change; sha256: 64 digits; each may be empty
  uint64_t size = 0, chunk_bytes = 0;
  std::vector<uint64_t> done;  // bytes of each chunk that have arrived, from its beginning on

  uint64_t chunk_size(size_t chunk) const;
  uint64_t total_done() const;
  bool complete() const { return total_done() == size; }
};
// `size` > 0.
Journal new_journal(uint64_t size, uint64_t chunk_bytes);

// The parts of a download that stay on disk. One process at a time: Error(io) when another one holds it.
class PartFile {
 public:
  // Creates folders. `destination` is where finish() puts the file.
  explicit PartFile(std::filesystem::path destination);

  // Of an earlier attempt; nothing when there is none or it cannot be trusted.
  std::optional<Journal> journal() const;
  // Reserves the disk space of `size` bytes. Error(io) with the figures when there is too little.
  void reserve(uint64_t size);
  void write(uint64_t offset, std::span<const std::byte> bytes);
  std::string head(size_t n_bytes) const;  // fewer where it is shorter
  void save(const Journal& journal);  // what it says has arrived is on disk then
  void restart();                     // forgets all that has arrived
  void discard();                     // removes both files
  void finish();                      // the complete file under its name
  const std::filesystem::path& path() const { return part_; }

 private:
  std::filesystem::path destination_, part_, journal_;
  FileDescriptor file_;
};

// What duet pull has begun at `destination` and not finished: bytes that have arrived, and in all.
struct Partial {
  uint64_t done = 0, size = 0;
};
std::optional<Partial> partial_download(const std::filesystem::path& destination);

}  // namespace duet::hub
