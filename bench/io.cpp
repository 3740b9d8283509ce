// Read rate of a disk through the engine's own reader:
//   bench_io FILE [--backend automatic|io_uring|pread|buffered] [--block 1MiB] [--depth 8]
//            [--random|--sequential|--matrices] [--seconds 3] [--small-pages]
//            [--sweep]
//
// Default: blocks in runs of 32 MiB at random places, as experts are read (--matrices). --sweep
// measures block sizes from 256 KiB to 4 MiB at depths from 1 to 32. --small-pages reads into 4 KiB
// pages, as fio does: with it, --random and --sequential compare with fio at the same block size,
// depth, engine and O_DIRECT.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>

#include "base/error.h"
#include "base/read_rate.h"
#include "base/units.h"

namespace {

using namespace duet;

constexpr size_t kMatrixBytes = size_t{32} << 20;
constexpr const char* kBackends[] = {"automatic", "io_uring", "pread",
                                     "buffered"};  // as in ReadBackend

enum class Pattern { matrices, random, sequential };

struct Options {
  std::string file;
  ReadRateOptions read;
  Pattern pattern = Pattern::matrices;
  bool sweep = false;
};

ReadBackend parse_backend(const std::string& name) {
  for (size_t i = 0; i < std::size(kBackends); ++i)
    if (name == kBackends[i]) return static_cast<ReadBackend>(i);
  fail(ErrorKind::usage, "--backend: automatic, io_uring, pread or buffered, not ", name);
}

Options parse(int argc, char** argv) {
  Options o;
  o.read.seconds = 3;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (++i == argc) fail(ErrorKind::usage, name, " wants a value");
      return argv[i];
    };
    if (name == "--backend")
      o.read.backend = parse_backend(value());
    else if (name == "--block")
      o.read.block_bytes = parse_size(value());
    else if (name == "--depth")
      o.read.depth = static_cast<unsigned>(std::stoul(value()));
    else if (name == "--seconds")
      o.read.seconds = std::stod(value());
    else if (name == "--random")
      o.pattern = Pattern::random;
    else if (name == "--sequential")
      o.pattern = Pattern::sequential;
    else if (name == "--matrices")
      o.pattern = Pattern::matrices;
    else if (name == "--small-pages")
      o.read.large_pages = false;
    else if (name == "--sweep")
      o.sweep = true;
    else if (!name.starts_with("-") && o.file.empty())
      o.file = name;
    else
      fail(ErrorKind::usage, "unknown argument ", name);
  }
  if (o.file.empty())
    fail(ErrorKind::usage, "bench_io FILE [--block 1MiB] [--depth 8] [--sweep] ...: which file?");
  if (o.read.block_bytes == 0 || o.read.block_bytes % kReadAlignment != 0)
    fail(ErrorKind::usage, "--block: a multiple of ", kReadAlignment, " bytes");
  return o;
}

void measure(const Options& o, size_t block_bytes, unsigned depth) {
  ReadRateOptions read = o.read;
  read.block_bytes = block_bytes;
  read.depth = depth;
  read.blocks_in_a_row = o.pattern == Pattern::random ? 1
                         : o.pattern == Pattern::sequential
                             ? SIZE_MAX
                             : std::max<size_t>(1, kMatrixBytes / block_bytes);
  const ReadRate rate = measure_read_rate(o.file, read);
  const auto percentile = [&](size_t p) {
    return rate.latencies.empty() ? 0 : 1e3 * rate.latencies[(rate.latencies.size() - 1) * p / 100];
  };
  std::printf("%-18s %10s %6u %8.3f %10.0f %10.2f %10.2f\n", rate.reader.c_str(),
              format_size(block_bytes).c_str(), depth, rate.bytes_per_second / 1e9,
              rate.bytes_per_second / static_cast<double>(block_bytes), percentile(50),
              percentile(99));
  std::fflush(stdout);
}

void run(const Options& o) {
  std::printf("%-18s %10s %6s %8s %10s %10s %10s\n", "reader", "block", "depth", "GB/s", "reads/s",
              "p50 ms", "p99 ms");
  if (!o.sweep) return measure(o, o.read.block_bytes, o.read.depth);
  for (size_t kib = 256; kib <= 4096; kib *= 2)
    for (unsigned depth = 1; depth <= 32; depth *= 2) measure(o, kib << 10, depth);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
