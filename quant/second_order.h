// Error-compensating encoding: scales and integers of a row chosen together so that the row's error
// in the metric of its inputs (quant/input_metric.h) is small, within the block formats as they
// are.
//
// From the first block to the last, and in each from the first group to the last: every candidate
// pair of scale and offset integers around those that a plain fit of the compensated values gives
// is rounded column by column, each column making up for the errors before it; the pair whose
// errors cost least when all later columns do the same is kept (nearest-plane rounding, for many
// lattices). Then, in passes over the finished row, with exact changes of the true error: single
// integers, the scale, offset and integers of one group together, and the units of a block by least
// squares.
#pragma once

#include <cstddef>

#include "quant/format.h"
#include "quant/input_metric.h"

namespace duet {

// True where encode_second_order() serves the format.
bool has_second_order(const Format& format);

// Encodes n_rows of w [n_rows, metric.n_cols()], finite, to out (row_bytes() each). Rows are
// independent: the result does not depend on the number of threads or on what is encoded with them.
// The columns of the format's block divide n_cols and the metric's block.
void encode_second_order(const Format& format, const InputMetric& metric, const float* w,
                         size_t n_rows, void* out, int n_threads);

// Sum over rows of e H e^T for e = w - v, both [n_rows, n_cols].
double metric_error(const InputMetric& metric, const float* w, const float* v, size_t n_rows);

}  // namespace duet
