#include "base/topology.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "base/system_file.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxCpu = 1 << 20;  // a damaged list must not fill memory
constexpr int kMaxNode = 1024;

// Numbers of the entries "<prefix>N" of a folder, ascending.
std::vector<int> numbered(const fs::path& folder, std::string_view prefix) {
  std::vector<int> out;
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(folder, ec)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || name.size() == prefix.size()) continue;
    int number = 0;
    const char* end = name.data() + name.size();
    if (std::from_chars(name.data() + prefix.size(), end, number).ptr == end) out.push_back(number);
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::map<int, int> node_of_cpus(const fs::path& folder) {
  std::map<int, int> out;
  for (const int node : numbered(folder, "node"))
    for (const int cpu : parse_cpu_list(read_system_file(folder / ("node" + std::to_string(node)) / "cpulist")))
      out[cpu] = node;
  return out;
}

// Relative speed of each CPU; empty where one of them has none.
std::vector<int64_t> speeds(const std::vector<Cpu>& cpus, const fs::path& folder, const char* file) {
  std::vector<int64_t> out;
  for (const Cpu& cpu : cpus) {
    const auto speed = read_system_number(folder / ("cpu" + std::to_string(cpu.id)) / file);
    if (!speed || *speed <= 0) return {};
    out.push_back(*speed);
  }
  return out;
}

void find_kinds(std::vector<Cpu>& cpus, const fs::path& devices) {
  const auto atoms = parse_cpu_list(read_system_file(devices / "cpu_atom/cpus"));
  if (!atoms.empty()) {
    for (Cpu& cpu : cpus) cpu.performance = !std::binary_search(atoms.begin(), atoms.end(), cpu.id);
  } else {
    auto speed = speeds(cpus, devices / "system/cpu", "cpu_capacity");
    if (speed.empty()) speed = speeds(cpus, devices / "system/cpu", "cpufreq/cpuinfo_max_freq");
    if (speed.empty()) return;
    const int64_t best = *std::max_element(speed.begin(), speed.end());
    for (size_t i = 0; i < cpus.size(); ++i) cpus[i].performance = speed[i] >= best - best / 4;
  }
  // A process kept to efficiency cores: they are all it has.
  const auto good = [](const Cpu& cpu) { return cpu.performance; };
  if (std::none_of(cpus.begin(), cpus.end(), good))
    for (Cpu& cpu : cpus) cpu.performance = true;
}

using CoreId = std::pair<int, int>;
CoreId core_of(const Cpu& cpu) { return {cpu.package, cpu.core}; }

int count_cores(const std::vector<Cpu>& cpus, bool efficiency_too) {
  std::set<CoreId> cores;
  for (const Cpu& cpu : cpus)
    if (cpu.performance || efficiency_too) cores.insert(core_of(cpu));
  return static_cast<int>(cores.size());
}

std::vector<CpuSet> one_cpu_each(const std::vector<Cpu>& chosen) {
  std::vector<CpuSet> out;
  for (const Cpu& cpu : chosen) out.push_back({cpu.id});
  return out;
}

// For each chosen CPU all of its node and kind.
std::vector<CpuSet> kin_of_each(const std::vector<Cpu>& chosen, const std::vector<Cpu>& all) {
  std::vector<CpuSet> out;
  for (const Cpu& cpu : chosen) {
    CpuSet& set = out.emplace_back();
    for (const Cpu& other : all)
      if (other.node == cpu.node && other.performance == cpu.performance) set.push_back(other.id);
  }
  return out;
}

}  // namespace

std::vector<int> parse_cpu_list(std::string_view text) {
  std::vector<int> out;
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p < end) {
    int first = 0, last = 0;
    auto [next, code] = std::from_chars(p, end, first);
    if (code != std::errc{}) break;
    last = first;
    if (next < end && *next == '-') {
      const auto upper = std::from_chars(next + 1, end, last);
      if (upper.ec != std::errc{}) break;
      next = upper.ptr;
    }
    if (first < 0 || last < first || last > kMaxCpu) break;
    for (int i = first; i <= last; ++i) out.push_back(i);
    if (next == end || *next != ',') break;
    p = next + 1;
  }
  return out;
}

int Topology::n_cores() const { return count_cores(cpus, true); }
int Topology::n_performance_cores() const { return count_cores(cpus, false); }

std::vector<int> Topology::nodes() const {
  std::set<int> out;
  for (const Cpu& cpu : cpus) out.insert(cpu.node);
  return {out.begin(), out.end()};
}

bool Topology::is_hybrid() const {
  return std::any_of(cpus.begin(), cpus.end(), [](const Cpu& cpu) { return !cpu.performance; });
}

std::vector<Cpu> Topology::choose(int n_threads) const {
  std::vector<Cpu> out = cpus;
  // Rank of a CPU among those of its node and kind: taking equal ranks together spreads over nodes.
  std::map<std::tuple<int, bool, int>, int> n_seen;
  std::map<int, int> rank;
  for (const Cpu& cpu : cpus) rank[cpu.id] = n_seen[{cpu.node, cpu.performance, cpu.sibling}]++;
  const auto preference = [&](const Cpu& cpu) {
    return std::tuple(cpu.sibling, !cpu.performance, rank[cpu.id], cpu.node, cpu.id);
  };
  std::sort(out.begin(), out.end(), [&](const Cpu& a, const Cpu& b) { return preference(a) < preference(b); });
  out.resize(std::min(out.size(), static_cast<size_t>(std::max(n_threads, 1))));
  std::sort(out.begin(), out.end(), [](const Cpu& a, const Cpu& b) {
    return std::pair(a.node, a.id) < std::pair(b.node, b.id);
  });
  return out;
}

Topology read_topology(const fs::path& root, const std::optional<CpuSet>& allowed) {
  const fs::path devices = root / "sys/devices", folder = devices / "system/cpu";
  CpuSet ids;
  if (allowed) {
    ids = *allowed;
  } else if (root == "/") {  // the mask is this process's own: it says nothing about another tree
    ids = allowed_cpus();
  } else {
    ids = numbered(folder, "cpu");
  }
  if (ids.empty()) ids = {0};
  const std::map<int, int> nodes = node_of_cpus(devices / "system/node");
  std::map<CoreId, int> n_siblings;
  Topology out;
  for (const int id : ids) {
    const fs::path files = folder / ("cpu" + std::to_string(id)) / "topology";
    const auto package = read_system_number(files / "physical_package_id"), core = read_system_number(files / "core_id");
    const auto node = nodes.find(id);
    Cpu cpu{.id = id, .node = node != nodes.end() ? node->second : 0};
    // No topology known: each CPU is a core, of a package no real one has.
    cpu.package = package && core ? static_cast<int>(*package) : -2;
    cpu.core = package && core ? static_cast<int>(*core) : id;
    cpu.sibling = n_siblings[core_of(cpu)]++;
    out.cpus.push_back(cpu);
  }
  find_kinds(out.cpus, devices);
  return out;
}

Placement place_threads(const Topology& topology, int n_threads, PinMode pin, NumaMode numa) {
  Placement out;
  const std::vector<int> nodes = topology.nodes();
  const std::vector<Cpu> chosen = topology.choose(n_threads);
  if (static_cast<size_t>(n_threads) <= chosen.size()) {
    if (pin == PinMode::on) out.cpus = one_cpu_each(chosen);
    if (pin == PinMode::automatic && (nodes.size() > 1 || topology.is_hybrid()))
      out.cpus = kin_of_each(chosen, topology.cpus);
  }
  if (numa == NumaMode::interleave || (numa == NumaMode::automatic && nodes.size() > 1))
    out.interleave = nodes;
  return out;
}

// The mask grows until the kernel's fits.
CpuSet allowed_cpus() {
  CpuSet out;
  for (size_t n = 1024; n <= size_t{kMaxCpu}; n *= 2) {
    cpu_set_t* set = CPU_ALLOC(n);
    const size_t bytes = CPU_ALLOC_SIZE(n);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    const bool too_small = !ok && errno == EINVAL;
    for (size_t cpu = 0; ok && cpu < n; ++cpu)
      if (CPU_ISSET_S(cpu, bytes, set)) out.push_back(static_cast<int>(cpu));
    CPU_FREE(set);
    if (!too_small) break;
  }
  return out;
}

bool set_allowed_cpus(std::span<const int> cpus) {
  if (cpus.empty()) return false;
  const auto n = static_cast<size_t>(*std::max_element(cpus.begin(), cpus.end())) + 1;
  cpu_set_t* set = CPU_ALLOC(n);
  if (set == nullptr) return false;
  const size_t bytes = CPU_ALLOC_SIZE(n);
  CPU_ZERO_S(bytes, set);
  for (const int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, set);
  const bool ok = sched_setaffinity(0, bytes, set) == 0;
  CPU_FREE(set);
  return ok;
}

bool set_interleave(std::span<const int> nodes) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  unsigned long mask[kMaxNode / kBits] = {};
  for (const int node : nodes) {
    if (node < 0 || node >= kMaxNode) return false;
    mask[static_cast<size_t>(node) / kBits] |= 1ul << (static_cast<size_t>(node) % kBits);
  }
  // The kernel reads one bit less than it is told.
  if (nodes.empty()) return ::syscall(SYS_set_mempolicy, MPOL_DEFAULT, nullptr, 0ul) == 0;
  return ::syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, mask, static_cast<unsigned long>(kMaxNode) + 1) == 0;
}

bool has_memory_policy() {
  int mode = MPOL_DEFAULT;
  return ::syscall(SYS_get_mempolicy, &mode, nullptr, 0ul, nullptr, 0ul) == 0 && mode != MPOL_DEFAULT;
}

}  // namespace duet
