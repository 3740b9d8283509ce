#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "base/error.h"
#include "quant/format.h"
#include "runtime/kernels/kernels.h"

namespace duet {
namespace {

std::string refusal(std::string_view isa) {
  try {
    select_kernels(isa);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::unsupported);
    return e.what();
  }
  return {};
}

TEST_CASE("each usable table can be forced by name, best first, scalar last") {
  const auto usable = usable_kernels();
  REQUIRE(!usable.empty());
  CHECK(&select_kernels("") == usable.front());
  CHECK(std::string(usable.back()->isa) == "scalar");
  for (const KernelTable* table : usable) CHECK(&select_kernels(table->isa) == table);
}

TEST_CASE("usable tables are those whose needs the processor meets") {
  const CpuFeatures present = detect_cpu_features();
  for (const KernelTable* table : usable_kernels()) CHECK((table->needs & ~present) == 0);
#if defined(__x86_64__)
  const CpuFeatures avx2 = kCpuAvx2 | kCpuFma | kCpuF16c;
  const bool forced_works = refusal("avx2").empty();
  CHECK(forced_works == ((present & avx2) == avx2));
#endif
}

TEST_CASE("an unknown instruction set is refused with the usable ones") {
  const std::string message = refusal("sse9");
  CHECK(message.find("'sse9'") != std::string::npos);
  for (const KernelTable* table : usable_kernels())
    CHECK(message.find(table->isa) != std::string::npos);
}

TEST_CASE("a compiled but unusable instruction set is refused by name") {
  for (const std::string& isa : compiled_isas()) {
    const auto usable = usable_kernels();
    const bool can = std::any_of(usable.begin(), usable.end(),
                                 [&](const KernelTable* t) { return isa == t->isa; });
    CHECK(refusal(isa).empty() == can);
  }
}

bool complete(const KernelTable& t) {
  return t.quantize_act32 && t.quantize_act256 && t.rms_norm && t.rope && t.softmax && t.silu_mul &&
         t.peak.int8_macs && t.peak.f32_macs && t.peak.read_sum && t.add && t.add_scaled && t.fit.add_products && t.fit.search_group && t.f32_to_f16 && t.f16_to_f32 && t.attention;
}

TEST_CASE("every table is complete, for every format") {
  for (const KernelTable* table : usable_kernels()) {
    CHECK(complete(*table));
    for (const Format& format : all_formats()) {
      const size_t slot = static_cast<size_t>(format.dtype);
      CHECK((table->matmul[slot] && table->decode_row[slot]));
    }
  }
}

}  // namespace
}  // namespace duet
