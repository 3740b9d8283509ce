// The table of compute kernels, one per instruction set, and its contracts.
//
// scalar.cpp is the specification; every other table starts as a copy of the one below it and
// overrides entries. Kernels are noexcept, single-threaded, allocate nothing, and serve a range of
// rows per call, so that one indirect call is amortised and threads split rows, never sums: results
// do not depend on the number of threads. Weight rows are 2-byte aligned, activations 4-byte.
//
// Sums. With quantized weights y[t][r] has the same bits in every table, whatever n_rows, n_tokens
// and the place in the batch: the integer part of a block is exact, and the float part is one chain
// of fused multiply-adds in block order, starting from 0:
//   act32:   for each block of 32:   y = fma(float(D), d_w * d_x, y),  D = sum of q_w * q_x
//            [formats with m:        y = fma(m_w, d_x * float(sum_x), y)]
//   act256:  for each super-block:   y = fma(float(D), d_w * d_x, y),  D = sum of scale * q_w * q_x
//            [formats with dmin:     y = fma(float(M), -(dmin_w * d_x), y),  M = sum of min * bsums]
// D and M are exact 32-bit integers (below 2^28 in magnitude), converted to float once, to nearest
// even; products of two floats in parentheses or as an argument are rounded. Half-precision scales
// are converted to float first. So decode and prefill, all instruction sets and all batch sizes give
// one result; that is what batching, speculation and streaming rest on.
// Float formats (y = sum of w * x, no rounding of x) differ between tables by rounding: element i
// belongs to partial sum i % 16 (scalar, neon), i % 32 (avx2), i % 64 (avx512); within one table the bits
// depend on row and token only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/cpu_features.h"
#include "quant/format.h"
#include "quant/fit_ops.h"

namespace duet {

// y[t * y_stride + r] = sum over c of W[r][c] * x[t][c], for r in [0, n_rows), t in [0, n_tokens).
struct MatmulArgs {
  const std::byte* w;  // [n_rows, cols] in the weight format
  size_t w_stride;     // bytes from row to row
  size_t n_rows;
  size_t cols;         // a multiple of the format's block
  const std::byte* x;  // [n_tokens, cols] in the format's ActFormat
  size_t x_stride;     // bytes from token to token
  size_t n_tokens;
  float* y;
  size_t y_stride;  // floats from token to token
  const std::byte* next = nullptr;  // weights that this thread most likely multiplies next, to be fetched ahead; null: the rows behind these
};
using MatmulFn = void (*)(const MatmulArgs&) noexcept;

// ---- attention --------------------------------------------------------------------------------
// Keys and values of one KV head of a layer, cut into segments of kKvSegment positions.
//
// Keys of a segment: blocks of kKvBlock positions, element i of key j of a block (j = pos % 16) at
//   F32, F16   [i][j]                                     64, 32 bytes per i
//   Q8_0       groups of 32 elements: half-precision scales [j], then int8 [i % 32 / 2][j][i % 2]
// Values of a segment: a row per position, head_dim elements and zeros up to a multiple of 16;
// Q8_0: half-precision scales [i / 32][pos % 256], then int8 [i / 32][pos % 256 / 2][i % 32][pos % 2].
// Q8_0 only where head_dim is a multiple of 32.
// Positions that were never written may hold anything.
inline constexpr size_t kKvBlock = 16, kKvSegment = 256;
struct KvView {
  const std::byte *keys, *values;  // of segment 0
  size_t segment_bytes;            // from segment to segment of both
  size_t key_block_bytes, value_row_bytes;  // the second: not with Q8_0
  DType type;  // F32, F16, Q8_0
};

// Queries of n_tokens consecutive tokens in the `group` query heads that share a KV head, against
// the keys at positions [key_begin, key_end). Token t is at position first + t and sees the keys
// not after it and, with a window, less than `window` before it. Rows: token by token, head by head.
struct AttentionArgs {
  KvView kv;
  const float* q;  // query (t, h) at q + t * q_stride + h * head_dim
  size_t q_stride, n_tokens, group, head_dim;
  size_t first, window;  // window 0: none
  size_t key_begin, key_end;  // key_begin a multiple of kKvSegment
  float scale;
  float* scratch;  // attention_scratch_floats()
  float* out;      // [n_rows, attention_row_floats()]
};
// Floats of a row of results: sum of weight * value [head_dim, padded to 16], then the largest score
// max (-infinity: the row sees none of the keys, the rest is not set), then the sum of the weights
// 2^(score - max). Scores are in units of kScoreUnit: query * key * scale * log2(e).
inline constexpr float kScoreUnit = 1.44269504f;
inline size_t attention_row_dims(size_t head_dim) { return (head_dim + 15) / 16 * 16; }
inline size_t attention_row_floats(size_t head_dim) { return attention_row_dims(head_dim) + 16; }
inline size_t attention_scratch_floats(size_t n_rows, size_t head_dim) {
  const size_t dims = attention_row_dims(head_dim);
  return (n_rows * (2 * dims + kKvSegment * 3 / 2 + 5) + dims * kKvSegment + 31) / 16 * 16;
}

// What the processor can do at most with this table's instructions, for measurements. The first two
// work on registers (scalar: the first-level cache) only, in steps of some nanoseconds, and return
// the multiply-adds done.
struct PeakLoops {
  uint64_t (*int8_macs)(uint64_t n_steps) noexcept;  // bytes into 32-bit sums
  uint64_t (*f32_macs)(uint64_t n_steps) noexcept;
  // Sum of 64-bit words: a plain load-and-add loop. data 64-byte aligned, n_bytes a multiple of 512.
  uint64_t (*read_sum)(const void* data, size_t n_bytes) noexcept;
};

inline constexpr float kActFloor = 0x1p-100f;  // 127 / max stays finite

struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avxvnni", "avx512", "neon"
  CpuFeatures needs;
  PeakLoops peak;

  MatmulFn matmul[kDTypeSlots];  // by DType (null where there is none); x in format_of(dtype).act
  // dst = n values of x in the activation format, n a multiple of its block; bit-equal in all
  // tables. d = max|x| / 127, q = x * (127 / max|x|) to the nearest integer, ties to even. A block
  // with max|x| < kActFloor becomes zeros; one with a NaN or infinity gets d = NaN, q = 0, so
  // that what it touches is NaN too.
  void (*quantize_act32)(const float* x, void* dst, size_t n) noexcept;
  void (*quantize_act256)(const float* x, void* dst, size_t n) noexcept;
  // dst[n] = values of n elements; bit-equal to Format::decode_row (F16: any NaN for NaN).
  // By DType.
  void (*decode_row[kDTypeSlots])(const void* src, float* dst, size_t n) noexcept;

  // y = x / sqrt(mean(x^2) + eps) * w. The mean is accumulated in double or in >= 8 partial sums.
  void (*rms_norm)(const float* x, const float* w, float eps, float* y, size_t n) noexcept;
  // Rotates pairs (x[2i], x[2i+1]) by the angle whose cosine and sine are cs[2i], cs[2i+1];
  // n_rot elements. Interleaved pairs, as GGUF "llama" files are laid out.
  void (*rope)(float* x, const float* cs, size_t n_rot) noexcept;
  void (*softmax)(float* x, size_t n) noexcept;  // in place; n >= 1
  void (*silu_mul)(const float* gate, const float* up, float* y,
                   size_t n) noexcept;                                       // silu(gate) * up; y may be gate
  void (*add)(float* y, const float* x, size_t n) noexcept;                  // y += x
  void (*add_scaled)(float* y, const float* x, float s, size_t n) noexcept;  // y += s * x
  FitOps fit;  // for calibration
  void (*f32_to_f16)(const float* x, uint16_t* y, size_t n) noexcept;
  void (*f16_to_f32)(const uint16_t* x, float* y, size_t n) noexcept;

  // A row has the same bits whatever shares the call: its segments are evaluated one by one (score =
  // one chain of multiply-adds over the head, from 0; weights 2^(score - max of the segment); their
  // sum: keys 16 apart first, then a tree; mixed values one chain over the keys, from 0) and merged
  // in order. Keys that a row does not see take no part.
  // 8-bit: queries and weights become 16-bit integers, sums of products with integers are exact.
  //   query * scale ~= u * Q, u = max|.| / 32767; score = u * s, s a chain of multiply-adds over the
  //   groups of 32 elements, from 0, of float(sum of Q * key) with the scales of the keys
  //   m = largest weight * (largest scale of the value's groups) of the keys seen;
  //   W = weight * (32767 / m) * scale, to the nearest; mixed value = (m / 32767) * float(sum of W * value)
  // One unit for all 256 keys of a segment rounds no weight by more than 2^-16 of what the largest
  // one contributes: far below the rounding of the values themselves.
  void (*attention)(const AttentionArgs& args) noexcept;
};

// Tables compiled in and usable on this processor, best first; the last is scalar.
std::span<const KernelTable* const> usable_kernels();
// Names of all tables compiled in, best first.
std::vector<std::string> compiled_isas();
// The table named `isa`, or the best usable one for "". Error(unsupported) when the name is unknown
// or the processor lacks what it needs; the message names the usable ones.
const KernelTable& select_kernels(std::string_view isa);

}  // namespace duet
