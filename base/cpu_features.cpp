#include "base/cpu_features.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace duet {
namespace {

struct FeatureName {
  CpuFeature bit;
  const char* name;
};
constexpr std::array kNames = {
    FeatureName{kCpuAvx2, "avx2"},
    FeatureName{kCpuFma, "fma"},
    FeatureName{kCpuF16c, "f16c"},
    FeatureName{kCpuAvx512, "avx512"},
    FeatureName{kCpuAvx512Vnni, "avx512_vnni"},
    FeatureName{kCpuAvx512Bf16, "avx512_bf16"},
    FeatureName{kCpuAvxVnni, "avx_vnni"},
    FeatureName{kCpuAmxInt8, "amx_int8"},
    FeatureName{kCpuAmxBf16, "amx_bf16"},
    FeatureName{kCpuNeonDot, "neon_dotprod"},
};

#if defined(__x86_64__)
struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

uint64_t xgetbv0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr bool bit(uint32_t word, int i) { return ((word >> i) & 1u) != 0; }
#endif

}  // namespace

CpuFeatures detect_cpu_features() {
  CpuFeatures out = 0;
#if defined(__x86_64__)
  const Registers r1 = cpuid(1, 0);
  if (!bit(r1.ecx, 27)) return 0;  // OSXSAVE: without it the OS saves no wide registers
  const uint64_t saved = xgetbv0();
  const bool os_avx = (saved & 0x6) == 0x6;          // XMM, YMM
  const bool os_avx512 = (saved & 0xe6) == 0xe6;     // + opmask, ZMM
  const bool os_amx = (saved & 0x60000) == 0x60000;  // tile config, tile data
  const Registers r7 = cpuid(7, 0), r71 = cpuid(7, 1);
  auto set = [&](bool present, CpuFeature feature) { out |= present ? feature : 0u; };
  set(os_avx && bit(r7.ebx, 5), kCpuAvx2);
  set(os_avx && bit(r1.ecx, 12), kCpuFma);
  set(os_avx && bit(r1.ecx, 29), kCpuF16c);
  set(os_avx && bit(r71.eax, 4), kCpuAvxVnni);
  const bool avx512 =
      os_avx512 && bit(r7.ebx, 16) && bit(r7.ebx, 17) && bit(r7.ebx, 30) && bit(r7.ebx, 31);
  set(avx512, kCpuAvx512);
  set(avx512 && bit(r7.ecx, 11), kCpuAvx512Vnni);
  set(avx512 && bit(r71.eax, 5), kCpuAvx512Bf16);
  set(os_amx && bit(r7.edx, 25), kCpuAmxInt8);
  set(os_amx && bit(r7.edx, 22), kCpuAmxBf16);
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kNeeded = HWCAP_ASIMD | HWCAP_ASIMDDP;
  if ((getauxval(AT_HWCAP) & kNeeded) == kNeeded) out |= kCpuNeonDot;
#endif
  return out;
}

std::string cpu_feature_names(CpuFeatures features) {
  std::string out;
  for (const FeatureName& f : kNames) {
    if ((features & f.bit) == 0) continue;
    if (!out.empty()) out += ' ';
    out += f.name;
  }
  return out.empty() ? "none" : out;
}

std::string cpu_model_name() {
#if defined(__x86_64__)
  if (cpuid(0x80000000u, 0).eax < 0x80000004u) return "unknown";
  std::array<char, 49> brand{};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i, 0);
    std::memcpy(brand.data() + 16 * i, &r, 16);
  }
  std::string name = brand.data();
  while (!name.empty() && name.back() == ' ') name.pop_back();
  return name.empty() ? "unknown" : name;
#else
  return "unknown";
#endif
}

}  // namespace duet
