// Internal to the instruction-set files: cuts a matmul into register tiles.
//
// Everything here and in the other headers of these files sits in an unnamed namespace: each file
// gets its own copy, compiled with its own flags, and no symbol that the linker could hand to
// general code (cmake/check_isa_symbols.cmake).
#pragma once

#include "runtime/kernels/kernels.h"

#define DUET_INLINE inline __attribute__((always_inline))

namespace duet {
namespace {

// Rows that stay in the L2 cache while all tokens pass over them: 16 rows of Q8_0 with 14336
// columns are 240 KB, of Q4_K with 4096 columns 36 KB.
constexpr size_t kRowGroup = 16;

DUET_INLINE MatmulArgs sub_problem(const MatmulArgs& a, size_t row, size_t token) {
  MatmulArgs out = a;
  out.w += row * a.w_stride;
  out.x += token * a.x_stride;
  out.y += token * a.y_stride + row;
  return out;
}

// Where to look for row `row`: after the last one those of the next product are wanted.
DUET_INLINE const std::byte* rows_from(const MatmulArgs& a, size_t row) {
  return row < a.n_rows || a.next == nullptr ? a.w + row * a.w_stride : a.next + (row - a.n_rows) * a.w_stride;
}

// Kernel::tile<R, T>(args) computes R rows x T tokens from the start of args. Its sums for one
// (row, token) must not depend on R and T. R > 1 only with T = 1 (decode: rows share activations),
// T > 1 only with R = 1 (prefill: tokens share unpacked weights).
template <class Kernel>
void matmul_tiled(const MatmulArgs& a) noexcept {
  if (a.n_tokens == 1) {
    size_t r = 0;
    for (; r + Kernel::kRows <= a.n_rows; r += Kernel::kRows) {
      Kernel::template tile<Kernel::kRows, 1>(sub_problem(a, r, 0));
    }
    for (; r < a.n_rows; ++r) Kernel::template tile<1, 1>(sub_problem(a, r, 0));
    return;
  }
  for (size_t group = 0; group < a.n_rows; group += kRowGroup) {
    const size_t end = group + kRowGroup < a.n_rows ? group + kRowGroup : a.n_rows;
    size_t t = 0;
    for (; t + Kernel::kTokens <= a.n_tokens; t += Kernel::kTokens) {
      for (size_t r = group; r < end; ++r)
        Kernel::template tile<1, Kernel::kTokens>(sub_problem(a, r, t));
    }
    for (; t + 2 <= a.n_tokens; t += 2) {
      for (size_t r = group; r < end; ++r) Kernel::template tile<1, 2>(sub_problem(a, r, t));
    }
    for (; t < a.n_tokens; ++t) {
      for (size_t r = group; r < end; ++r) Kernel::template tile<1, 1>(sub_problem(a, r, t));
    }
  }
}

}  // namespace
}  // namespace duet
