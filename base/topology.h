// Cores, their kinds and memory nodes, and where threads go on them. Readers take the root of the
// file tree, so that tests can show them any machine.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace duet {

using CpuSet = std::vector<int>;  // CPU numbers, ascending

struct Cpu {
  int id = 0, package = 0, core = 0, node = 0;
  bool performance = true;  // false: an efficiency core of a machine that has both kinds
  int sibling = 0;          // place among the CPUs of its core: 0, 1 with SMT
};

// The CPUs that this process may use, by number.
struct Topology {
  std::vector<Cpu> cpus;

  int n_cores() const;              // SMT siblings counted once
  int n_performance_cores() const;  // where all cores are alike, all of them
  std::vector<int> nodes() const;   // memory nodes of the CPUs
  bool is_hybrid() const;
  // CPUs for n_threads threads (fewer when there are not so many): one per performance core first,
  // then efficiency cores, then SMT siblings; spread evenly over nodes; ordered by node, so that
  // neighbouring threads, which work on neighbouring rows, share one.
  std::vector<Cpu> choose(int n_threads) const;
};

// `allowed`: CPUs to look at; by default those in the affinity mask, or for another root all.
// Kinds of cores come from /sys/devices/cpu_core and cpu_atom (Intel), else from cpu_capacity
// (relative speed; Arm, and Intel since Linux 6.12), else from the highest frequency; a core of
// less than three quarters of the best is an efficiency core: single cores of one kind differ by a
// tenth, kinds by a third and more.
Topology read_topology(const std::filesystem::path& root = "/",
                       const std::optional<CpuSet>& allowed = std::nullopt);

enum class PinMode { automatic, on, off };
enum class NumaMode { automatic, interleave, off };

// Where the threads of a team stay, and on which memory nodes pages go that they touch first.
struct Placement {
  std::vector<CpuSet> cpus;     // thread i stays on cpus[i % size]; empty: anywhere
  std::vector<int> interleave;  // nodes in turn; empty: as the system does it
  bool operator==(const Placement&) const = default;
};

// PinMode::on gives each thread a CPU of its own. That is for machines that do nothing else: a
// thread that shares its CPU with another program holds up all. So `automatic` leaves placing to
// the scheduler, which prefers idle cores by itself, and only says what it cannot know: on hybrid
// machines threads stay on performance cores, on machines of several nodes each thread on the CPUs
// of one node. None is bound when there are more threads than such CPUs.
// NumaMode::automatic interleaves when the CPUs belong to several nodes: any thread may read any
// expert, and the page cache outlives the run that filled it.
Placement place_threads(const Topology& topology, int n_threads, PinMode pin, NumaMode numa);

// The affinity mask of the calling thread; setting it says false when the system refuses.
CpuSet allowed_cpus();
bool set_allowed_cpus(std::span<const int> cpus);
// Memory policy of the calling thread: interleave over these nodes; none: the default. False when
// the system refuses (containers often do).
bool set_interleave(std::span<const int> nodes);
bool has_memory_policy();  // somebody (numactl) has set one for this thread

// "0-3,8,10-11" -> numbers; stops at what is not of this form.
std::vector<int> parse_cpu_list(std::string_view text);

}  // namespace duet
