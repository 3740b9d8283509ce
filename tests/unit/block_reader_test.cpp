// Every back end of BlockReader: content, order, cancelling, and each fault that a disk or a file
// system can answer with.
#include "base/block_reader.h"

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "tests/support/close.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/skip.h"

using namespace duet;
using namespace duet::test;

namespace {

namespace fs = std::filesystem;
constexpr size_t kPage = kReadAlignment;

// Memory at page alignment, filled with a byte that tells what was never written.
class Pages {
 public:
  explicit Pages(size_t n)
      : size_(n), data_(static_cast<std::byte*>(std::aligned_alloc(kPage, n))) {
    REQUIRE(data_ != nullptr);
    std::memset(data_, 0xEE, n);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { std::free(data_); }
  std::byte* at(size_t offset) const { return data_ + offset; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::byte* data_;
};

// Collects completions.
class Sink {
 public:
  ReadDone done() {
    return [this](uint64_t tag, int error) {
      const std::lock_guard lock(mutex_);
      order_.push_back(tag);
      errors_[tag] = error;
      changed_.notify_all();
    };
  }
  // False after ten seconds.
  bool wait(size_t n) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return order_.size() >= n; });
  }
  std::vector<uint64_t> order() {
    const std::lock_guard lock(mutex_);
    return order_;
  }
  int error(uint64_t tag) {
    const std::lock_guard lock(mutex_);
    const auto found = errors_.find(tag);
    return found == errors_.end() ? -1 : found->second;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint64_t> order_;
  std::map<uint64_t, int> errors_;
};

// As a fault: holds the first attempt to read until it is opened, so that what is queued meanwhile
// has not begun (at a depth of 1).
class Gate {
 public:
  ReadFault fault() {
    return [this](uint64_t attempt, size_t) {
      if (attempt != 1) return 0;
      std::unique_lock lock(mutex_);
      reached_ = true;
      changed_.notify_all();
      changed_.wait(lock, [&] { return open_; });
      return 0;
    };
  }
  void wait_reached() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return reached_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false, open_ = false;
};

bool has_uring() {
  const TempFolder folder;
  write_text(folder / "probe", "x");
  const fs::path path = folder / "probe";
  return !thrown_by([&] {
            BlockReader::open({&path, 1}, [](uint64_t, int) {}, {.backend = ReadBackend::io_uring});
          }).kind;
}

std::vector<ReadBackend> backends() {
  std::vector<ReadBackend> all = {ReadBackend::pread, ReadBackend::buffered,
                                  ReadBackend::automatic};
  if (has_uring()) all.push_back(ReadBackend::io_uring);
  return all;
}

const char* label(ReadBackend backend) {
  constexpr const char* kNames[] = {"automatic", "io_uring", "pread", "buffered"};
  return kNames[static_cast<size_t>(backend)];
}

// A file of random bytes and the same bytes here.
struct Sample {
  fs::path path;
  std::vector<std::byte> bytes;
  Sample(const fs::path& p, size_t n, uint64_t seed = 1) : path(p), bytes(n) {
    Rng(seed).fill(bytes);
    write_bytes(path, bytes);
  }
  // The pages [first, first + n) of the file as a range; what the file lacks of them is padding.
  ReadRange range(size_t first, size_t n, std::byte* to, uint64_t tag) const {
    const size_t offset = first * kPage;
    return {.file = 0,
            .offset = offset,
            .n_bytes = n * kPage,
            .n_needed = std::min(n * kPage, bytes.size() - offset),
            .to = to,
            .tag = tag};
  }
  bool holds(const ReadRange& r) const {
    return std::memcmp(r.to, bytes.data() + r.offset, r.n_needed) == 0;
  }
};

std::unique_ptr<BlockReader> open_one(const Sample& sample, Sink& sink,
                                      BlockReaderOptions options) {
  return BlockReader::open({&sample.path, 1}, sink.done(), std::move(options));
}

// One range of the whole file (up to 64 pages), read with a fault, by each back end.
struct Outcome {
  int error = -1;
  bool equal = false, direct = false;
  std::string name;
  BlockReaderStats stats;
};
Outcome read_whole(const Sample& sample, ReadBackend backend, const ReadFault& fault) {
  Sink sink;
  const Pages pages(64 * kPage);
  const auto reader = open_one(sample, sink, {.backend = backend, .depth = 2, .fault = fault});
  const ReadRange range =
      sample.range(0, (sample.bytes.size() + kPage - 1) / kPage, pages.at(0), 5);
  reader->submit({&range, 1}, ReadClass::demand);
  REQUIRE(sink.wait(1));
  return {sink.error(5), sample.holds(range), reader->direct(), reader->name(), reader->stats()};
}

}  // namespace

TEST_CASE("block_reader: every back end reads files of any size, last block included") {
  const TempFolder folder;
  for (const size_t size : {size_t{1}, kPage - 1, kPage, kPage + 1, 7 * kPage + 123, 64 * kPage}) {
    const Sample sample(folder / "file", size, size);
    for (const ReadBackend backend : backends()) {
      CAPTURE(size);
      CAPTURE(label(backend));
      const Outcome got = read_whole(sample, backend, {});
      CHECK(got.error == 0);
      CHECK(got.equal);
      CHECK(got.stats.reads == 1);
      CHECK(got.stats.bytes == size);
      CHECK(got.stats.busy_ns > 0);
      CHECK(got.stats.fallbacks == 0);
    }
  }
}

TEST_CASE("block_reader: many ranges of several files, depths 1 to 32") {
  const TempFolder folder;
  std::vector<Sample> samples;
  for (size_t i = 0; i < 3; ++i)
    samples.emplace_back(folder / concat("file", i), (200 + 31 * i) * kPage + 77 * i, i);
  const std::vector<fs::path> paths = {samples[0].path, samples[1].path, samples[2].path};
  for (const ReadBackend backend : backends())
    for (const unsigned depth : {1u, 3u, 32u}) {
      CAPTURE(label(backend));
      CAPTURE(depth);
      Sink sink;
      const Pages pages(1000 * kPage);
      std::vector<ReadRange> ranges;
      Rng rng(depth);
      for (size_t page = 0; page + 8 < 1000;) {
        const size_t file = rng.below(3), n = 1 + rng.below(8);
        ReadRange r = samples[file].range(rng.below(200), n, pages.at(page * kPage), ranges.size());
        r.file = file;
        ranges.push_back(r);
        page += n;
      }
      const auto reader =
          BlockReader::open(paths, sink.done(), {.backend = backend, .depth = depth});
      for (size_t i = 0; i < ranges.size(); i += 5)
        reader->submit(std::span(ranges).subspan(i, std::min<size_t>(5, ranges.size() - i)),
                       static_cast<ReadClass>(i % 3));
      REQUIRE(sink.wait(ranges.size()));
      size_t n_wrong = 0;
      for (const ReadRange& r : ranges)
        n_wrong += sink.error(r.tag) != 0 || !samples[r.file].holds(r);
      CHECK(n_wrong == 0);
      CHECK(reader->stats().reads == ranges.size());
    }
}

TEST_CASE("block_reader: demand before ahead before speculative, each in its order") {
  const TempFolder folder;
  const Sample sample(folder / "file", 32 * kPage);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    Sink sink;
    Gate gate;
    const Pages pages(32 * kPage);
    const auto reader =
        open_one(sample, sink, {.backend = backend, .depth = 1, .fault = gate.fault()});
    const auto submit = [&](uint64_t tag, ReadClass urgency) {
      const ReadRange r = sample.range(tag, 1, pages.at(tag * kPage), tag);
      reader->submit({&r, 1}, urgency);
    };
    submit(0, ReadClass::speculative);
    gate.wait_reached();
    submit(1, ReadClass::speculative);
    submit(2, ReadClass::ahead);
    submit(3, ReadClass::demand);
    submit(4, ReadClass::speculative);
    submit(5, ReadClass::demand);
    submit(6, ReadClass::ahead);
    submit(6, ReadClass::speculative);
    reader->promote(4, 1, ReadClass::ahead);
    reader->promote(6, 1, ReadClass::demand);
    reader->promote(5, 1, ReadClass::speculative);  // never less urgent
    reader->promote(0, 1, ReadClass::demand);       // has begun
    reader->promote(99, 1, ReadClass::demand);      // nobody
    gate.open();
    REQUIRE(sink.wait(8));
    CHECK(sink.order() == std::vector<uint64_t>{0, 3, 5, 6, 6, 2, 4, 1});
  }
}

TEST_CASE("block_reader: cancel drops what has not begun of a range of tags") {
  const TempFolder folder;
  const Sample sample(folder / "file", 32 * kPage);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    Sink sink;
    Gate gate;
    const Pages pages(32 * kPage);
    std::vector<ReadRange> ranges;
    for (size_t i = 0; i < 8; ++i) ranges.push_back(sample.range(i, 1, pages.at(i * kPage), i));
    const auto reader =
        open_one(sample, sink, {.backend = backend, .depth = 1, .fault = gate.fault()});
    reader->submit({&ranges[0], 1}, ReadClass::speculative);
    gate.wait_reached();
    reader->submit({&ranges[1], 4}, ReadClass::speculative);
    reader->submit({&ranges[5], 3}, ReadClass::demand);
    CHECK(reader->cancel(0, 5) == 4);  // the first has begun
    CHECK(reader->cancel(0, 5) == 0);
    CHECK(sink.order() == std::vector<uint64_t>{1, 2, 3, 4});  // before cancel returned
    gate.open();
    REQUIRE(sink.wait(8));
    for (uint64_t tag = 0; tag < 8; ++tag)
      CHECK(sink.error(tag) == (tag >= 1 && tag <= 4 ? ECANCELED : 0));
    CHECK(*pages.at(2 * kPage) == std::byte{0xEE});
    CHECK(sample.holds(ranges[0]));
    CHECK(reader->stats().reads == 4);
  }
}

TEST_CASE("block_reader: an I/O error ends its range only, once") {
  const TempFolder folder;
  const Sample sample(folder / "file", 8 * kPage);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    Sink sink;
    const Pages pages(8 * kPage);
    const auto reader =
        open_one(sample, sink, {.backend = backend, .depth = 1, .fault = [](uint64_t n, size_t) {
                                  return n == 2 ? EIO : 0;
                                }});
    std::vector<ReadRange> ranges;
    for (size_t i = 0; i < 4; ++i)
      ranges.push_back(sample.range(2 * i, 2, pages.at(2 * i * kPage), i));
    reader->submit(ranges, ReadClass::demand);
    REQUIRE(sink.wait(4));
    for (uint64_t tag = 0; tag < 4; ++tag) CHECK(sink.error(tag) == (tag == 1 ? EIO : 0));
    CHECK(sink.order() == std::vector<uint64_t>{0, 1, 2, 3});
    CHECK(reader->stats().reads == 3);
  }
}

TEST_CASE("block_reader: short reads go on where they stopped, at any byte") {
  const TempFolder folder;
  const Sample sample(folder / "file", 9 * kPage + 5);
  for (const ReadBackend backend : backends())
    for (const int n : {1000, 4096, 8192, 100000}) {
      CAPTURE(label(backend));
      CAPTURE(n);
      const Outcome got = read_whole(sample, backend, [n](uint64_t, size_t) { return -n; });
      CHECK(got.error == 0);
      CHECK(got.equal);
      CHECK(got.stats.bytes == sample.bytes.size());
      // A direct read cannot begin in the middle of a page.
      CHECK(got.stats.fallbacks == (got.direct && n % 4096 != 0 && n < 40000 ? 1 : 0));
    }
}

TEST_CASE("block_reader: EAGAIN and EINTR are tried again, for a while") {
  const TempFolder folder;
  const Sample sample(folder / "file", 3 * kPage);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    const Outcome some = read_whole(sample, backend, [](uint64_t n, size_t) {
      return n == 0 ? 0 : n < 4 ? EAGAIN : n < 20 ? EINTR : 0;
    });
    CHECK(some.error == 0);
    CHECK(some.equal);
    const Outcome always =
        read_whole(sample, backend, [](uint64_t n, size_t) { return n == 0 ? 0 : EINTR; });
    CHECK(always.error == EINTR);
  }
}

TEST_CASE("block_reader: a direct read refused with EINVAL goes on through the page cache") {
  const TempFolder folder;
  const Sample sample(folder / "file", 5 * kPage + 1);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    const Outcome got =
        read_whole(sample, backend, [](uint64_t n, size_t) { return n == 1 ? EINVAL : 0; });
    CHECK(got.error == (got.direct ? 0 : EINVAL));
    CHECK(got.stats.fallbacks == (got.direct ? 1 : 0));
    if (got.direct) CHECK(got.equal);
  }
}

TEST_CASE("block_reader: direct reads refused at the trial") {
  const TempFolder folder;
  const Sample sample(folder / "file", 5 * kPage + 1);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    const Outcome got = read_whole(
        sample, backend, [](uint64_t n, size_t bytes) { return n == 0 && bytes > 0 ? EINVAL : 0; });
    CHECK_FALSE(got.direct);
    if (backend == ReadBackend::automatic) CHECK(got.name == "pread, buffered");
    CHECK(got.error == 0);
    CHECK(got.equal);
    CHECK(got.stats.fallbacks == 0);
  }
}

TEST_CASE("block_reader: io_uring refused: automatic reads with pread, asking for it is an error") {
  const TempFolder folder;
  const Sample sample(folder / "file", 5 * kPage + 1);
  Sink sink;
  const ReadFault refused = [](uint64_t n, size_t bytes) {
    return n == 0 && bytes == 0 ? EPERM : 0;
  };
  CHECK(open_one(sample, sink, {.fault = refused})->name().starts_with("pread, "));
  const Outcome got = read_whole(sample, ReadBackend::automatic, refused);
  CHECK(got.error == 0);
  CHECK(got.equal);
  const Thrown thrown = thrown_by(
      [&] { open_one(sample, sink, {.backend = ReadBackend::io_uring, .fault = refused}); });
  check_thrown(thrown, ErrorKind::unsupported, "io_uring");
}

TEST_CASE("block_reader: io_uring reads directly and says so") {
  if (!has_uring()) DUET_SKIP("no io_uring here");
  const TempFolder folder;
  const Sample sample(folder / "file", 5 * kPage + 1);
  Sink sink;
  const auto reader = open_one(sample, sink, {.backend = ReadBackend::io_uring});
  CHECK(reader->name() == (reader->direct() ? "io_uring, direct" : "io_uring, buffered"));
}

TEST_CASE("block_reader: names say what is used") {
  const TempFolder folder;
  const Sample sample(folder / "file", kPage);
  Sink sink;
  CHECK(open_one(sample, sink, {.backend = ReadBackend::buffered})->name() == "pread, buffered");
  const auto reader = open_one(sample, sink, {.backend = ReadBackend::pread});
  CHECK(reader->name() == (reader->direct() ? "pread, direct" : "pread, buffered"));
}

TEST_CASE("block_reader: a file cut short while open is an error, not garbage") {
  const TempFolder folder;
  for (const ReadBackend backend : backends())
    for (const size_t left : {size_t{0}, 4 * kPage, 4 * kPage + 100}) {
      CAPTURE(label(backend));
      CAPTURE(left);
      const Sample sample(folder / concat(label(backend), left), 16 * kPage);
      Sink sink;
      const Pages pages(16 * kPage);
      const auto reader = open_one(sample, sink, {.backend = backend});
      REQUIRE(::truncate(sample.path.c_str(), static_cast<off_t>(left)) == 0);
      const ReadRange ranges[] = {sample.range(0, 4, pages.at(0), 0),
                                  sample.range(4, 4, pages.at(4 * kPage), 1),
                                  sample.range(12, 4, pages.at(12 * kPage), 2)};
      reader->submit(ranges, ReadClass::demand);
      REQUIRE(sink.wait(3));
      CHECK(sink.error(0) == (left == 0 ? ENODATA : 0));
      CHECK(sink.error(1) == ENODATA);
      CHECK(sink.error(2) == ENODATA);
      CHECK(sink.order().size() == 3);
    }
}

TEST_CASE("block_reader: a file system without direct reads") {
  const fs::path shm = "/dev/shm";
  if (!fs::is_directory(shm) || ::access(shm.c_str(), W_OK) != 0)
    DUET_SKIP("no /dev/shm to write to");
  const Sample sample(shm / concat("duet-test-", ::getpid()), 9 * kPage + 5);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    const Outcome got = read_whole(sample, backend, {});
    CHECK(got.error == 0);
    CHECK(got.equal);
  }
  fs::remove(sample.path);
}

TEST_CASE("block_reader: destruction cancels what waits and leaves no read behind") {
  const TempFolder folder;
  const Sample sample(folder / "file", 600 * kPage);
  for (const ReadBackend backend : backends())
    for (const unsigned depth : {1u, 8u}) {
      CAPTURE(label(backend));
      Sink sink;
      const Pages pages(600 * kPage);
      std::vector<ReadRange> ranges;
      for (size_t i = 0; i < 300; ++i)
        ranges.push_back(sample.range(2 * i, 2, pages.at(2 * i * kPage), i));
      auto reader = open_one(sample, sink, {.backend = backend, .depth = depth});
      reader->submit(ranges, ReadClass::ahead);
      if (depth == 8) REQUIRE(sink.wait(1));
      reader.reset();
      REQUIRE(sink.order().size() == 300);
      size_t n_wrong = 0;
      for (const ReadRange& r : ranges) {
        const int error = sink.error(r.tag);
        n_wrong += error == 0 ? !sample.holds(r) : error != ECANCELED;
      }
      CHECK(n_wrong == 0);
      for (const ReadRange& r : ranges) std::memset(r.to, 0x11, r.n_bytes);
      ::usleep(1000);  // a late write would show
      CHECK(std::all_of(pages.at(0), pages.at(600 * kPage),
                        [](std::byte b) { return b == std::byte{0x11}; }));
    }
}

TEST_CASE("block_reader: readers come and go") {
  const TempFolder folder;
  const Sample sample(folder / "file", kPage);
  for (const ReadBackend backend : backends())
    for (int i = 0; i < 50; ++i) {
      Sink sink;
      const auto reader = open_one(sample, sink, {.backend = backend, .depth = 4});
      CHECK(reader->stats().bytes == 0);
    }
}

TEST_CASE("block_reader: ranges submitted and cancelled by several threads at once") {
  const TempFolder folder;
  const Sample sample(folder / "file", 64 * kPage);
  for (const ReadBackend backend : backends()) {
    CAPTURE(label(backend));
    Sink sink;
    constexpr size_t kThreads = 3, kEach = 100;
    const Pages pages(kThreads * kEach * kPage);
    const auto reader = open_one(sample, sink, {.backend = backend, .depth = 4});
    std::atomic<size_t> n_cancelled{0};
    const auto work = [&](size_t thread) {
      for (size_t i = 0; i < kEach; ++i) {
        const uint64_t tag = thread * kEach + i;
        const ReadRange r = sample.range(tag % 64, 1, pages.at(tag * kPage), tag);
        reader->submit({&r, 1}, static_cast<ReadClass>(tag % 3));
        reader->promote(tag, 1, ReadClass::demand);
        if (i % 10 == 0) n_cancelled += reader->cancel(tag, 1);
        static_cast<void>(reader->stats());
      }
    };
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
    REQUIRE(sink.wait(kThreads * kEach));
    CHECK(sink.order().size() == kThreads * kEach);
    CHECK(reader->stats().reads + n_cancelled == kThreads * kEach);
  }
}

TEST_CASE("block_reader: what cannot be opened says why") {
  const TempFolder folder;
  Sink sink;
  const auto open_path = [&](const fs::path& path, BlockReaderOptions options = {}) {
    return thrown_by([&] { BlockReader::open({&path, 1}, sink.done(), options); });
  };
  check_thrown(open_path(folder / "missing"), ErrorKind::io, "missing");
  check_thrown(open_path(folder.path()), ErrorKind::io, "not a file");
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  check_thrown(open_path(folder / "pipe"), ErrorKind::io, "not a file");
  write_text(folder / "file", "x");
  check_thrown(open_path(folder / "file", {.depth = 0}), ErrorKind::usage, "1 to 256");
}

TEST_CASE("block_reader: a range that breaks the rules is refused before anything is read") {
  const TempFolder folder;
  const Sample sample(folder / "file", 4 * kPage);
  Sink sink;
  const Pages pages(4 * kPage);
  const auto reader = open_one(sample, sink, {.backend = ReadBackend::pread});
  const ReadRange good = sample.range(0, 1, pages.at(0), 0);
  std::vector<ReadRange> bad(6, good);
  bad[0].offset = 1;
  bad[1].n_bytes = 100;
  bad[2].to = pages.at(8);
  bad[3].file = 1;
  bad[4].n_needed = 2 * kPage;
  bad[5].n_bytes = bad[5].n_needed = 0;
  for (const ReadRange& range : bad) {
    const ReadRange both[] = {good, range};
    check_thrown(thrown_by([&] { reader->submit(both, ReadClass::demand); }), ErrorKind::internal,
                 "block_reader");
  }
  CHECK(sink.order().empty());
}
