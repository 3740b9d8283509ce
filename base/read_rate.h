// How fast BlockReader reads a file: what streaming from it may hope for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/block_reader.h"

namespace duet {

struct ReadRateOptions {
  ReadBackend backend = ReadBackend::automatic;
  size_t block_bytes = kReadBytes;  // a multiple of kReadAlignment
  unsigned depth = kReadDepth;
  // Blocks read in a row before going on elsewhere: 1 random, SIZE_MAX sequential; the default is
  // about a matrix of an expert.
  size_t blocks_in_a_row = 32;
  double seconds = 0.4;
  // Memory of large pages where the system has any: a read into small ones is many pieces for the
  // disk, which made it half as fast on a virtual machine.
  bool large_pages = true;
};

struct ReadRate {
  double bytes_per_second = 0;
  uint64_t n_bytes = 0, n_reads = 0;  // counted
  bool direct = false;  // past the page cache; otherwise the figure may be that of memory
  std::string reader;   // BlockReader::name()
  std::vector<double> latencies = {};  // seconds under way of each read counted, ascending
};

// Reads all over the file (again and again if it is small) for about so many seconds, after asking
// for the file's pages to be dropped if they will be read through the page cache. Takes 2 * depth *
// block_bytes of memory. Error: io (an empty file, too), and those of BlockReader::open.
ReadRate measure_read_rate(const std::filesystem::path& file, const ReadRateOptions& options = {});

}  // namespace duet
