#include "runtime/kernels/onednn_gemm.h"

#include <oneapi/dnnl/dnnl.h>

#include <algorithm>

#include "base/error.h"
#include "base/parallel.h"

namespace duet {
namespace {

// A panel is written and read once per call: large enough to feed all threads, small enough to
// stay in the caches (256 rows of 4096 floats are 4 MiB).
constexpr size_t kPanelRows = 256;

bool float_aligned(const void* p, size_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(float) == 0 && stride_bytes % sizeof(float) == 0;
}

// y[:, first .. first + rows) = x * w^T for weights already in float.
void multiply_panel(const MatmulArgs& args, const float* w, size_t w_stride, size_t first,
                    size_t rows) {
  sgemm({.m = args.n_tokens,
         .n = rows,
         .k = args.cols,
         .a = reinterpret_cast<const float*>(args.x),
         .lda = args.x_stride / sizeof(float),
         .b = w,
         .ldb = w_stride,
         .b_transposed = true,
         .c = args.y + first,
         .ldc = args.y_stride});
}

}  // namespace

void sgemm(const SgemmArgs& g) {
  const auto dim = [](size_t n) { return static_cast<dnnl_dim_t>(n); };
  const dnnl_status_t status =
      dnnl_sgemm('N', g.b_transposed ? 'T' : 'N', dim(g.m), dim(g.n), dim(g.k), g.alpha, g.a,
                 dim(g.lda), g.b, dim(g.ldb), 0.0f, g.c, dim(g.ldc));
  if (status != dnnl_success) {
    fail(ErrorKind::internal, "oneDNN sgemm of ", g.m, " x ", g.n, " x ", g.k,
         " failed with status ", int{status});
  }
}

size_t gemm_panel_floats(size_t max_cols) { return kPanelRows * max_cols; }

bool try_gemm(const KernelTable& kernels, DType dtype, const MatmulArgs& args, int n_threads,
              std::span<float> panel) {
  if (dtype != DType::F32 && dtype != DType::F16 && dtype != DType::BF16) return false;
  if (kernels.needs == 0) return false;
  if (args.n_tokens < kGemmMinTokens || !float_aligned(args.x, args.x_stride)) return false;
  if (dtype == DType::F32) {
    if (!float_aligned(args.w, args.w_stride)) return false;
    multiply_panel(args, reinterpret_cast<const float*>(args.w), args.w_stride / sizeof(float), 0,
                   args.n_rows);
    return true;
  }
  const size_t panel_rows = std::min(kPanelRows, panel.size() / args.cols);
  if (panel_rows == 0) return false;
  const auto decode = kernels.decode_row[static_cast<size_t>(dtype)];
  for (size_t first = 0; first < args.n_rows; first += panel_rows) {
    const size_t rows = std::min(panel_rows, args.n_rows - first);
    parallel_for(n_threads, rows, 8, [&](size_t begin, size_t end) {
      for (size_t r = begin; r < end; ++r) {
        decode(args.w + (first + r) * args.w_stride, panel.data() + r * args.cols, args.cols);
      }
    });
    multiply_panel(args, panel.data(), args.cols, first, rows);
  }
  return true;
}

}  // namespace duet
