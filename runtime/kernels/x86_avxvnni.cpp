// AVX-VNNI: 256-bit VEX encoding.
#include "runtime/kernels/x86_vnni256.h"

namespace duet {

void add_avxvnni(KernelTable& table) { set_vnni256(table); }

}  // namespace duet
