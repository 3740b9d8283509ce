// Units of the codebook formats and the ternary ones (quant/iq_blocks.cpp has the arithmetic).
#pragma once

#include "quant/iq_grids.h"
#include "runtime/cuda/blocks.cuh"

namespace duet::gpu::device {

// Entries of a codebook as words of four values.
template <size_t kSize>
struct Grid {
  uint32_t words[kSize];
};

template <size_t kEntries, size_t kBits, size_t kWords, size_t kLevels>
constexpr Grid<kEntries * kWords> make_grid(const uint16_t (&packed)[kEntries], const int8_t (&levels)[kLevels]) {
  Grid<kEntries * kWords> out{};
  for (size_t i = 0; i < kEntries; ++i)
    for (size_t j = 0; j < 4 * kWords; ++j) {
      const auto level = static_cast<uint8_t>(levels[(packed[i] >> (kBits * j)) & ((1u << kBits) - 1)]);
      out.words[i * kWords + j / 4] |= static_cast<uint32_t>(level) << (8 * (j % 4));
    }
  return out;
}

constexpr int8_t kLevels2[4] = {8, 25, 43, 0}, kLevels1[4] = {-8, 0, 8, 0};
constexpr int8_t kLevels3Xxs[8] = {4, 12, 20, 28, 36, 44, 52, 62}, kLevels3S[8] = {1, 3, 5, 7, 9, 11, 13, 15};

static __device__ const Grid<512> kGrid2Xxs = make_grid<256, 2, 2>(kIq2XxsPacked, kLevels2);
static __device__ const Grid<1024> kGrid2Xs = make_grid<512, 2, 2>(kIq2XsPacked, kLevels2);
static __device__ const Grid<2048> kGrid2S = make_grid<1024, 2, 2>(kIq2SPacked, kLevels2);
static __device__ const Grid<256> kGrid3Xxs = make_grid<256, 3, 1>(kIq3XxsPacked, kLevels3Xxs);
static __device__ const Grid<512> kGrid3S = make_grid<512, 3, 1>(kIq3SPacked, kLevels3S);
static __device__ const Grid<4096> kGrid1 = make_grid<2048, 2, 2>(kIq1Packed, kLevels1);

template <class Block, uint32_t kDAt, bool kSame, int kFraction>
struct Codebook : Super<Block, kDAt, false, kSame> {
  using Base = Super<Block, kDAt, false, kSame>;
  static __device__ __forceinline__ float d(const uint8_t* p) { return Base::d(p) * (1.0f / kFraction); }
  static __device__ __forceinline__ void odd_scale(uint32_t s, uint32_t half, Unit& u) { u.scale[half] = static_cast<int32_t>(2 * s + 1); }
  static __device__ __forceinline__ void odd_scales(uint32_t first, uint32_t second, Unit& u) {
    odd_scale(first, 0, u);
    odd_scale(second, 1, u);
  }
  // Values 8 l .. 8 l + 7 of the unit.
  static __device__ __forceinline__ void set(uint32_t l, uint32_t first, uint32_t second, uint32_t signs, Unit& u) {
    u.q[2 * l] = negate(first, signs);
    u.q[2 * l + 1] = negate(second, signs >> 4);
  }
  // Seven signs; the eighth makes their number even.
  static __device__ __forceinline__ uint32_t even_signs(uint32_t seven) {
    return seven | (static_cast<uint32_t>(__popc(seven)) & 1) << 7;
  }
  // An eighth, times 8, more or less.
  static __device__ __forceinline__ void set_ternary(uint32_t l, uint32_t index, bool minus, Unit& u) {
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t biased = __ldg(kGrid1.words + 2 * index + i) ^ 0x80 * kEach;
      u.q[2 * l + i] = (minus ? biased - kEach : biased + kEach) ^ 0x80 * kEach;
    }
  }
};

template <>
struct Codec<BlockIQ2_XXS> : Codebook<BlockIQ2_XXS, 0, true, 8> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    uint32_t words[2];
    load<2>(p, 2 + 8 * g, words);
    odd_scales(words[1] >> 28, words[1] >> 28, u);
    for (uint32_t l = 0; l < 4; ++l) {
      const uint32_t* entry = kGrid2Xxs.words + 2 * (words[0] >> (8 * l) & 255);
      set(l, __ldg(entry), __ldg(entry + 1), even_signs(words[1] >> (7 * l) & 127), u);
    }
  }
};
template <>
struct Codec<BlockIQ2_XS> : Codebook<BlockIQ2_XS, 0, false, 8> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    const uint32_t scales = __ldg(p + 66 + g);
    odd_scales(scales & 15, scales >> 4, u);
    for (uint32_t l = 0; l < 4; ++l) {
      const uint32_t bits = load_u16(p + 2 + 8 * g + 2 * l);
      const uint32_t* entry = kGrid2Xs.words + 2 * (bits & 511);
      set(l, __ldg(entry), __ldg(entry + 1), even_signs(bits >> 9), u);
    }
  }
};
template <>
struct Codec<BlockIQ2_S> : Codebook<BlockIQ2_S, 0, false, 8> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    const uint32_t scales = __ldg(p + 74 + g), high = __ldg(p + 66 + g);
    odd_scales(scales & 15, scales >> 4, u);
    for (uint32_t l = 0; l < 4; ++l) {
      const uint32_t* entry = kGrid2S.words + 2 * (__ldg(p + 2 + 4 * g + l) | (high >> (2 * l) & 3) << 8);
      set(l, __ldg(entry), __ldg(entry + 1), __ldg(p + 34 + 4 * g + l), u);
    }
  }
};
template <>
struct Codec<BlockIQ3_XXS> : Codebook<BlockIQ3_XXS, 0, true, 4> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    uint32_t word;
    load<1>(p, 66 + 4 * g, &word);
    odd_scales(word >> 28, word >> 28, u);
    for (uint32_t l = 0; l < 4; ++l) {
      const uint32_t indices = load_u16(p + 2 + 8 * g + 2 * l);
      set(l, __ldg(kGrid3Xxs.words + (indices & 255)), __ldg(kGrid3Xxs.words + (indices >> 8)), even_signs(word >> (7 * l) & 127), u);
    }
  }
};
template <>
struct Codec<BlockIQ3_S> : Codebook<BlockIQ3_S, 0, true, 1> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    const uint32_t scale = __ldg(p + 106 + g / 2) >> (4 * (g % 2)) & 15, high = __ldg(p + 66 + g);
    odd_scales(scale, scale, u);
    for (uint32_t l = 0; l < 4; ++l) {
      const uint32_t indices = load_u16(p + 2 + 8 * g + 2 * l), top = high >> (2 * l);
      const uint32_t first = (indices & 255) | (top & 1) << 8, second = indices >> 8 | (top >> 1 & 1) << 8;
      set(l, __ldg(kGrid3S.words + first), __ldg(kGrid3S.words + second), __ldg(p + 74 + 4 * g + l), u);
    }
  }
};
template <>
struct Codec<BlockIQ1_S> : Codebook<BlockIQ1_S, 0, true, 8> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    const uint32_t high = load_u16(p + 34 + 2 * g);
    odd_scales(high >> 12 & 7, high >> 12 & 7, u);
    for (uint32_t l = 0; l < 4; ++l)
      set_ternary(l, __ldg(p + 2 + 4 * g + l) | (high >> (3 * l) & 7) << 8, (high & 0x8000) != 0, u);
  }
};
template <>
struct Codec<BlockIQ1_M> : Codebook<BlockIQ1_M, 0, false, 8> {
  static __device__ __forceinline__ float d(const uint8_t* p) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 4; ++i) bits |= (load_u16(p + 48 + 2 * i) >> 12) << (4 * i);
    return half_to_float(static_cast<uint16_t>(bits)) * 0.125f;
  }
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    const uint32_t scales = load_u16(p + 48 + 2 * (g / 2)) >> (6 * (g % 2)), high = load_u16(p + 32 + 2 * g);
    odd_scales(scales & 7, scales >> 3 & 7, u);
    for (uint32_t l = 0; l < 4; ++l) {
      const uint32_t nibble = high >> (4 * l) & 15;
      set_ternary(l, __ldg(p + 4 * g + l) | (nibble & 7) << 8, (nibble & 8) != 0, u);
    }
  }
};

// Five base-3 digits a byte, as a fraction of 256, most significant first: 32 bytes for 160 values, 16 for 80, 4 for
// 16 of four digits.
template <>
struct Codec<BlockTQ1_0> : Codebook<BlockTQ1_0, 52, true, 1> {
  static __device__ __forceinline__ uint32_t value(const uint8_t* p, uint32_t i) {
    uint32_t byte, digit;
    if (i < 160) byte = __ldg(p + i % 32), digit = i / 32;
    else if (i < 240) byte = __ldg(p + 32 + i % 16), digit = (i - 160) / 16;
    else byte = __ldg(p + 48 + i % 4), digit = (i - 240) / 4;
    for (; digit > 0; --digit) byte = byte * 3 & 255;
    return (byte * 3 >> 8) - 1;
  }
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    u.scale[0] = u.scale[1] = 1;
    for (uint32_t i = 0; i < 8; ++i) {
      u.q[i] = 0;
      for (uint32_t j = 0; j < 4; ++j) u.q[i] |= (value(p, 32 * g + 4 * i + j) & 255) << (8 * j);
    }
  }
};
template <>
struct Codec<BlockTQ2_0> : Codebook<BlockTQ2_0, 64, true, 1> {
  static __device__ __forceinline__ void unit(const uint8_t* p, uint32_t g, Unit& u) {
    two_bits(p, 0, g, u);
    for (uint32_t& q : u.q) q = less(q, 1);
    u.scale[0] = u.scale[1] = 1;
  }
};

}  // namespace duet::gpu::device
