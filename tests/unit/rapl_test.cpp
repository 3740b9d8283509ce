// Energy counters as file trees.
#include "base/rapl.h"

#include <doctest/doctest.h>

#include "base/error.h"
#include "tests/support/gguf_builder.h"

using namespace duet;
using namespace duet::test;

namespace {

struct Machine {
  TempFolder root;

  void domain(const std::string& domain, const std::string& name, const std::string& energy, const std::string& range) const {
    const std::string folder = "sys/class/powercap/" + domain;
    write_text(root / (folder + "/name"), name + "\n");
    if (!energy.empty()) write_text(root / (folder + "/energy_uj"), energy + "\n");
    write_text(root / (folder + "/max_energy_range_uj"), range + "\n");
  }
  EnergyMeter meter() const { return EnergyMeter(root.path()); }
};

}  // namespace

TEST_CASE("rapl: packages are summed, their parts and the platform are not") {
  const Machine m;
  m.domain("intel-rapl:0", "package-0", "1000000", "262143328850");
  m.domain("intel-rapl:0:0", "core", "500000", "262143328850");
  m.domain("intel-rapl:1", "package-1", "7000000", "262143328850");
  m.domain("intel-rapl:2", "psys", "9000000", "262143328850");
  m.domain("dtpm", "other", "1", "2");
  EnergyMeter meter = m.meter();
  REQUIRE(meter.available());
  CHECK(meter.joules() == 0.0);
  m.domain("intel-rapl:0", "package-0", "3500000", "262143328850");
  m.domain("intel-rapl:0:0", "core", "900000", "262143328850");
  m.domain("intel-rapl:1", "package-1", "7250000", "262143328850");
  m.domain("intel-rapl:2", "psys", "19000000", "262143328850");
  CHECK(meter.joules() == doctest::Approx(2.75));
}

TEST_CASE("rapl: a counter that wraps around goes on") {
  const Machine m;
  m.domain("intel-rapl:0", "package-0", "9000000", "10000000");
  EnergyMeter meter = m.meter();
  m.domain("intel-rapl:0", "package-0", "500000", "10000000");
  CHECK(meter.joules() == doctest::Approx(1.5));
  m.domain("intel-rapl:0", "package-0", "700000", "10000000");
  CHECK(meter.joules() == doctest::Approx(1.7));
  m.domain("intel-rapl:0", "package-0", "100000", "10000000");
  CHECK(meter.joules() == doctest::Approx(11.1));
}

TEST_CASE("rapl: absent, unreadable and damaged counters say so") {
  const Machine none;
  CHECK_FALSE(none.meter().available());
  CHECK(none.meter().why_not().find("no energy counters") != std::string::npos);
  CHECK(none.meter().joules() == 0.0);

  const Machine partly;  // one of two: a sum would be wrong
  partly.domain("intel-rapl:0", "package-0", "1000", "10000");
  partly.domain("intel-rapl:1", "package-1", "", "10000");
  CHECK_FALSE(partly.meter().available());
  CHECK(partly.meter().why_not().find("intel-rapl:1/energy_uj") != std::string::npos);

  const Machine damaged;
  damaged.domain("intel-rapl:0", "package-0", "12 apples", "10000");
  CHECK_FALSE(damaged.meter().available());
  const Machine no_range;
  no_range.domain("intel-rapl:0", "package-0", "12", "0");
  CHECK_FALSE(no_range.meter().available());
}
