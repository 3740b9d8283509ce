// The machine as this process may use it: cores and memory under cpuset and cgroup (v1 and v2)
// limits. All readers take the root of the file tree, so that tests can show them any machine.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "base/topology.h"

namespace duet {

struct HostCores {
  int logical = 1;                    // CPUs in the affinity mask of this process
  int physical = 1;                   // distinct cores among them (SMT siblings counted once)
  int performance = 1;                // those of the faster kind; where all are alike, all
  std::optional<double> cgroup_quota; // CPUs granted by cpu.max / cfs_quota, least of all ancestors
  Topology topology;                  // of the CPUs counted above
  // Default number of compute threads: performance cores, not above the quota (rounded down, >= 1).
  int usable() const;
};

struct HostMemory {
  uint64_t total_bytes = 0;      // MemTotal
  uint64_t available_bytes = 0;  // MemAvailable
  // Least finite limit of this process's cgroup and its ancestors (memory.max and memory.high of
  // v2; memory.limit_in_bytes of v1 and hierarchical_memory_limit, which tells those of ancestors
  // that a container hides), the usage of the group that carries it, and the page cache of files in
  // that, which the kernel gives up when memory is short.
  std::optional<uint64_t> cgroup_limit_bytes;
  std::optional<uint64_t> cgroup_used_bytes;
  std::optional<uint64_t> cgroup_cache_bytes;
  // Least memory.soft_limit_in_bytes of v1: to what its owner would have us shrink; no limit.
  struct SoftLimit {
    uint64_t bytes = 0;
    std::optional<uint64_t> used_bytes, cache_bytes;  // of the group that carries it
  };
  std::optional<SoftLimit> cgroup_soft;
  std::filesystem::path cgroup_folder;  // of this process's own group
  int cgroup_version = 0;        // 0: none found
};

HostCores read_host_cores(const std::filesystem::path& root = "/");
HostMemory read_host_memory(const std::filesystem::path& root = "/");

}  // namespace duet
