// Machines as file trees: what duet would see on each.
#include "base/host.h"

#include <doctest/doctest.h>

#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;

namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

struct Machine {
  TempFolder root;

  void file(const std::string& path, const std::string& text) const {
    write_text(root / path, text + "\n");
  }
  // n_cores cores of n_smt CPUs; siblings are numbered n_cores apart, as Linux does.
  void cpus(int n_cores, int n_smt, int n_packages = 1) const {
    for (int cpu = 0; cpu < n_cores * n_smt; ++cpu) {
      const std::string folder = concat("sys/devices/system/cpu/cpu", cpu, "/topology/");
      file(folder + "physical_package_id", std::to_string(cpu % n_cores % n_packages));
      file(folder + "core_id", std::to_string(cpu % n_cores / n_packages));
    }
    file("sys/devices/system/cpu/cpufreq/policy0", "");  // not a CPU
    file("sys/devices/system/cpu/online", concat("0-", n_cores * n_smt - 1));
  }
  void memory(uint64_t total_kib, uint64_t available_kib) const {
    file("proc/meminfo",
         concat("MemTotal:       ", total_kib,
                " kB\nMemFree:        1 kB\nMemAvailable:   ", available_kib, " kB"));
  }
  HostCores cores() const { return read_host_cores(root.path()); }
  HostMemory limits() const { return read_host_memory(root.path()); }
};

}  // namespace

TEST_CASE("host: cores count SMT siblings once, packages apart") {
  Machine m;
  m.cpus(8, 2, 2);
  CHECK(m.cores().logical == 16);
  CHECK(m.cores().physical == 8);
  CHECK(m.cores().usable() == 8);
  CHECK_FALSE(m.cores().cgroup_quota.has_value());
}

TEST_CASE("host: CPUs without topology count as cores; a bare tree has one") {
  Machine m;
  m.file("sys/devices/system/cpu/cpu0/online", "1");
  m.file("sys/devices/system/cpu/cpu1/online", "1");
  CHECK(m.cores().physical == 2);
  const Machine bare;
  CHECK(bare.cores().usable() == 1);
  CHECK(bare.limits().total_bytes == 0);
  CHECK(bare.limits().cgroup_version == 0);
}

TEST_CASE("host: cgroup v2, the least of the group and its ancestors holds") {
  Machine m;
  m.cpus(8, 1);
  m.memory(32 << 20, 20 << 20);
  m.file("proc/self/cgroup", "0::/user.slice/app.scope");
  m.file("sys/fs/cgroup/cgroup.controllers", "cpu memory");
  m.file("sys/fs/cgroup/user.slice/cpu.max", "350000 100000");
  m.file("sys/fs/cgroup/user.slice/memory.max", std::to_string(8 * kGiB));
  m.file("sys/fs/cgroup/user.slice/memory.current", std::to_string(3 * kGiB));
  m.file("sys/fs/cgroup/user.slice/app.scope/cpu.max", "max 100000");
  m.file("sys/fs/cgroup/user.slice/app.scope/memory.max", "max");
  m.file("sys/fs/cgroup/user.slice/app.scope/memory.high", std::to_string(12 * kGiB));
  m.file("sys/fs/cgroup/user.slice/app.scope/memory.current", std::to_string(kGiB));
  CHECK(m.cores().cgroup_quota == 3.5);
  CHECK(m.cores().usable() == 3);
  const HostMemory memory = m.limits();
  CHECK(memory.total_bytes == 32 * kGiB);
  CHECK(memory.available_bytes == 20 * kGiB);
  CHECK(memory.cgroup_version == 2);
  CHECK(memory.cgroup_limit_bytes == 8 * kGiB);
  CHECK(memory.cgroup_used_bytes == 3 * kGiB);
}

TEST_CASE("host: cgroup v2, memory.high below memory.max is the limit") {
  Machine m;
  m.file("proc/self/cgroup", "0::/");
  m.file("sys/fs/cgroup/memory.max", std::to_string(8 * kGiB));
  m.file("sys/fs/cgroup/memory.high", std::to_string(6 * kGiB));
  CHECK(m.limits().cgroup_limit_bytes == 6 * kGiB);
  CHECK_FALSE(m.limits().cgroup_used_bytes.has_value());
}

TEST_CASE("host: cgroup v2 without limits") {
  Machine m;
  m.cpus(4, 1);
  m.file("proc/self/cgroup", "0::/x");
  m.file("sys/fs/cgroup/x/cpu.max", "max 100000");
  m.file("sys/fs/cgroup/x/memory.max", "max");
  CHECK_FALSE(m.cores().cgroup_quota.has_value());
  CHECK_FALSE(m.limits().cgroup_limit_bytes.has_value());
  CHECK(m.limits().cgroup_version == 2);
  CHECK(m.cores().usable() == 4);
}

TEST_CASE("host: cgroup v1, controllers with folders of their own") {
  Machine m;
  m.cpus(8, 1);
  m.file("proc/self/cgroup",
         "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc");
  m.file("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "150000");
  m.file("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000");
  m.file("sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us", "-1");
  m.file("sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us", "100000");
  m.file("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");  // none
  m.file("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", std::to_string(4 * kGiB));
  m.file("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", std::to_string(kGiB));
  CHECK(m.cores().cgroup_quota == 1.5);
  CHECK(m.cores().usable() == 1);
  CHECK(m.limits().cgroup_version == 1);
  CHECK(m.limits().cgroup_limit_bytes == 4 * kGiB);
  CHECK(m.limits().cgroup_used_bytes == kGiB);
}

TEST_CASE("host: cgroup v1 in a container that hides the group's path") {
  Machine m;
  m.cpus(8, 1);
  m.file("proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc");
  m.file("sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(2 * kGiB));
  m.file("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000");
  m.file("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  CHECK(m.limits().cgroup_limit_bytes == 2 * kGiB);
  CHECK(m.cores().cgroup_quota == 0.5);
  CHECK(m.cores().usable() == 1);  // never none
}

TEST_CASE("host: cgroup v1, a limit of an ancestor that the container hides") {
  Machine m;
  m.file("proc/self/cgroup", "5:memory:/docker/abc");
  m.file("sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(8 * kGiB));
  m.file("sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(5 * kGiB));
  m.file("sys/fs/cgroup/memory/memory.stat",
         concat("cache 17\nhierarchical_memory_limit ", 6 * kGiB, "\nactive_file 5\ntotal_inactive_file ", 2 * kGiB,
                "\ntotal_active_file ", kGiB));
  CHECK(m.limits().cgroup_limit_bytes == 6 * kGiB);
  CHECK(m.limits().cgroup_used_bytes == 5 * kGiB);
  CHECK(m.limits().cgroup_cache_bytes == 3 * kGiB);
  m.file("sys/fs/cgroup/memory/memory.stat", "hierarchical_memory_limit 9223372036854771712\ntotal_active_file 5");
  CHECK(m.limits().cgroup_limit_bytes == 8 * kGiB);
  CHECK_FALSE(m.limits().cgroup_cache_bytes.has_value());
}

TEST_CASE("host: cgroup v2, page cache of the group that carries the limit") {
  Machine m;
  m.file("proc/self/cgroup", "0::/a/b");
  m.file("sys/fs/cgroup/a/memory.max", std::to_string(4 * kGiB));
  m.file("sys/fs/cgroup/a/memory.stat", "anon 1\nfile 9\ninactive_file 2000\nactive_file 300");
  m.file("sys/fs/cgroup/a/b/memory.max", "max");
  m.file("sys/fs/cgroup/a/b/memory.stat", "inactive_file 1\nactive_file 1");
  CHECK(m.limits().cgroup_cache_bytes == 2300);
  m.file("sys/fs/cgroup/a/b/memory.high", std::to_string(3 * kGiB));
  CHECK(m.limits().cgroup_limit_bytes == 3 * kGiB);
  CHECK(m.limits().cgroup_cache_bytes == 2);
}

TEST_CASE("host: hybrid systems have memory in v1, and what v1 lacks in v2") {
  Machine m;
  m.cpus(8, 1);
  m.file("proc/self/cgroup", "3:memory:/g\n0::/g");
  m.file("sys/fs/cgroup/memory/g/memory.limit_in_bytes", std::to_string(5 * kGiB));
  m.file("sys/fs/cgroup/unified/g/cpu.max", "200000 100000");
  CHECK(m.limits().cgroup_version == 1);
  CHECK(m.limits().cgroup_limit_bytes == 5 * kGiB);
  CHECK(m.cores().cgroup_quota == 2.0);
}

TEST_CASE("host: a group outside the namespace, and damaged files") {
  Machine m;
  m.cpus(2, 1);
  m.file("proc/self/cgroup", "garbage\n0::/../../outside");
  m.file("sys/fs/cgroup/memory.max", std::to_string(kGiB));
  m.file("sys/fs/cgroup/cpu.max", "0 0");
  CHECK(m.limits().cgroup_limit_bytes == kGiB);
  CHECK_FALSE(m.cores().cgroup_quota.has_value());
  m.file("sys/fs/cgroup/memory.max", "lots");
  CHECK_FALSE(m.limits().cgroup_limit_bytes.has_value());
  m.file("proc/meminfo", "MemTotal: many kB");
  CHECK(m.limits().total_bytes == 0);
}

TEST_CASE("host: this machine") {
  const HostCores cores = read_host_cores();
  CHECK(cores.logical >= 1);
  CHECK(cores.physical >= 1);
  CHECK(cores.physical <= cores.logical);
  CHECK(cores.usable() <= cores.physical);
  const HostMemory memory = read_host_memory();
  CHECK(memory.total_bytes > 0);
  CHECK(memory.available_bytes <= memory.total_bytes);
}
