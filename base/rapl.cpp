#include "base/rapl.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <string_view>
#include <system_error>

#include "base/error.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

std::optional<std::string> first_line(const fs::path& path) {
  std::ifstream in(path);
  std::string line;
  if (!in || !std::getline(in, line)) return std::nullopt;
  return line;
}

std::optional<uint64_t> read_count(const fs::path& path) {
  const auto text = first_line(path);
  uint64_t value = 0;
  if (!text) return std::nullopt;
  const auto [end, code] = std::from_chars(text->data(), text->data() + text->size(), value);
  return code == std::errc{} && end == text->data() + text->size() ? std::optional(value) : std::nullopt;
}

// Package domains are "intel-rapl:N"; their parts "intel-rapl:N:M" are contained in them, and the
// platform's ("psys") contains them.
bool is_package(const fs::path& folder) {
  const std::string name = folder.filename().string();
  if (!name.starts_with("intel-rapl:") || std::count(name.begin(), name.end(), ':') != 1) return false;
  return first_line(folder / "name").value_or("").starts_with("package");
}

}  // namespace

EnergyMeter::EnergyMeter(const fs::path& root) {
  const fs::path folder = root / "sys/class/powercap";
  std::error_code error;
  fs::path unreadable;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (!is_package(entry.path())) continue;
    const fs::path counter = entry.path() / "energy_uj";
    const auto now = read_count(counter), range = read_count(entry.path() / "max_energy_range_uj");
    if (now && range && *range > 0)
      packages_.push_back({counter, *range, *now, 0});
    else
      unreadable = counter;
  }
  // A sum that lacks a package would be wrong without saying so.
  if (!unreadable.empty()) {
    packages_.clear();
    why_not_ = concat(unreadable.string(), " cannot be read (usually by root only)");
  } else if (packages_.empty()) {
    why_not_ = concat(folder.string(), " has no energy counters");
  }
}

double EnergyMeter::joules() {
  uint64_t sum = 0;
  for (Package& package : packages_) {
    if (const auto now = read_count(package.counter)) {
      package.used += *now >= package.last ? *now - package.last : package.range - package.last + *now;
      package.last = *now;
    }
    sum += package.used;
  }
  return static_cast<double>(sum) * 1e-6;
}

}  // namespace duet
