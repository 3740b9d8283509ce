// Matrix products of float32 by oneDNN, for prefill. It runs on one thread inside teams, else on as
// many as set_library_threads() said on the calling thread. Results depend on the batch (oneDNN
// picks its blocking by size); activations stay float32.
#pragma once

#include <cstddef>
#include <span>

#include "runtime/kernels/kernels.h"

namespace duet {

// Row-major matrices: element (i, j) of `a` is a[i * lda + j]. b_transposed: b holds [n, k].
struct SgemmArgs {
  size_t m, n, k;
  const float* a;  // [m, k]
  size_t lda;
  const float* b;  // [k, n], or [n, k] when transposed
  size_t ldb;
  bool b_transposed;
  float* c;  // [m, n]
  size_t ldc;
  float alpha = 1.0f;
};

// c = alpha * a * b. Throws Error(internal) when oneDNN refuses, which valid arguments never cause.
void sgemm(const SgemmArgs& args);

// Below this many tokens the matmul kernels are used: with 4 and more oneDNN measured faster for
// all three formats (bench_kernels --gemm), with 1 the kernels read weights at memory speed.
inline constexpr size_t kGemmMinTokens = 4;
// Floats of scratch that try_gemm wants for F16 and BF16 weights of up to `max_cols` columns.
size_t gemm_panel_floats(size_t max_cols);

// The matmul `args` of float weights (F32, F16, BF16; args.x are floats) for all tokens at once.
// F16 and BF16 weights are converted panel by panel into `panel` on n_threads threads. Returns
// false, having done nothing, to decline: quantized weights, too few tokens, the scalar table (the
// reference stays free of libraries), x or weights not aligned to float, a panel that holds no row.
bool try_gemm(const KernelTable& kernels, DType dtype, const MatmulArgs& args, int n_threads,
              std::span<float> panel);

}  // namespace duet
