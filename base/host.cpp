#include "base/host.h"

#include <algorithm>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/system_file.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

// ---- cgroups ---------------------------------------------------------------------------------

// Folders of this process's group and its ancestors for one controller, innermost first.
struct GroupPath {
  int version = 0;  // 0: not found
  std::vector<fs::path> folders;
};

bool is_folder(const fs::path& path) {
  std::error_code ec;
  return fs::is_directory(path, ec);
}

// `group` is a path as /proc/self/cgroup has it. In a container it may name a folder that only the
// host sees; the mount itself is then the container's group.
std::vector<fs::path> chain(const fs::path& mount, const std::string& group) {
  fs::path relative = fs::path(group).relative_path().lexically_normal();
  const bool hidden =
      !relative.empty() && (*relative.begin() == ".." || !is_folder(mount / relative));
  std::vector<fs::path> out;
  for (; !hidden && !relative.empty() && relative != "."; relative = relative.parent_path())
    out.push_back(mount / relative);
  out.push_back(mount);
  return out;
}

bool lists(std::string_view comma_list, std::string_view item) {
  while (!comma_list.empty()) {
    const size_t comma = comma_list.find(',');
    if (comma_list.substr(0, comma) == item) return true;
    if (comma == std::string_view::npos) break;
    comma_list.remove_prefix(comma + 1);
  }
  return false;
}

// Lines of /proc/self/cgroup are "id:controllers:path"; v2 has the single id 0 and no controllers.
// A hybrid system has both: the controller is then where v1 lists it.
GroupPath find_group(const fs::path& root, const char* controller) {
  std::istringstream lines(read_system_file(root / "proc/self/cgroup"));
  const fs::path mounts = root / "sys/fs/cgroup";
  GroupPath v2;
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1),
                      group = line.substr(second + 1);
    if (controllers.empty()) {
      if (is_folder(mounts))
        v2 = {2, chain(is_folder(mounts / "unified") ? mounts / "unified" : mounts, group)};
    } else if (lists(controllers, controller)) {
      const fs::path joint =
          mounts / controllers;  // "cpu,cpuacct"; the single name is often a link to it
      const fs::path mount = is_folder(joint) ? joint : mounts / controller;
      if (is_folder(mount)) return {1, chain(mount, group)};
    }
  }
  return v2;
}

// CPUs that one group grants: "200000 100000" or "max 100000" (v2), two files (v1).
std::optional<double> quota_of(const GroupPath& group, const fs::path& folder) {
  std::optional<int64_t> quota, period;
  if (group.version == 2) {
    const std::string text = read_system_file(folder / "cpu.max");
    const size_t space = text.find(' ');
    quota = parse_system_number(text);  // "max" is no number
    if (space != std::string::npos) period = parse_system_number(std::string_view(text).substr(space));
  } else {
    quota = read_system_number(folder / "cpu.cfs_quota_us");  // -1: none
    period = read_system_number(folder / "cpu.cfs_period_us");
  }
  if (!quota || !period || *quota <= 0 || *period <= 0) return std::nullopt;
  return static_cast<double>(*quota) / static_cast<double>(*period);
}

// The line "name value" of a group's memory.stat.
std::optional<int64_t> stat_of(const fs::path& folder, std::string_view name) {
  std::istringstream lines(read_system_file(folder / "memory.stat"));
  for (std::string line; std::getline(lines, line);)
    if (line.size() > name.size() && line.starts_with(name) && line[name.size()] == ' ')
      return parse_system_number(std::string_view(line).substr(name.size()));
  return std::nullopt;
}

std::optional<uint64_t> least_of(std::initializer_list<std::optional<int64_t>> limits) {
  std::optional<uint64_t> least;
  for (const auto& limit : limits) {
    if (!limit || *limit < 0 || *limit >= int64_t{1} << 60) continue;
    least = std::min(least.value_or(UINT64_MAX), static_cast<uint64_t>(*limit));
  }
  return least;
}

// Least limit of one group in bytes; v1 writes "none" as a number near 2^63.
std::optional<uint64_t> limit_of(const GroupPath& group, const fs::path& folder) {
  if (group.version == 2)
    return least_of({read_system_number(folder / "memory.max"), read_system_number(folder / "memory.high")});
  return least_of({read_system_number(folder / "memory.limit_in_bytes"), stat_of(folder, "hierarchical_memory_limit")});
}

std::optional<uint64_t> used_of(const GroupPath& group, const fs::path& folder) {
  return least_of({read_system_number(folder / (group.version == 2 ? "memory.current" : "memory.usage_in_bytes"))});
}

// Page cache of files that is charged to a group and those below it.
std::optional<uint64_t> cache_of(const GroupPath& group, const fs::path& folder) {
  const bool v2 = group.version == 2;  // v1 counts the group alone under these names
  const auto active = stat_of(folder, v2 ? "active_file" : "total_active_file"),
             inactive = stat_of(folder, v2 ? "inactive_file" : "total_inactive_file");
  if (!active || !inactive || *active < 0 || *inactive < 0) return std::nullopt;
  return static_cast<uint64_t>(*active) + static_cast<uint64_t>(*inactive);
}

// "MemTotal:  24576 kB" -> bytes; 0 when absent.
uint64_t meminfo(const std::string& text, const std::string& field) {
  const size_t at = text.find(field + ":");
  if (at == std::string::npos) return 0;
  const auto kib = parse_system_number(std::string_view(text).substr(at + field.size() + 1));
  return kib && *kib > 0 ? static_cast<uint64_t>(*kib) * 1024 : 0;
}

}  // namespace

int HostCores::usable() const {
  if (!cgroup_quota || *cgroup_quota >= performance) return std::max(performance, 1);
  return std::max(static_cast<int>(*cgroup_quota), 1);
}

HostCores read_host_cores(const fs::path& root) {
  HostCores out;
  out.topology = read_topology(root);
  out.logical = static_cast<int>(out.topology.cpus.size());
  out.physical = out.topology.n_cores();
  out.performance = out.topology.n_performance_cores();
  const GroupPath group = find_group(root, "cpu");
  for (const fs::path& level : group.folders) {
    const auto quota = quota_of(group, level);
    if (quota && *quota < out.cgroup_quota.value_or(1e9)) out.cgroup_quota = quota;
  }
  return out;
}

HostMemory read_host_memory(const fs::path& root) {
  HostMemory out;
  const std::string text = read_system_file(root / "proc/meminfo");
  out.total_bytes = meminfo(text, "MemTotal");
  out.available_bytes = meminfo(text, "MemAvailable");
  const GroupPath group = find_group(root, "memory");
  out.cgroup_version = group.version;
  if (!group.folders.empty()) out.cgroup_folder = group.folders.front();
  for (const fs::path& level : group.folders) {
    const auto soft = least_of({read_system_number(level / "memory.soft_limit_in_bytes")});
    if (soft && (!out.cgroup_soft || *soft < out.cgroup_soft->bytes)) out.cgroup_soft = {*soft, used_of(group, level), cache_of(group, level)};
    const auto limit = limit_of(group, level);
    if (!limit || *limit >= out.cgroup_limit_bytes.value_or(UINT64_MAX)) continue;
    out.cgroup_limit_bytes = limit;
    out.cgroup_used_bytes = used_of(group, level);
    out.cgroup_cache_bytes = cache_of(group, level);
  }
  return out;
}

}  // namespace duet
