#include "quant/iq_blocks.h"

#include <cstring>

#include "quant/f16.h"
#include "quant/iq_grids.h"

namespace duet {
namespace {

constexpr int8_t kLevels2[4] = {8, 25, 43, 0};
constexpr int8_t kLevels3Xxs[8] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr int8_t kLevels3S[8] = {1, 3, 5, 7, 9, 11, 13, 15};
constexpr int8_t kLevels1[4] = {-8, 0, 8, 0};  // -1, 0, 1 times 8, to which +-1 is added

constexpr auto kGrid2Xxs = expand_grid<uint64_t, 256, 2>(kIq2XxsPacked, kLevels2);
constexpr auto kGrid2Xs = expand_grid<uint64_t, 512, 2>(kIq2XsPacked, kLevels2);
constexpr auto kGrid2S = expand_grid<uint64_t, 1024, 2>(kIq2SPacked, kLevels2);
constexpr auto kGrid3Xxs = expand_grid<uint32_t, 256, 3>(kIq3XxsPacked, kLevels3Xxs);
constexpr auto kGrid3S = expand_grid<uint32_t, 512, 3>(kIq3SPacked, kLevels3S);
constexpr auto kGrid1 = expand_grid<uint64_t, 2048, 2>(kIq1Packed, kLevels1);

constexpr uint64_t kOnes = 0x0101010101010101;

// 255 in byte j where bit j is set.
constexpr std::array<uint64_t, 256> make_sign_masks() {
  std::array<uint64_t, 256> out{};
  for (size_t i = 0; i < 256; ++i)
    for (size_t j = 0; j < 8; ++j)
      if (i >> j & 1) out[i] |= uint64_t{255} << (8 * j);
  return out;
}
constexpr auto kSignMasks = make_sign_masks();

// Seven signs; the eighth makes their number even.
constexpr std::array<uint8_t, 128> make_even_signs() {
  std::array<uint8_t, 128> out{};
  for (unsigned i = 0; i < 128; ++i) {
    unsigned parity = 0;
    for (unsigned j = 0; j < 7; ++j) parity ^= i >> j & 1;
    out[i] = static_cast<uint8_t>(i | parity << 7);
  }
  return out;
}
constexpr auto kEvenSigns = make_even_signs();

template <class T>
T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Eight positive bytes, negated where signs has a bit: no byte is 0, so none carries.
void store_signed(uint64_t values, unsigned signs, int8_t* out) {
  const uint64_t mask = kSignMasks[signs];
  const uint64_t v = (values ^ mask) + (mask & kOnes);
  std::memcpy(out, &v, 8);
}

uint64_t both(uint32_t first, uint32_t second) { return first | uint64_t{second} << 32; }

// Scale 2 s + 1 of groups of 16: one nibble each, lower first.
void odd_scales(const uint8_t* nibbles, int8_t* scale) {
  for (size_t i = 0; i < 8; ++i) {
    scale[2 * i] = static_cast<int8_t>(2 * (nibbles[i] & 15) + 1);
    scale[2 * i + 1] = static_cast<int8_t>(2 * (nibbles[i] >> 4) + 1);
  }
}

void same_scale(unsigned s, size_t group32, int8_t* scale) {
  scale[2 * group32] = scale[2 * group32 + 1] = static_cast<int8_t>(2 * s + 1);
}

// Entries of the ternary codebook plus or minus an eighth, all times 8.
void store_ternary(size_t index, bool minus, int8_t* out) {
  const uint64_t grid = kGrid1[index];
  for (size_t j = 0; j < 8; ++j) out[j] = static_cast<int8_t>(static_cast<int8_t>(grid >> (8 * j)) + (minus ? -1 : 1));
}

}  // namespace

// Groups of 32: four bytes of indices, then four times seven signs and a 4-bit scale in a word.
void unpack(const BlockIQ2_XXS& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d) * 0.125f;
  for (size_t g = 0; g < 8; ++g) {
    const auto* at = reinterpret_cast<const uint8_t*>(b.qs + 4 * g);
    const auto word = load<uint32_t>(at + 4);
    same_scale(word >> 28, g, out.scale);
    for (size_t l = 0; l < 4; ++l) store_signed(kGrid2Xxs[at[l]], kEvenSigns[word >> (7 * l) & 127], out.q + 32 * g + 8 * l);
  }
}

// 9 bits of index and seven signs for each eight values.
void unpack(const BlockIQ2_XS& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d) * 0.125f;
  odd_scales(b.scales, out.scale);
  for (size_t i = 0; i < 32; ++i) store_signed(kGrid2Xs[b.qs[i] & 511], kEvenSigns[b.qs[i] >> 9], out.q + 8 * i);
}

// 8 low bits of the indices, then bytes of signs; two high bits in qh.
void unpack(const BlockIQ2_S& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d) * 0.125f;
  odd_scales(b.scales, out.scale);
  for (size_t i = 0; i < 32; ++i) {
    const unsigned high = b.qh[i / 4] >> (2 * (i % 4)) & 3;
    store_signed(kGrid2S[b.qs[i] | high << 8], b.qs[32 + i], out.q + 8 * i);
  }
}

// As IQ2_XXS with two indices of four values in the place of one of eight.
void unpack(const BlockIQ3_XXS& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d) * 0.25f;
  for (size_t g = 0; g < 8; ++g) {
    const uint8_t* at = b.qs + 8 * g;
    const auto word = load<uint32_t>(b.qs + 64 + 4 * g);
    same_scale(word >> 28, g, out.scale);
    for (size_t l = 0; l < 4; ++l)
      store_signed(both(kGrid3Xxs[at[2 * l]], kGrid3Xxs[at[2 * l + 1]]), kEvenSigns[word >> (7 * l) & 127], out.q + 32 * g + 8 * l);
  }
}

void unpack(const BlockIQ3_S& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d);
  for (size_t g = 0; g < 8; ++g) {
    same_scale(b.scales[g / 2] >> (g % 2 * 4) & 15u, g, out.scale);
    const auto index = [&](size_t i) { return b.qs[8 * g + i] | (b.qh[g] >> i & 1u) << 8; };
    for (size_t l = 0; l < 4; ++l)
      store_signed(both(kGrid3S[index(2 * l)], kGrid3S[index(2 * l + 1)]), b.signs[4 * g + l], out.q + 32 * g + 8 * l);
  }
}

// Groups of 32: four indices of 11 bits, a 3-bit scale, the sign of the eighth.
void unpack(const BlockIQ1_S& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d) * 0.125f;
  for (size_t g = 0; g < 8; ++g) {
    const unsigned high = b.qh[g];
    same_scale(high >> 12 & 7, g, out.scale);
    for (size_t l = 0; l < 4; ++l)
      store_ternary(b.qs[4 * g + l] | (high >> (3 * l) & 7) << 8, (high & 0x8000) != 0, out.q + 32 * g + 8 * l);
  }
}

// Each eight values: 8 bits of index in qs, a nibble of qh with three more and the sign of the eighth.
// Words of scales: four times 3 bits, and above them four bits of d.
void unpack(const BlockIQ1_M& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(scale_bits(b)) * 0.125f;
  for (size_t g = 0; g < 16; ++g) {
    const unsigned s = load<uint16_t>(b.scales + 2 * (g / 4)) >> (3 * (g % 4)) & 7u;
    out.scale[g] = static_cast<int8_t>(2 * s + 1);
  }
  for (size_t i = 0; i < 32; ++i) {
    const unsigned nibble = b.qh[i / 2] >> (i % 2 * 4) & 15u;
    store_ternary(b.qs[i] | (nibble & 7) << 8, (nibble & 8) != 0, out.q + 8 * i);
  }
}

// Five base-3 digits a byte, as a fraction of 256, most significant first: 32 bytes for 160 values,
// 16 for 80, 4 for 16 of four digits.
void unpack(const BlockTQ1_0& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d);
  for (int8_t& s : out.scale) s = 1;
  int8_t* q = out.q;
  const auto digits = [&q](const uint8_t* bytes, size_t n_bytes, size_t n_digits) {
    for (unsigned n = 0, power = 1; n < n_digits; ++n, power *= 3)
      for (size_t i = 0; i < n_bytes; ++i) *q++ = static_cast<int8_t>((static_cast<uint8_t>(bytes[i] * power) * 3 >> 8) - 1);
  };
  digits(b.qs, 32, 5);
  digits(b.qs + 32, 16, 5);
  digits(b.qh, 4, 4);
}

void unpack(const BlockTQ2_0& b, WideBlock& out) noexcept {
  out.d = f16_to_f32(b.d);
  for (int8_t& s : out.scale) s = 1;
  for (size_t i = 0; i < 256; ++i) out.q[i] = static_cast<int8_t>((b.qs[32 * (i / 128) + i % 32] >> (i % 128 / 32 * 2) & 3) - 1);
}

}  // namespace duet
