// Energy counters of the processor packages (RAPL, by way of Linux powercap; AMD shows the same).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace duet {

// Sums the energy of all packages. Counters wrap around: ask for joules() at least once per wrap
// (hours at usual power).
class EnergyMeter {
 public:
  // `root` is the root of the file tree, so that tests can show any machine.
  explicit EnergyMeter(const std::filesystem::path& root = "/");

  // False where there are no counters or they cannot be read; why_not() then says which.
  bool available() const { return !packages_.empty(); }
  const std::string& why_not() const { return why_not_; }

  // Joules used by all packages since construction; 0 when not available. A counter that can no
  // longer be read keeps its last value.
  double joules();

 private:
  struct Package {
    std::filesystem::path counter;  // energy_uj
    uint64_t range, last, used;     // microjoules; the counter runs from 0 to range
  };
  std::vector<Package> packages_;
  std::string why_not_;
};

}  // namespace duet
