#include "base/error.h"
#include "runtime/kernels/kernels.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

struct Isa {
  const char* name;
  CpuFeatures needs;
  void (*fill)(KernelTable&);
};

void fill_plain(KernelTable& table) {
  fill_scalar(table);
  add_scalar_peak(table);
}

#if defined(__x86_64__)
constexpr CpuFeatures kAvx2Needs = kCpuAvx2 | kCpuFma | kCpuF16c;

void fill_avx2(KernelTable& table) {
  fill_plain(table);
  add_avx2_block32(table);
  add_avx2_k(table);
  add_avx2_float(table);
  add_avx2_peak(table);
}

void fill_avxvnni(KernelTable& table) {
  fill_avx2(table);
  add_avxvnni(table);
}

void fill_avx512vnni256(KernelTable& table) {
  fill_avx2(table);
  add_avx512vnni256(table);
}

void fill_avx512(KernelTable& table) {
  fill_avx2(table);
  add_avx512_block32(table);
  add_avx512_float(table);
  add_avx512_k(table);
  add_avx512_peak(table);
}
#elif defined(__aarch64__)
void fill_neon(KernelTable& table) {
  fill_scalar(table);
  add_neon_block32(table);
  add_neon_k(table);
  add_neon_float(table);
  add_neon_peak(table);
}
#endif

// Best first; the last one runs everywhere. AVX-512 without VNNI uses the AVX2 table. avx512vnni256
// is there to test the code of avxvnni; wherever it runs, avx512 comes first.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", kAvx2Needs | kCpuAvx512 | kCpuAvx512Vnni, fill_avx512},
    {"avxvnni", kAvx2Needs | kCpuAvxVnni, fill_avxvnni},
    {"avx512vnni256", kAvx2Needs | kCpuAvx512 | kCpuAvx512Vnni, fill_avx512vnni256},
    {"avx2", kAvx2Needs, fill_avx2},
#elif defined(__aarch64__)
    {"neon", kCpuNeonDot, fill_neon},
#endif
    {"scalar", 0, fill_plain},
};
constexpr size_t kIsaCount = std::size(kIsas);

struct Tables {
  KernelTable storage[kIsaCount] = {};
  std::vector<const KernelTable*> usable;

  Tables() {
    const CpuFeatures present = detect_cpu_features();
    for (size_t i = 0; i < kIsaCount; ++i) {
      const Isa& isa = kIsas[i];
      if ((isa.needs & ~present) != 0) continue;
      isa.fill(storage[i]);
      storage[i].isa = isa.name;
      storage[i].needs = isa.needs;
      usable.push_back(&storage[i]);
    }
  }
};

const Tables& tables() {
  static const Tables built;
  return built;
}

std::string usable_names() {
  std::string out;
  for (const KernelTable* table : tables().usable)
    out += (out.empty() ? "" : ", ") + std::string(table->isa);
  return out;
}

}  // namespace

std::span<const KernelTable* const> usable_kernels() { return tables().usable; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> out;
  for (const Isa& isa : kIsas) out.emplace_back(isa.name);
  return out;
}

const KernelTable& select_kernels(std::string_view isa) {
  if (isa.empty()) return *tables().usable.front();
  for (const KernelTable* table : tables().usable) {
    if (isa == table->isa) return *table;
  }
  for (const Isa& known : kIsas) {
    if (isa != known.name) continue;
    fail(ErrorKind::unsupported, "instruction set '", isa, "' needs ",
         cpu_feature_names(known.needs), ", this machine has ",
         cpu_feature_names(detect_cpu_features()), "; usable here: ", usable_names());
  }
  fail(ErrorKind::unsupported, "unknown instruction set '", isa,
       "'; usable here: ", usable_names());
}

}  // namespace duet
