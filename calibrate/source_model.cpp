#include "calibrate/source_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace duet {

size_t matrix_rows(const TensorJob& job) {
  return job.shape.size() < 2 ? 1 : job.shape[job.shape.size() - 2];
}
size_t matrix_count(const TensorJob& job) { return job.shape.size() < 3 ? 1 : job.shape[0]; }

SourceModel::SourceModel(const ConversionSource& source)
    : source_(source), layers_(source.jobs.size(), -1) {
  std::map<std::string, size_t> by_name;
  for (size_t i = 0; i < source.jobs.size(); ++i) by_name[source.jobs[i].name] = i;
  for (const TensorSpec& spec : tensor_table(source.hparams))
    if (const auto it = by_name.find(spec.gguf_name); it != by_name.end()) {
      index_[{spec.kind, spec.layer}] = it->second;
      layers_[it->second] = spec.layer;
    }
}

bool SourceModel::is(size_t job_index, TensorKind kind) const {
  const auto it = index_.find({kind, layers_[job_index]});
  return it != index_.end() && it->second == job_index;
}

size_t SourceModel::job_index(TensorKind kind, int layer) const {
  const auto it = index_.find({kind, layer});
  if (it == index_.end())
    fail(ErrorKind::internal, "calibration: no tensor of kind ", static_cast<int>(kind),
         " in layer ", layer);
  return it->second;
}

const TensorJob& SourceModel::job(TensorKind kind, int layer) const {
  return source_.jobs[job_index(kind, layer)];
}

std::vector<float> SourceModel::floats(const TensorJob& job, uint64_t first_row, uint64_t n_rows) {
  const uint64_t cols = job.shape.back();
  std::vector<float> out(n_rows * cols);
  for (uint64_t done = 0; done < n_rows;) {
    const SourceRow from = find_row(job, first_row + done);
    const uint64_t n = std::min(n_rows - done, from.run->rows() - from.row);
    read_rows(*from.run, from.row, n, out.data() + done * cols);
    done += n;
    const float* rows = out.data() + (done - n) * cols;
    const float* bad = std::find_if(rows, rows + n * cols, [](float v) { return !std::isfinite(v); });
    if (bad != rows + n * cols)
      fail(ErrorKind::format, "tensor '", from.run->source.name, "', row ", from.row + static_cast<uint64_t>(bad - rows) / cols,
           ": a value is not finite (NaN or infinity); the source is damaged");
  }
  return out;
}

void SourceModel::store_row(const TensorJob& job, uint64_t row, std::byte* out) {
  const SourceRow from = find_row(job, row);
  const uint64_t cols = job.shape.back();
  if (from.run->source.format == job.format && from.run->is_plain()) {
    const size_t bytes = row_bytes(*job.format, cols);
    std::memcpy(out, from.run->source.data.data() + from.run->source_row(from.row) * bytes, bytes);
  } else {
    job.format->encode_row(floats(job, row, 1).data(), out, cols, nullptr);
    const uint64_t stored = from.run->transposed ? from.row : from.run->source_row(from.row);
    if (!job.format->scales_finite(out, cols)) fail_too_large(from.run->source.name, stored, *job.format);
  }
}

SourceMatrix SourceModel::matrix(const TensorJob& job, size_t expert) const {
  const size_t rows = matrix_rows(job), cols = job.shape.back(), first = expert * rows;
  SourceMatrix m;
  m.weight.rows = rows;
  m.weight.cols = cols;
  size_t run_first = 0;
  for (const RowRun& run : job.runs) {
    const size_t n = run.rows();
    const Format& format = *run.source.format;
    const bool is_float =
        format.dtype == DType::F32 || format.dtype == DType::F16 || format.dtype == DType::BF16;
    const bool in_place = is_float && run.is_plain() && !run.is_scattered();
    if (in_place && first >= run_first && first + rows <= run_first + n) {
      m.weight.format = &format;
      m.weight.row_bytes = row_bytes(format, cols);
      m.weight.data = run.source.data.data() + (first - run_first) * m.weight.row_bytes;
      return m;
    }
    run_first += n;
  }
  m.values = floats(job, first, rows);
  m.weight.format = &format_of(DType::F32);
  m.weight.row_bytes = cols * sizeof(float);
  m.weight.data = reinterpret_cast<const std::byte*>(m.values.data());
  return m;
}

void SourceModel::drop(const TensorJob& job) const {
  for (const RowRun& run : job.runs)
    if (run.drop) run.drop(run.source);
}

}  // namespace duet
