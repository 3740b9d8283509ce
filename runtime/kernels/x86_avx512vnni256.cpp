// The AVX-VNNI kernels in the EVEX encoding of AVX-512 VL: the same sources and arithmetic, so that
// they can be tested on processors that have AVX-512 but not AVX-VNNI. Never the default.
#include "runtime/kernels/x86_vnni256.h"

namespace duet {

void add_avx512vnni256(KernelTable& table) { set_vnni256(table); }

}  // namespace duet
