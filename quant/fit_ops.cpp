#include "quant/fit_ops.h"

#include "quant/group_lanes.h"

namespace duet {
namespace {

void add_products(const ProductArgs& args) noexcept {
  for (size_t k = 0; k < args.n_k; ++k) {
    const float* b = args.b + k * args.b_stride;
    for (size_t r = 0; r < args.n_rows; ++r) {
      const float s = args.a[r * args.a_stride + k];
      if (s == 0) continue;
      float* to = args.to + r * args.to_stride;
      for (size_t i = 0; i < args.n; ++i) to[i] += s * b[i];
    }
  }
}

}  // namespace

const FitOps kPlainFitOps = {add_products, GroupLanes<4>::search};

}  // namespace duet
