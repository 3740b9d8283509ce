// NEON: float kernels and attention.
#include <arm_neon.h>

#include "runtime/kernels/attention_ops.h"
#include "runtime/kernels/float_ops.h"
#include "runtime/kernels/tables.h"

namespace duet {
namespace {

struct Neon {
  using Arch = xsimd::neon64;
  using Batch = xsimd::batch<float, Arch>;
  static constexpr size_t kRegisters = 32;

  static DUET_INLINE uint16x4_t load16x4(const void* p) {
    uint64_t bits;
    __builtin_memcpy(&bits, p, 8);
    return vcreate_u16(bits);
  }
  static DUET_INLINE Batch load_f16(const void* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(load16x4(p)));
  }
  static DUET_INLINE Batch load_bf16(const void* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(load16x4(p), 16));
  }
  static DUET_INLINE Batch fma(Batch a, Batch b, Batch c) { return vfmaq_f32(c, a, b); }
  static DUET_INLINE Batch fnma(Batch a, Batch b, Batch c) { return vfmsq_f32(c, a, b); }
  static DUET_INLINE Batch load_i8(const void* p) {
    uint32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bits)))));
  }
  static DUET_INLINE Batch broadcast_f16(const void* p) {
    uint16_t half;
    __builtin_memcpy(&half, p, sizeof half);
    return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half)));
  }
  static DUET_INLINE void store_f16(void* p, Batch v) {
    const uint16x4_t half = vreinterpret_u16_f16(vcvt_f16_f32(v));
    __builtin_memcpy(p, &half, 8);
  }
  // (a, b) -> (a c - b s, b c + a s)
  static DUET_INLINE Batch rotate_pairs(float32x4_t x, float32x4_t cs) {
    const float32x4_t negate_first = vreinterpretq_f32_u64(vdupq_n_u64(0x3f800000bf800000u));
    const float32x4_t sine = vmulq_f32(vtrn2q_f32(cs, cs), negate_first);
    return vfmaq_f32(vmulq_f32(vrev64q_f32(x), sine), x, vtrn1q_f32(cs, cs));
  }
  static DUET_INLINE float lane_sum(float32x4_t v) { return vaddvq_f32(v); }
};

}  // namespace

void add_neon_float(KernelTable& table) {
  FloatOps<Neon>::add_to(table);
  AttentionOps<Neon>::add_to(table);
}

}  // namespace duet
