// AVX2 kernels of the 256-element formats.
#include "runtime/kernels/x86_avx2_iq.h"

namespace duet {

void add_avx2_k(KernelTable& table) {
  set_k_256(table);
  set_iq_256(table);
}

}  // namespace duet
