// Tensor element formats: ids, block layouts, and the one table that describes them.
//
// Ids and layouts are ggml's (GGUF stores them); all multi-byte fields are little-endian, `d`,
// `dmin`, `m` are IEEE half-precision bits. A row is a whole number of blocks; blocks are only
// 2-byte aligned. Bit diagrams: docs/kernels.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace duet {

enum class DType : uint32_t {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
  Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
  IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23, IQ1_M = 29,
  BF16 = 30, TQ1_0 = 34, TQ2_0 = 35,
};
inline constexpr size_t kDTypeSlots = 40;  // arrays indexed by DType

// ---- weight blocks ---------------------------------------------------------------------------
struct BlockQ4_0 { uint16_t d; uint8_t qs[16]; };
struct BlockQ4_1 { uint16_t d, m; uint8_t qs[16]; };
struct BlockQ5_0 { uint16_t d; uint8_t qh[4]; uint8_t qs[16]; };
struct BlockQ5_1 { uint16_t d, m; uint8_t qh[4]; uint8_t qs[16]; };
struct BlockQ8_0 { uint16_t d; int8_t qs[32]; };
struct BlockQ2_K { uint8_t scales[16]; uint8_t qs[64]; uint16_t d, dmin; };
struct BlockQ3_K { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; uint16_t d; };
struct BlockQ4_K { uint16_t d, dmin; uint8_t scales[12]; uint8_t qs[128]; };
struct BlockQ5_K { uint16_t d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; };
struct BlockQ6_K { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t d; };
struct BlockIQ4_NL { uint16_t d; uint8_t qs[16]; };
struct BlockIQ4_XS { uint16_t d, scales_h; uint8_t scales_l[4]; uint8_t qs[128]; };
// Codebook formats (quant/iq_blocks.cpp has the arithmetic) and ternary ones.
struct BlockIQ1_S { uint16_t d; uint8_t qs[32]; uint16_t qh[8]; };
struct BlockIQ1_M { uint8_t qs[32]; uint8_t qh[16]; uint8_t scales[8]; };
struct BlockIQ2_XXS { uint16_t d; uint16_t qs[32]; };
struct BlockIQ2_XS { uint16_t d; uint16_t qs[32]; uint8_t scales[8]; };
struct BlockIQ2_S { uint16_t d; uint8_t qs[64]; uint8_t qh[8]; uint8_t scales[8]; };
struct BlockIQ3_XXS { uint16_t d; uint8_t qs[96]; };
struct BlockIQ3_S { uint16_t d; uint8_t qs[64]; uint8_t qh[8]; uint8_t signs[32]; uint8_t scales[4]; };
struct BlockTQ1_0 { uint8_t qs[48]; uint8_t qh[4]; uint16_t d; };
struct BlockTQ2_0 { uint8_t qs[64]; uint16_t d; };
// The bits of d, spread over the four words of scales of IQ1_M: a nibble on top of each, lowest first.
inline uint16_t scale_bits(const BlockIQ1_M& b) {
  return static_cast<uint16_t>(b.scales[1] >> 4 | (b.scales[3] & 0xf0) | (b.scales[5] & 0xf0) << 4 | (b.scales[7] & 0xf0) << 8);
}
static_assert(sizeof(BlockIQ1_S) == 50 && sizeof(BlockIQ1_M) == 56 && sizeof(BlockIQ2_XXS) == 66);
static_assert(sizeof(BlockIQ2_XS) == 74 && sizeof(BlockIQ2_S) == 82 && sizeof(BlockIQ3_XXS) == 98);
static_assert(sizeof(BlockIQ3_S) == 110 && sizeof(BlockTQ1_0) == 54 && sizeof(BlockTQ2_0) == 66);
static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34 && sizeof(BlockQ2_K) == 84);
static_assert(sizeof(BlockQ3_K) == 110 && sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176);
static_assert(sizeof(BlockQ6_K) == 210 && sizeof(BlockIQ4_NL) == 18 && sizeof(BlockIQ4_XS) == 136);

// Levels of IQ4_NL and IQ4_XS (ggml's non-linear 4-bit table).
inline constexpr int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1, 13, 25, 38, 53, 69, 89, 113};

// ---- activation blocks (never stored in files; kernels quantize float rows to them) ------------
// 32 activations: x ~= d * qs. `sum` is the sum of qs, for formats with a minimum or offset.
struct BlockAct32 { float d; int32_t sum; int8_t qs[32]; };
// 256 activations: x ~= d * qs; bsums[g] is the sum of qs over group g of 16, bsums32[g] of 32.
struct BlockAct256 { float d; int8_t qs[256]; int16_t bsums[16]; int16_t bsums32[8]; };
static_assert(sizeof(BlockAct32) == 40 && sizeof(BlockAct256) == 308);

enum class ActFormat : uint8_t { f32, act32, act256 };
size_t act_row_bytes(ActFormat format, size_t cols);

// ---- the table -------------------------------------------------------------------------------
struct Format {
  DType dtype;
  const char* name;        // "Q4_K", as in GGUF tools
  size_t block_elems;      // elements per block; a row has a multiple of them
  size_t block_bytes;
  ActFormat act;           // what its dot product multiplies with
  // dst[n] = the values of n elements (n a multiple of block_elems) at src. Bit-equal to ggml.
  void (*decode_row)(const void* src, float* dst, size_t n) noexcept;
  // Encodes n values. `importance` is null or n non-negative weights of the squared errors (one
  // per element of the row). Null pointer where encoding is not offered. Finite input only:
  // callers check (non-finite values give unspecified but valid blocks).
  void (*encode_row)(const float* src, void* dst, size_t n, const float* importance) noexcept;
  // True when every scale in n elements at src is finite.
  bool (*scales_finite)(const void* src, size_t n) noexcept;
};

std::span<const Format> all_formats();
const Format& format_of(DType dtype);
const Format* find_format(uint32_t ggml_type_id);    // null when unknown here
const Format* find_format(std::string_view name);    // exact upper-case name; null when unknown
size_t row_bytes(const Format& format, size_t cols); // cols a multiple of block_elems

// Name of any ggml type id, also those duet does not read ("MXFP4"), "type 77" when unheard of.
std::string ggml_type_name(uint32_t ggml_type_id);

}  // namespace duet
