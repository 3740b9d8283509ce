// Row loops over blocks, and the bit fields that several formats share. Internal to quant/.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "quant/block_parts.h"
#include "quant/format.h"
#include "quant/scale_search.h"

namespace duet {

inline constexpr size_t kSuperBlock = 256;  // elements of a K-format block

inline bool f16_finite(uint16_t h) { return (h & 0x7c00u) != 0x7c00u; }

template <class Block, size_t kElems, void (*kDecode)(const Block&, float*) noexcept>
void decode_blocks(const void* src, float* dst, size_t n) noexcept {
  const auto* block = static_cast<const Block*>(src);
  for (size_t i = 0; i < n; i += kElems) kDecode(*block++, dst + i);
}

template <class Block, size_t kElems, void (*kEncode)(const float*, const float*, Block&) noexcept>
void encode_blocks(const float* src, void* dst, size_t n, const float* importance) noexcept {
  auto* block = static_cast<Block*>(dst);
  for (size_t i = 0; i < n; i += kElems) {
    kEncode(src + i, importance != nullptr ? importance + i : nullptr, *block++);
  }
}

template <class Block, void (*kPack)(const BlockParts&, Block&) noexcept>
void pack_block(const BlockParts& parts, void* block) noexcept {
  kPack(parts, *static_cast<Block*>(block));
}
template <class Block, void (*kUnpack)(const Block&, BlockParts&) noexcept>
void unpack_block(const void* block, BlockParts& parts) noexcept {
  kUnpack(*static_cast<const Block*>(block), parts);
}

template <class Fit>
BlockParts parts_of(const Fit& fit) {
  BlockParts parts;
  parts.unit = fit.d;
  if constexpr (requires { fit.dmin; }) parts.offset_unit = fit.dmin;
  if constexpr (requires { fit.m; }) parts.offset_unit = fit.m;
  if constexpr (requires { fit.scale; }) std::copy_n(fit.scale, 16, parts.scale);
  if constexpr (requires { fit.min; }) std::copy_n(fit.min, 16, parts.offset);
  std::copy_n(fit.q, std::size(fit.q), parts.q);
  return parts;
}

// Blocks of 32 elements, searched four at a time.
template <class Block, int kQMax, bool kHasOffset, void (*kPack)(const BlockParts&, Block&) noexcept>
void encode_fitted(const float* src, void* dst, size_t n, const float* importance) noexcept {
  auto* block = static_cast<Block*>(dst);
  BlockFit fits[4];
  for (size_t i = 0; i < n; i += 128) {
    const size_t n_blocks = (n - i < 128 ? n - i : 128) / 32;
    fit_blocks({kQMax, kHasOffset}, src + i, importance != nullptr ? importance + i : nullptr,
               n_blocks, fits);
    for (size_t b = 0; b < n_blocks; ++b) kPack(parts_of(fits[b]), *block++);
  }
}

template <class Block, size_t kElems, bool (*kFinite)(const Block&) noexcept>
bool all_blocks_finite(const void* src, size_t n) noexcept {
  const auto* block = static_cast<const Block*>(src);
  for (size_t i = 0; i < n; i += kElems) {
    if (!kFinite(*block++)) return false;
  }
  return true;
}

template <class Block>
bool d_finite(const Block& b) noexcept {
  return f16_finite(b.d);
}
template <class Block>
bool d_m_finite(const Block& b) noexcept {
  return f16_finite(b.d) && f16_finite(b.m);
}
template <class Block>
bool d_dmin_finite(const Block& b) noexcept {
  return f16_finite(b.d) && f16_finite(b.dmin);
}

// Q5_0 and Q5_1: low nibbles of elements j and j + 16 in byte j, fifth bit of element j in bit j.
inline void unpack_5bit(const uint8_t qs[16], const uint8_t qh[4], uint8_t q[32]) {
  for (size_t j = 0; j < 16; ++j) {
    q[j] = static_cast<uint8_t>((qs[j] & 15) | (((qh[j / 8] >> (j % 8)) & 1) << 4));
    q[j + 16] = static_cast<uint8_t>((qs[j] >> 4) | (((qh[2 + j / 8] >> (j % 8)) & 1) << 4));
  }
}

inline void pack_nibbles(const uint8_t q[32], uint8_t qs[16]) {
  for (size_t j = 0; j < 16; ++j)
    qs[j] = static_cast<uint8_t>((q[j] & 15) | ((q[j + 16] & 15) << 4));
}
inline void unpack_nibbles(const uint8_t qs[16], uint8_t q[32]) {
  for (size_t j = 0; j < 16; ++j) {
    q[j] = qs[j] & 15;
    q[j + 16] = qs[j] >> 4;
  }
}
inline void pack_5bit(const uint8_t q[32], uint8_t qs[16], uint8_t qh[4]) {
  pack_nibbles(q, qs);
  for (size_t i = 0; i < 4; ++i) {
    int bits = 0;
    for (size_t j = 0; j < 8; ++j) bits |= (q[8 * i + j] >> 4) << j;
    qh[i] = static_cast<uint8_t>(bits);
  }
}

// Q2_K and Q3_K: bits 2k and 2k + 1 of byte 32 h + l belong to element 128 h + 32 k + l.
inline void pack_2bit(const uint8_t q[256], uint8_t qs[64]) {
  for (size_t i = 0; i < 64; ++i) {
    const uint8_t* e = q + 128 * (i / 32) + i % 32;
    qs[i] = static_cast<uint8_t>(e[0] | (e[32] << 2) | (e[64] << 4) | (e[96] << 6));
  }
}

inline void unpack_2bit(const uint8_t qs[64], uint8_t q[256]) {
  for (size_t i = 0; i < 64; ++i) {
    uint8_t* e = q + 128 * (i / 32) + i % 32;
    for (size_t k = 0; k < 4; ++k) e[32 * k] = (qs[i] >> (2 * k)) & 3;
  }
}

// Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes. Bytes 0-3 and 4-7 hold the
// first four of each in their low six bits; bytes 8-11 hold the low nibbles of the last four (scale
// low, minimum high), whose upper two bits sit on top of bytes 0-3 and 4-7.
inline void unpack_k4_scales(const uint8_t in[12], uint8_t scales[8], uint8_t mins[8]) {
  for (size_t j = 0; j < 4; ++j) {
    scales[j] = in[j] & 63;
    mins[j] = in[j + 4] & 63;
    scales[j + 4] = static_cast<uint8_t>((in[j + 8] & 15) | ((in[j] >> 6) << 4));
    mins[j + 4] = static_cast<uint8_t>((in[j + 8] >> 4) | ((in[j + 4] >> 6) << 4));
  }
}

inline void unpack_k4_scales(const uint8_t in[12], BlockParts& parts) {
  uint8_t scales[8], mins[8];
  unpack_k4_scales(in, scales, mins);
  std::copy_n(scales, 8, parts.scale);
  std::copy_n(mins, 8, parts.offset);
}

inline void pack_k4_scales(const BlockParts& parts, uint8_t out[12]) {
  const int16_t *scales = parts.scale, *mins = parts.offset;
  for (size_t j = 0; j < 4; ++j) {
    out[j] = static_cast<uint8_t>(scales[j] | ((scales[j + 4] >> 4) << 6));
    out[j + 4] = static_cast<uint8_t>(mins[j] | ((mins[j + 4] >> 4) << 6));
    out[j + 8] = static_cast<uint8_t>((scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4));
  }
}

}  // namespace duet
