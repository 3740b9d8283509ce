#include "base/host.h"

#include <sched.h>

#include <algorithm>

namespace duet {

HostCores read_host_cores(const std::filesystem::path&) {
  HostCores cores;
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) cores.logical = std::max(1, CPU_COUNT(&set));
  cores.physical = cores.logical;
  return cores;
}

int HostCores::usable() const {
  const int quota = cgroup_quota ? static_cast<int>(*cgroup_quota) : physical;
  return std::max(1, std::min(physical, quota));
}

}  // namespace duet
