#include "base/read_rate.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>

#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;

TEST_CASE("read_rate: counts what was read, of files smaller than a block, too") {
  const TempFolder folder;
  for (const size_t size : {size_t{100}, size_t{5000}, size_t{3} << 20}) {
    CAPTURE(size);
    write_text(folder / "file", std::string(size, 'x'));
    for (const ReadBackend backend :
         {ReadBackend::automatic, ReadBackend::pread, ReadBackend::buffered}) {
      const ReadRate rate = measure_read_rate(
          folder / "file",
          {.backend = backend, .block_bytes = 64 << 10, .depth = 3, .seconds = 0.02});
      CHECK(rate.n_reads >= 2);
      CHECK(rate.n_bytes == rate.n_reads * std::min(size, size_t{64} << 10));
      CHECK(rate.bytes_per_second > 0);
      CHECK(rate.latencies.size() == rate.n_reads);
      CHECK(std::is_sorted(rate.latencies.begin(), rate.latencies.end()));
      CHECK(rate.latencies.front() > 0);
      CHECK(rate.latencies.back() < 10);
      CHECK(rate.reader.ends_with(rate.direct ? "direct" : "buffered"));
    }
  }
}

TEST_CASE("read_rate: a file that is missing or empty has none") {
  const TempFolder folder;
  write_text(folder / "empty", "");
  check_thrown(thrown_by([&] { measure_read_rate(folder / "missing"); }), ErrorKind::io, "missing");
  check_thrown(thrown_by([&] { measure_read_rate(folder / "empty"); }), ErrorKind::io,
               "empty file");
}
