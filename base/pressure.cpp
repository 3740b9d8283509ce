#include "base/pressure.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "base/system_file.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

// "some avg10=0.00 ...\nfull avg10=1.23 avg60=...": the number after "full avg10=".
std::optional<double> full_share(const fs::path& path) {
  const std::string text = read_system_file(path), key = "full avg10=";
  const size_t at = text.find(key);
  if (at == std::string::npos) return std::nullopt;
  return std::clamp(std::strtod(text.c_str() + at + key.size(), nullptr), 0.0, 100.0);
}

uint64_t high_events(const fs::path& folder) {
  const std::string text = "\n" + read_system_file(folder / "memory.events"), key = "\nhigh ";
  const size_t at = text.find(key);
  if (at == std::string::npos) return 0;
  const auto n = parse_system_number(std::string_view(text).substr(at + key.size()));
  return n && *n > 0 ? static_cast<uint64_t>(*n) : 0;
}

// /proc/self/statm: pages in all, resident, of files.
uint64_t anonymous_bytes(const fs::path& root) {
  const std::string text = read_system_file(root / "proc/self/statm");
  unsigned long long size = 0, resident = 0, shared = 0;
  if (std::sscanf(text.c_str(), "%llu %llu %llu", &size, &resident, &shared) != 3 || resident < shared) return 0;
  return (resident - shared) * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

uint64_t major_faults() {
  struct rusage used {};
  ::getrusage(RUSAGE_SELF, &used);
  return static_cast<uint64_t>(used.ru_majflt);
}

MemoryPressure read_memory_pressure(const fs::path& root) {
  MemoryPressure out{.memory = read_host_memory(root), .own_bytes = anonymous_bytes(root)};
  const bool has_group = out.memory.cgroup_version == 2;
  const auto own = has_group ? full_share(out.memory.cgroup_folder / "memory.pressure") : std::nullopt;
  out.full_avg10 = own ? *own : full_share(root / "proc/pressure/memory").value_or(0);
  if (!has_group) return out;
  out.high_events = high_events(out.memory.cgroup_folder);
  return out;
}

bool ThrashDetector::after(size_t n_tokens, uint64_t n_faults, double full_avg10, Clock::time_point now) {
  n_since_ = std::min(n_since_ + n_tokens, kTokensBetween);
  n_faulting_ = n_faults > kFaultsPerToken * n_tokens ? n_faulting_ + n_tokens : 0;
  const bool faults = n_faulting_ >= kFaultTokens, waits = full_avg10 > kFullShare && now - last_ >= kAverage;
  if (n_since_ < kTokensBetween || !(faults || waits)) return false;
  n_since_ = n_faulting_ = 0;
  last_ = now;
  return true;
}

}  // namespace duet
