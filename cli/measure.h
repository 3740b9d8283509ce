// Short measurements of the machine, for doctor.
#pragma once

#include <cstdint>
#include <filesystem>

#include "base/read_rate.h"

namespace duet::cli {

// Read rate of a file, measured for about half a second as streaming would read it, or, for a
// folder, of a 256 MiB temporary file written there first. Error(io).
ReadRate measure_disk(const std::filesystem::path& path);

// Bytes per second that n_threads read from memory together, over a buffer that no cache holds.
// Takes about 0.3 s and n_bytes of memory.
double measure_memory(int n_threads, uint64_t n_bytes);

}  // namespace duet::cli
