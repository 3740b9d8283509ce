// What fitting a matrix to its inputs spends its time on, to be had per instruction set
// (KernelTable::fit).
#pragma once

#include <cstddef>

#include "quant/group_search.h"

namespace duet {

// to [n_rows, n] += a [n_rows, n_k] * b [n_k, n], row-major. Each sum is one chain of multiply-adds in the
// order of k: a row has the same bits whatever shares the call.
struct ProductArgs {
  const float* a;
  size_t a_stride, n_rows;
  const float* b;
  size_t b_stride, n_k;
  float* to;
  size_t to_stride, n;
};

struct FitOps {
  void (*add_products)(const ProductArgs& args) noexcept;
  // Rounds the columns in order for every scale, each making up for those before it, and keeps the
  // cheapest if it is cheaper than `best`; the first among equals. The same bits in all tables.
  void (*search_group)(const BlockGrid& grid, const GroupProblem& problem, const GroupScale* scales,
                       size_t n_scales, GroupChoice& best) noexcept;
};

extern const FitOps kPlainFitOps;  // for any processor

}  // namespace duet
