// Runs a check on the kernel table of one instruction set, or skips where it cannot run.
#pragma once

#include <string>

#include "runtime/kernels/kernels.h"
#include "tests/support/skip.h"

namespace duet::test {

inline const KernelTable* usable_table(std::string_view isa) {
  for (const KernelTable* table : usable_kernels()) {
    if (isa == table->isa) return table;
  }
  return nullptr;
}

inline void with_isa(const char* isa, void (*check)(const KernelTable&)) {
  const KernelTable* table = usable_table(isa);
  if (table == nullptr) DUET_SKIP("this processor cannot run " + std::string(isa));
  check(*table);
}

}  // namespace duet::test
