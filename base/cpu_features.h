// What the processor and the operating system together allow (cpuid and xgetbv; Linux's hardware
// capabilities on ARM).
#pragma once

#include <cstdint>
#include <string>

namespace duet {

// Bits of CpuFeatures.
enum CpuFeature : uint32_t {
  kCpuAvx2 = 1u << 0,
  kCpuFma = 1u << 1,
  kCpuF16c = 1u << 2,
  kCpuAvx512 = 1u << 3,      // F + BW + DQ + VL
  kCpuAvx512Vnni = 1u << 4,
  kCpuAvx512Bf16 = 1u << 5,
  kCpuAvxVnni = 1u << 6,     // 256-bit VEX form
  kCpuAmxInt8 = 1u << 7,
  kCpuAmxBf16 = 1u << 8,
  kCpuNeonDot = 1u << 9,     // sdot, udot
};
using CpuFeatures = uint32_t;

// Features usable now: an extension whose registers the OS does not save is absent. 0 off x86
// and Linux on 64-bit ARM.
CpuFeatures detect_cpu_features();

// "avx2 fma f16c"; empty set -> "none".
std::string cpu_feature_names(CpuFeatures features);

// Brand string of the processor, "unknown" where there is none.
std::string cpu_model_name();

}  // namespace duet
