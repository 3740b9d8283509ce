// Short measurements of the machine, for doctor.
#pragma once

#include <cstdint>
#include <filesystem>

namespace duet::cli {

struct DiskRate {
  double bytes_per_second = 0;
  uint64_t n_bytes = 0;  // read
  bool direct = false;   // past the page cache; otherwise the figure may be that of memory
};

// Sequential read rate of a file (at most its first 512 MiB, at most about a second), or, for a
// folder, of a 256 MiB temporary file written there first. Error(io).
DiskRate measure_disk(const std::filesystem::path& path);

// Bytes per second that n_threads read from memory together, over a buffer that no cache holds.
// Takes about 0.3 s and n_bytes of memory.
double measure_memory(int n_threads, uint64_t n_bytes);

}  // namespace duet::cli
