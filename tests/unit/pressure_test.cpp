// Memory that becomes short, on machines made of files.
#include "base/pressure.h"

#include <doctest/doctest.h>

#include "base/error.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;
using std::chrono::seconds;

namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

struct Machine {
  TempFolder root;
  void file(const std::string& path, const std::string& text) const { write_text(root / path, text + "\n"); }
  MemoryPressure read() const { return read_memory_pressure(root.path()); }
};

std::string stall(const char* full) { return concat("some avg10=90.00 avg60=1.00 avg300=0.00 total=5\nfull avg10=", full, " avg60=80.00 avg300=0.00 total=5"); }

const ThrashDetector::Clock::time_point kStart = ThrashDetector::Clock::now();

}  // namespace

TEST_CASE("pressure: cgroup v2, the own group's rather than the machine's") {
  const Machine m;
  m.file("proc/self/cgroup", "0::/user/duet");
  m.file("proc/self/statm", "5000 300 100 1 0 1 0");
  m.file("proc/pressure/memory", stall("1.50"));
  m.file("sys/fs/cgroup/user/duet/memory.high", std::to_string(3 * kGiB));
  m.file("sys/fs/cgroup/user/duet/memory.events", "low 9\nhigh 12\nmax 3\noom 0");
  CHECK(m.read().full_avg10 == doctest::Approx(1.5));
  m.file("sys/fs/cgroup/user/duet/memory.pressure", stall("7.25"));
  const MemoryPressure p = m.read();
  CHECK(p.full_avg10 == doctest::Approx(7.25));
  m.file("proc/pressure/memory", stall("50.00"));  // a neighbour's
  CHECK(m.read().full_avg10 == doctest::Approx(7.25));
  CHECK(p.high_events == 12);
  CHECK(p.own_bytes == 200 * 4096);
  CHECK(p.memory.cgroup_limit_bytes == 3 * kGiB);
  CHECK_FALSE(p.memory.cgroup_soft.has_value());
}

TEST_CASE("pressure: cgroup v1 has a soft limit, the least of the group and its ancestors") {
  const Machine m;
  m.file("proc/self/cgroup", "4:memory:/a/b");
  const std::string a = "sys/fs/cgroup/memory/a/", b = a + "b/";
  m.file(a + "memory.limit_in_bytes", std::to_string(8 * kGiB));
  m.file(a + "memory.soft_limit_in_bytes", "9223372036854771712");
  m.file(b + "memory.limit_in_bytes", "9223372036854771712");
  m.file(b + "memory.soft_limit_in_bytes", "9223372036854771712");
  CHECK_FALSE(m.read().memory.cgroup_soft.has_value());
  m.file(a + "memory.soft_limit_in_bytes", std::to_string(6 * kGiB));
  m.file(a + "memory.usage_in_bytes", std::to_string(2 * kGiB));
  m.file(a + "memory.stat", "total_active_file 100\ntotal_inactive_file 23");
  const HostMemory memory = m.read().memory;
  REQUIRE(memory.cgroup_soft.has_value());
  CHECK(memory.cgroup_soft->bytes == 6 * kGiB);
  CHECK(memory.cgroup_soft->used_bytes == 2 * kGiB);
  CHECK(memory.cgroup_soft->cache_bytes == 123);
  CHECK(memory.cgroup_limit_bytes == 8 * kGiB);
  m.file(b + "memory.soft_limit_in_bytes", std::to_string(kGiB));
  CHECK(m.read().memory.cgroup_soft->bytes == kGiB);
  CHECK_FALSE(m.read().memory.cgroup_soft->used_bytes.has_value());
}

TEST_CASE("pressure: what the kernel does not tell, and what is damaged, is no pressure") {
  const Machine m;
  CHECK(m.read().full_avg10 == 0);
  CHECK(m.read().own_bytes == 0);
  for (const char* text : {"", "full", "full avg10=", "full avg10=x", "full avg10=-3", "some avg10=99"}) {
    m.file("proc/pressure/memory", text);
    CHECK(m.read().full_avg10 == 0);
  }
  m.file("proc/pressure/memory", "full avg10=1e9");
  CHECK(m.read().full_avg10 == 100);
  for (const char* text : {"", "1", "5 2 3", "a b c"}) {
    m.file("proc/self/statm", text);
    CHECK(m.read().own_bytes == 0);
  }
}

TEST_CASE("pressure: this machine") {
  const MemoryPressure p = read_memory_pressure();
  CHECK(p.memory.total_bytes > 0);
  CHECK(p.own_bytes > 0);
  const uint64_t faults = major_faults();
  CHECK(major_faults() >= faults);
}

TEST_CASE("thrash detector: faults of eight tokens in a row, at most every 64 tokens") {
  ThrashDetector d(kStart);
  for (int i = 0; i < 7; ++i) CHECK_FALSE(d.after(1, 101, 0, kStart));
  CHECK_FALSE(d.after(1, 100, 0, kStart));  // healthy: counting begins anew
  for (int i = 0; i < 7; ++i) CHECK_FALSE(d.after(1, 101, 0, kStart));
  CHECK(d.after(1, 101, 0, kStart));
  for (int i = 0; i < 63; ++i) CHECK_FALSE(d.after(1, 5000, 0, kStart));
  CHECK(d.after(1, 5000, 0, kStart));
}

TEST_CASE("thrash detector: a prompt counts as its tokens") {
  ThrashDetector d(kStart);
  CHECK_FALSE(d.after(512, 51'200, 0, kStart));
  CHECK(d.after(512, 51'201, 0, kStart));
  CHECK(d.after(64, 6'401, 0, kStart));
  CHECK_FALSE(d.after(7, 10'000, 0, kStart));
}

TEST_CASE("thrash detector: waiting for memory, not twice for the same ten seconds") {
  ThrashDetector d(kStart);
  CHECK_FALSE(d.after(100, 0, 90, kStart + seconds(9)));  // as it was before we began
  CHECK_FALSE(d.after(100, 0, 5, kStart + seconds(10)));
  CHECK(d.after(100, 0, 5.1, kStart + seconds(10)));
  CHECK_FALSE(d.after(100, 0, 90, kStart + seconds(19)));
  CHECK(d.after(1, 0, 90, kStart + seconds(20)));
  CHECK_FALSE(d.after(63, 0, 90, kStart + seconds(40)));  // nor before 64 tokens
  CHECK(d.after(1, 0, 90, kStart + seconds(40)));
}
