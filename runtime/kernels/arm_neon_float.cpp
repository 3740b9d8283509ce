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
  static DUET_INLINE void store_f16(void* p, Batch v) {
    const uint16x4_t half = vreinterpret_u16_f16(vcvt_f16_f32(v));
    __builtin_memcpy(p, &half, 8);
  }
  // 16-bit integers, two to a lane.
  using Int = int32x4_t;
  static DUET_INLINE Int zero() { return vdupq_n_s32(0); }
  static DUET_INLINE Int pair(int32_t two) { return vdupq_n_s32(two); }
  static DUET_INLINE Int widen(const void* p) {
    uint64_t bits;
    __builtin_memcpy(&bits, p, 8);
    return vreinterpretq_s32_s16(vmovl_s8(vcreate_s8(bits)));
  }
  static DUET_INLINE Int dot(Int acc, Int a, Int b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return vaddq_s32(acc, vpaddq_s32(low, vmull_high_s16(x, y)));
  }
  static DUET_INLINE Batch to_float(Int v) { return vcvtq_f32_s32(v); }
  static DUET_INLINE void store_low16(void* p, float32x4_t a, float32x4_t b) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b));
    __builtin_memcpy(p, &low, sizeof low);
  }
  static DUET_INLINE float lane_max(float32x4_t v) { return vmaxvq_f32(v); }
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
