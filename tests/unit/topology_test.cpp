// Cores, kinds and nodes of machines given as file trees, and where threads would go on them.
#include "base/topology.h"

#include <doctest/doctest.h>

#include "base/error.h"
#include "base/host.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;

namespace {

struct Machine {
  TempFolder root;

  void file(const std::string& path, const std::string& text) const {
    write_text(root / path, text + "\n");
  }
  void cpu(int id, int package, int core) const {
    const std::string folder = concat("sys/devices/system/cpu/cpu", id, "/topology/");
    file(folder + "physical_package_id", std::to_string(package));
    file(folder + "core_id", std::to_string(core));
  }
  void speed(int id, const char* name, int value) const {
    file(concat("sys/devices/system/cpu/cpu", id, "/", name), std::to_string(value));
  }
  void node(int id, const std::string& cpus) const {
    file(concat("sys/devices/system/node/node", id, "/cpulist"), cpus);
  }
  Topology read(const std::optional<CpuSet>& allowed = std::nullopt) const {
    return read_topology(root.path(), allowed);
  }

  // One socket, n cores of two CPUs; siblings are numbered n apart, as Linux does.
  void smt(int n) const {
    for (int i = 0; i < 2 * n; ++i) cpu(i, 0, i % n);
  }
  // Intel laptop: CPUs 0-3 are two performance cores with siblings next to each other, 4-7 efficiency.
  void hybrid() const {
    for (int i = 0; i < 4; ++i) cpu(i, 0, i / 2 * 4);
    for (int i = 4; i < 8; ++i) cpu(i, 0, i + 4);
  }
  // 2 sockets x 64 cores x 2; socket 1 has CPUs 64-127 and their siblings 192-255.
  void server() const {
    for (int i = 0; i < 256; ++i) cpu(i, i / 64 % 2, i % 64);
    node(0, "0-63,128-191");
    node(1, "64-127,192-255");
  }
};

CpuSet ids(const std::vector<Cpu>& cpus) {
  CpuSet out;
  for (const Cpu& cpu : cpus) out.push_back(cpu.id);
  return out;
}

CpuSet range(int begin, int end) {
  CpuSet out;
  for (int i = begin; i < end; ++i) out.push_back(i);
  return out;
}

}  // namespace

TEST_CASE("topology: lists of CPUs") {
  CHECK(parse_cpu_list("0-3,8,10-11\n") == CpuSet{0, 1, 2, 3, 8, 10, 11});
  CHECK(parse_cpu_list("5") == CpuSet{5});
  CHECK(parse_cpu_list("").empty());
  CHECK(parse_cpu_list("\n").empty());
  CHECK(parse_cpu_list("all").empty());
  CHECK(parse_cpu_list("3-1").empty());
  CHECK(parse_cpu_list("-2").empty());
  CHECK(parse_cpu_list("0,1-99999999") == CpuSet{0});  // a damaged list stays small
}

TEST_CASE("topology: SMT, one CPU per core first") {
  Machine m;
  m.smt(4);
  const Topology t = m.read();
  CHECK(t.cpus.size() == 8);
  CHECK(t.n_cores() == 4);
  CHECK(t.n_performance_cores() == 4);
  CHECK_FALSE(t.is_hybrid());
  CHECK(t.nodes() == std::vector{0});
  CHECK(ids(t.choose(2)) == CpuSet{0, 1});
  CHECK(ids(t.choose(4)) == CpuSet{0, 1, 2, 3});
  CHECK(ids(t.choose(6)) == CpuSet{0, 1, 2, 3, 4, 5});
  CHECK(ids(t.choose(100)) == range(0, 8));
  CHECK(read_host_cores(m.root.path()).usable() == 4);
}

TEST_CASE("topology: hybrid by the device folders of Intel") {
  Machine m;
  m.hybrid();
  m.file("sys/devices/cpu_core/cpus", "0-3");
  m.file("sys/devices/cpu_atom/cpus", "4-7");
  const Topology t = m.read();
  CHECK(t.is_hybrid());
  CHECK(t.n_cores() == 6);
  CHECK(t.n_performance_cores() == 2);
  CHECK(ids(t.choose(2)) == CpuSet{0, 2});
  CHECK(ids(t.choose(4)) == CpuSet{0, 2, 4, 5});        // then efficiency cores
  CHECK(ids(t.choose(7)) == CpuSet{0, 1, 2, 4, 5, 6, 7});  // then siblings
  const HostCores cores = read_host_cores(m.root.path());
  CHECK(cores.logical == 8);
  CHECK(cores.physical == 6);
  CHECK(cores.performance == 2);
  CHECK(cores.usable() == 2);
}

TEST_CASE("topology: hybrid by capacity, and by frequency where there is none") {
  for (const char* name : {"cpu_capacity", "cpufreq/cpuinfo_max_freq"}) {
    Machine m;  // a phone's: little, middle and one large core; middle and large count as one kind
    const int speeds[] = {325, 325, 325, 325, 870, 870, 870, 1024};
    for (int i = 0; i < 8; ++i) {
      m.cpu(i, 0, i);
      m.speed(i, name, speeds[i]);
    }
    CHECK(m.read().n_performance_cores() == 4);
    CHECK(ids(m.read().choose(4)) == CpuSet{4, 5, 6, 7});
    CHECK(m.read(CpuSet{0, 1}).n_performance_cores() == 2);  // kept to little ones: no choice
    CHECK(read_host_cores(m.root.path()).usable() == 4);
  }
}

TEST_CASE("topology: favoured cores of one kind are no second kind; a missing speed tells nothing") {
  Machine m;
  m.smt(4);
  const int mhz[] = {5700, 5500, 5150, 5000, 5700, 5500, 5150, 5000};
  for (int i = 0; i < 8; ++i) m.speed(i, "cpufreq/cpuinfo_max_freq", mhz[i]);
  CHECK_FALSE(m.read().is_hybrid());
  m.speed(0, "cpu_capacity", 1024);
  m.speed(1, "cpu_capacity", 100);
  CHECK_FALSE(m.read().is_hybrid());  // of the others it is not known
}

TEST_CASE("topology: two sockets, threads spread evenly and neighbours together") {
  Machine m;
  m.server();
  const Topology t = m.read();
  CHECK(t.cpus.size() == 256);
  CHECK(t.n_cores() == 128);
  CHECK(t.nodes() == std::vector{0, 1});
  CHECK(ids(t.choose(4)) == CpuSet{0, 1, 64, 65});
  CHECK(ids(t.choose(5)) == CpuSet{0, 1, 2, 64, 65});
  CHECK(ids(t.choose(128)) == range(0, 128));
  CHECK(read_host_cores(m.root.path()).usable() == 128);
}

TEST_CASE("topology: the affinity mask restricts cores and nodes") {
  Machine m;
  m.server();
  const Topology t = m.read(CpuSet{70, 71, 198, 199, 200});
  CHECK(t.n_cores() == 3);  // 70 and 198, 71 and 199 are siblings
  CHECK(t.nodes() == std::vector{1});
  CHECK(ids(t.choose(3)) == CpuSet{70, 71, 200});
  m.file("proc/self/cgroup", "0::/");
  m.file("sys/fs/cgroup/cpu.max", "600000 100000");
  CHECK(read_host_cores(m.root.path()).usable() == 6);
}

TEST_CASE("topology: placement of threads") {
  Machine smt, hybrid, server;
  smt.smt(4);
  hybrid.hybrid();
  hybrid.file("sys/devices/cpu_atom/cpus", "4-7");
  server.server();
  const auto place = [](const Machine& m, int n, PinMode pin, NumaMode numa) { return place_threads(m.read(), n, pin, numa); };
  const auto both = PinMode::automatic;
  const auto numa = NumaMode::automatic;

  CHECK(place(smt, 4, both, numa) == Placement{});  // the scheduler knows best
  CHECK(place(smt, 2, PinMode::on, numa).cpus == std::vector<CpuSet>{{0}, {1}});
  CHECK(place(smt, 9, PinMode::on, numa).cpus.empty());  // more threads than CPUs
  CHECK(place(smt, 2, both, NumaMode::interleave).interleave == std::vector{0});

  CHECK(place(hybrid, 2, both, numa).cpus == std::vector<CpuSet>{{0, 1, 2, 3}, {0, 1, 2, 3}});
  CHECK(place(hybrid, 2, PinMode::off, numa) == Placement{});
  CHECK(place(hybrid, 3, both, numa).cpus.back() == CpuSet{4, 5, 6, 7});

  const Placement two = place(server, 2, both, numa);
  REQUIRE(two.cpus.size() == 2);
  CHECK(two.cpus[0].size() == 128);
  CHECK(two.cpus[0].back() == 191);
  CHECK(two.cpus[1].front() == 64);
  CHECK(two.interleave == std::vector{0, 1});
  CHECK(place(server, 2, both, NumaMode::off).interleave.empty());
  CHECK(place_threads(server.read(CpuSet{0, 1}), 2, both, numa) == Placement{});  // one node of the two
}

TEST_CASE("topology: this machine") {
  const Topology t = read_topology();
  CHECK(t.cpus.size() == allowed_cpus().size());
  CHECK(t.n_performance_cores() >= 1);
  CHECK(t.n_performance_cores() <= t.n_cores());
  CHECK(t.choose(1).size() == 1);
  CHECK(set_allowed_cpus(allowed_cpus()));
  CHECK_FALSE(set_allowed_cpus({}));
}
