// Weight blocks as kernels read them: units of 32 elements become eight words of four signed bytes in their order,
// with integer scales and minimums for each 16 (formats of super-blocks). Layouts: quant/format.h; what each field means
// is told by quant/*.cpp.
//
//   Codec<Block>::kSuper       a super-block of 8 units, else a block is one unit
//   Codec<Block>::kHasMin      d * scale * q - dmin * min, without super-blocks d * q + m
//   Codec<Block>::kOneScale    both halves of a unit have the same scale
//   Codec<Block>::unit(p, g)   unit g of the block at p
//   Codec<Block>::d(p), m(p)   its units
#pragma once

#include "quant/format.h"
#include "runtime/cuda/portable.h"

namespace duet::gpu::device {

struct Unit {
  uint32_t q[8];
  int32_t scale[2], min[2];
};

constexpr uint32_t kEach = 0x01010101u;  // one in every byte

// ---- loads: from even addresses, or as blocks of this size and the alignment of a matrix allow ----
__device__ __forceinline__ uint32_t load_u16(const uint8_t* p) { return __ldg(reinterpret_cast<const uint16_t*>(p)); }

template <size_t kBlockBytes, uint32_t kWords>
__device__ __forceinline__ void load_words(const uint8_t* p, uint32_t* out) {
  if constexpr (kBlockBytes % 16 == 0 && kWords % 4 == 0) {  // all that is loaded so lies at multiples of 16
    for (uint32_t i = 0; i < kWords; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  } else if constexpr (kBlockBytes % 4 == 0) {
    for (uint32_t i = 0; i < kWords; ++i) out[i] = __ldg(reinterpret_cast<const uint32_t*>(p) + i);
  } else {
    const auto odd = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 2);
    const auto* words = reinterpret_cast<const uint32_t*>(p - odd);
    uint32_t low = __ldg(words);
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t high = i + 1 < kWords || odd != 0 ? __ldg(words + i + 1) : 0;
      out[i] = __funnelshift_r(low, high, 8 * odd);
      low = high;
    }
  }
}

// ---- four bytes at once ----------------------------------------------------------------------------
// Bytes of at most 127 less k.
__device__ __forceinline__ uint32_t less(uint32_t bytes, uint32_t k) {
  return ((bytes | 0x80 * kEach) - k * kEach) ^ 0x80 * kEach;
}
// Bit i of four in byte i.
__device__ __forceinline__ uint32_t spread(uint32_t bits) { return ((bits & 15) * 0x00204081u) & kEach; }
// Bytes negated where signs has a bit; none is 0.
__device__ __forceinline__ uint32_t negate(uint32_t bytes, uint32_t signs) {
  const uint32_t ones = spread(signs);
  return (bytes ^ (ones * 255)) + ones;
}

// Low nibbles to q[0..3], high ones to q[4..7].
__device__ __forceinline__ void split_nibbles(const uint32_t words[4], uint32_t* q) {
  for (uint32_t i = 0; i < 4; ++i) {
    q[i] = words[i] & 15 * kEach;
    q[i + 4] = words[i] >> 4 & 15 * kEach;
  }
}

// Levels of IQ4 of four bytes below 16.
__device__ __forceinline__ uint32_t iq4_levels(uint32_t nibbles) {
  constexpr auto word = [](int i) {
    uint32_t out = 0;
    for (int j = 0; j < 4; ++j) out |= static_cast<uint32_t>(static_cast<uint8_t>(kIq4Levels[4 * i + j])) << (8 * j);
    return out;
  };
  constexpr uint32_t kWord0 = word(0), kWord1 = word(1), kWord2 = word(2), kWord3 = word(3);
  uint32_t selector = nibbles & 7 * kEach;
  selector = (selector | selector >> 4) & 0x00ff00ffu;
  selector = (selector | selector >> 8) & 0xffffu;
  const uint32_t upper = (nibbles >> 3 & kEach) * 255;
  return (__byte_perm(kWord0, kWord1, selector) & ~upper) | (__byte_perm(kWord2, kWord3, selector) & upper);
}

template <class Block>
struct Codec;

// ---- blocks of 32 ----------------------------------------------------------------------------------
template <class Block, uint32_t kOffset, bool kMin>
struct Block32 {
  static constexpr bool kSuper = false, kHasMin = kMin, kOneScale = true;
  static __device__ __forceinline__ float d(const uint8_t* p) { return half_to_float(static_cast<uint16_t>(load_u16(p))); }
  static __device__ __forceinline__ float m(const uint8_t* p) {
    return kMin ? half_to_float(static_cast<uint16_t>(load_u16(p + 2))) : 0.0f;
  }
  template <uint32_t kWords>
  static __device__ __forceinline__ void load(const uint8_t* p, uint32_t at, uint32_t* out) {
    load_words<sizeof(Block), kWords>(p + at, out);
  }
  // Nibbles, with a fifth bit each where bits are given.
  static __device__ __forceinline__ void nibbles(const uint8_t* p, uint32_t at, uint32_t bits, Unit& u) {
    uint32_t words[4];
    load<4>(p, at, words);
    split_nibbles(words, u.q);
    for (uint32_t i = 0; i < 8; ++i) {
      u.q[i] |= spread(bits >> (4 * i)) << 4;
      if (kOffset > 0) u.q[i] = less(u.q[i], kOffset);
    }
  }
};

template <>
struct Codec<BlockQ4_0> : Block32<BlockQ4_0, 8, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t, Unit& u) { nibbles(p, 2, 0, u); }
};
template <>
struct Codec<BlockQ4_1> : Block32<BlockQ4_1, 0, true> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t, Unit& u) { nibbles(p, 4, 0, u); }
};
template <>
struct Codec<BlockQ5_0> : Block32<BlockQ5_0, 16, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t, Unit& u) {
    nibbles(p, 6, load_u16(p + 2) | load_u16(p + 4) << 16, u);
  }
};
template <>
struct Codec<BlockQ5_1> : Block32<BlockQ5_1, 0, true> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t, Unit& u) {
    nibbles(p, 8, load_u16(p + 4) | load_u16(p + 6) << 16, u);
  }
};
template <>
struct Codec<BlockQ8_0> : Block32<BlockQ8_0, 0, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t, Unit& u) { load<8>(p, 2, u.q); }
};
template <>
struct Codec<BlockIQ4_NL> : Block32<BlockIQ4_NL, 0, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t, Unit& u) {
    nibbles(p, 2, 0, u);
    for (uint32_t& q : u.q) q = iq4_levels(q);
  }
};

// ---- super-blocks ----------------------------------------------------------------------------------
template <class Block, uint32_t kDAt, bool kMin, bool kSame>
struct Super {
  static constexpr bool kSuper = true, kHasMin = kMin, kOneScale = kSame;
  static __device__ __forceinline__ float d(const uint8_t* p) { return half_to_float(static_cast<uint16_t>(load_u16(p + kDAt))); }
  static __device__ __forceinline__ float m(const uint8_t* p) {
    return kMin ? half_to_float(static_cast<uint16_t>(load_u16(p + kDAt + 2))) : 0.0f;
  }
  template <uint32_t kWords>
  static __device__ __forceinline__ void load(const uint8_t* p, uint32_t at, uint32_t* out) {
    load_words<sizeof(Block), kWords>(p + at, out);
  }
  // Two bits of each of 32 bytes: elements 128 h + 32 k + l are bits 2 k of byte 32 h + l.
  static __device__ __forceinline__ void two_bits(const uint8_t* p, uint32_t at, uint32_t g, Unit& u) {
    load<8>(p, at + 32 * (g / 4), u.q);
    for (uint32_t& q : u.q) q = q >> (2 * (g % 4)) & 3 * kEach;
  }
  // Scales and minimums of Q4_K and Q5_K: 6 bits each, in 12 bytes.
  static __device__ __forceinline__ void six_bits(const uint8_t* p, uint32_t g, Unit& u) {
    uint32_t words[3];
    load<3>(p, 4, words);
    const uint32_t shift = 8 * (g % 4), scales = words[0] >> shift & 255, mins = words[1] >> shift & 255, low = words[2] >> shift & 255;
    u.scale[0] = u.scale[1] = static_cast<int32_t>(g < 4 ? scales & 63 : (low & 15) | (scales >> 6) << 4);
    u.min[0] = u.min[1] = static_cast<int32_t>(g < 4 ? mins & 63 : low >> 4 | (mins >> 6) << 4);
  }
  static __device__ __forceinline__ void nibbles(const uint8_t* p, uint32_t at, uint32_t high, Unit& u) {
    load<8>(p, at, u.q);
    for (uint32_t& q : u.q) q = q >> (4 * high) & 15 * kEach;
  }
};

template <>
struct Codec<BlockQ2_K> : Super<BlockQ2_K, 80, true, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    two_bits(p, 16, g, u);
    const uint32_t scales = load_u16(p + 2 * g);
    for (uint32_t i = 0; i < 2; ++i) {
      u.scale[i] = static_cast<int32_t>(scales >> (8 * i) & 15);
      u.min[i] = static_cast<int32_t>(scales >> (8 * i + 4) & 15);
    }
  }
};
template <>
struct Codec<BlockQ3_K> : Super<BlockQ3_K, 108, false, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    two_bits(p, 32, g, u);
    uint32_t high[8];
    load<8>(p, 0, high);
    for (uint32_t i = 0; i < 8; ++i) u.q[i] = less(u.q[i] | (high[i] >> g & kEach) << 2, 4);
    const uint32_t low = load_u16(p + 96 + 2 * (g % 4)), top = load_u16(p + 104 + 2 * (g % 2));
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t bits = (low >> (8 * i + 4 * (g / 4)) & 15) | (top >> (8 * i + 2 * (g / 2)) & 3) << 4;
      u.scale[i] = static_cast<int32_t>(bits) - 32;
    }
  }
};
template <>
struct Codec<BlockQ4_K> : Super<BlockQ4_K, 0, true, true> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    nibbles(p, 16 + 32 * (g / 2), g % 2, u);
    six_bits(p, g, u);
  }
};
template <>
struct Codec<BlockQ5_K> : Super<BlockQ5_K, 0, true, true> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    nibbles(p, 48 + 32 * (g / 2), g % 2, u);
    uint32_t fifth[8];
    load<8>(p, 16, fifth);
    for (uint32_t i = 0; i < 8; ++i) u.q[i] |= (fifth[i] >> g & kEach) << 4;
    six_bits(p, g, u);
  }
};
template <>
struct Codec<BlockQ6_K> : Super<BlockQ6_K, 208, false, false> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    const uint32_t half = g / 4, part = g % 4;
    nibbles(p, 64 * half + 32 * (part % 2), part / 2, u);
    uint32_t high[8];
    load<8>(p, 128 + 32 * half, high);
    for (uint32_t i = 0; i < 8; ++i) u.q[i] = less(u.q[i] | (high[i] >> (2 * part) & 3 * kEach) << 4, 32);
    const uint32_t scales = load_u16(p + 192 + 2 * g);
    for (uint32_t i = 0; i < 2; ++i) u.scale[i] = static_cast<int8_t>(scales >> (8 * i));
  }
};
template <>
struct Codec<BlockIQ4_XS> : Super<BlockIQ4_XS, 0, false, true> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    uint32_t words[4];
    load<4>(p, 8 + 16 * g, words);
    split_nibbles(words, u.q);
    for (uint32_t& q : u.q) q = iq4_levels(q);
    const uint32_t low = __ldg(p + 4 + g / 2) >> (4 * (g % 2)) & 15, high = load_u16(p + 2) >> (2 * g) & 3;
    u.scale[0] = u.scale[1] = static_cast<int32_t>(low | high << 4) - 32;
  }
};

}  // namespace duet::gpu::device
