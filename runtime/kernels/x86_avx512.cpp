// AVX-512 (F, BW, DQ, VL, VNNI): formats with blocks of 32. 256-bit registers: a block fills one,
// and vpdpbusd replaces the two multiply-adds of AVX2.
#include "runtime/kernels/x86_block32.h"

namespace duet {
namespace {

struct DotVnni {
  static DUET_INLINE __m256i dot(__m256i u, __m256i s) {
    return _mm256_dpbusd_epi32(__m256i{}, u, s);
  }
};

}  // namespace

void add_avx512_block32(KernelTable& table) { set_block32<DotVnni>(table); }

}  // namespace duet
