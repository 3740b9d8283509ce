#include "converters/compare.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/parallel.h"
#include "converters/source.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

ConversionSource open_any(const fs::path& path, const CompareOptions& options) {
  ConvertOptions as;
  as.recipe = "F32";
  as.notice = options.notice;
  return fs::is_directory(path) ? open_folder(path, as) : open_gguf(path, as);
}

const TensorJob* find_job(const ConversionSource& source, const std::string& name) {
  const auto it = std::find_if(source.jobs.begin(), source.jobs.end(), [&](const TensorJob& job) { return job.name == name; });
  return it == source.jobs.end() ? nullptr : &*it;
}

std::string types_of(const TensorJob& job) {
  std::vector<std::string> names;
  for (const RowRun& run : job.runs)
    if (std::find(names.begin(), names.end(), run.source.format->name) == names.end()) names.emplace_back(run.source.format->name);
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : "+") + name;
  return out;
}

constexpr uint64_t kTileRows = 64;  // of a transposed source: 128 bytes of each of its rows

// Rows [first, first + n) of the tensor as the converter would write them.
void decode_rows(const TensorJob& job, uint64_t first, uint64_t n, float* out) {
  for (uint64_t done = 0; done < n;) {
    const SourceRow from = find_row(job, first + done);
    const uint64_t n_run = std::min(n - done, from.run->rows() - from.row);
    read_rows(*from.run, from.row, n_run, out + done * job.shape.back());
    done += n_run;
  }
}

struct Sums {
  double errors = 0, squares = 0, max_error = 0;
  uint64_t worst_row = 0;
};

Sums sum_row(uint64_t row, const float* x, const float* y, uint64_t cols) {
  Sums out;
  out.worst_row = row;
  for (uint64_t i = 0; i < cols; ++i) {
    const double d = double{y[i]} - double{x[i]};
    out.errors += d * d;
    out.squares += double{x[i]} * double{x[i]};
    out.max_error = std::max(out.max_error, std::isnan(d) ? HUGE_VAL : std::fabs(d));
  }
  return out;
}

// In the order of rows, so that the sums do not depend on the threads.
TensorDifference compare_tensor(const TensorJob& a, const TensorJob& b, int n_threads) {
  if (a.shape != b.shape) fail(ErrorKind::format, "tensor '", a.name, "' has another shape in the second model; they are not of one kind");
  const uint64_t cols = a.shape.back();
  TensorDifference out{a.name, types_of(a), types_of(b), cols, source_bytes(a), source_bytes(b)};
  for (size_t i = 0; i + 1 < a.shape.size(); ++i) out.n_elems *= a.shape[i];
  const uint64_t n_rows = out.n_elems / cols, step = std::max<uint64_t>(kTileRows, (uint64_t{1} << 16) / cols);
  std::vector<Sums> rows(n_rows);
  parallel_for(n_threads, n_rows, step, [&](size_t begin, size_t end) {
    std::vector<float> x(std::min<uint64_t>(kTileRows, end - begin) * cols), y(x.size());
    for (uint64_t first = begin; first < end; first += kTileRows) {
      const uint64_t n = std::min<uint64_t>(kTileRows, end - first);
      decode_rows(a, first, n, x.data());
      decode_rows(b, first, n, y.data());
      for (uint64_t i = 0; i < n; ++i) rows[first + i] = sum_row(first + i, x.data() + i * cols, y.data() + i * cols, cols);
    }
  });
  double errors = 0, squares = 0;
  for (const Sums& row : rows) {
    errors += row.errors;
    squares += row.squares;
    if (row.max_error <= out.max_error) continue;
    out.max_error = row.max_error;
    out.worst_row = row.worst_row;
  }
  out.rmse = std::sqrt(errors / static_cast<double>(out.n_elems));
  out.rms = std::sqrt(squares / static_cast<double>(out.n_elems));
  return out;
}

void drop(const TensorJob& job) {
  for (const RowRun& run : job.runs)
    if (run.drop) run.drop(run.source);
}

}  // namespace

ModelDifference compare_models(const fs::path& a, const fs::path& b, const CompareOptions& options) {
  const ConversionSource from = open_any(a, options), to = open_any(b, options);
  const int n_threads = thread_count(options.n_threads);
  ModelDifference out;
  ConvertProgress progress;
  progress.n_tensors = from.jobs.size();
  for (const TensorJob& job : from.jobs) progress.total_bytes += source_bytes(job);
  out.bytes_a = progress.total_bytes;
  for (const TensorJob& job : to.jobs) {
    out.bytes_b += source_bytes(job);
    if (find_job(from, job.name) == nullptr) out.only_b.push_back(job.name);
  }
  for (const TensorJob& job : from.jobs) {
    if (options.cancel != nullptr && options.cancel->load()) fail(ErrorKind::cancelled, "interrupted");
    progress.tensor = job.name;
    if (const TensorJob* other = find_job(to, job.name)) {
      out.tensors.push_back(compare_tensor(job, *other, n_threads));
      drop(*other);
    } else {
      out.only_a.push_back(job.name);
    }
    drop(job);
    progress.done_bytes += source_bytes(job);
    if (options.progress) options.progress(progress);
    ++progress.tensor_index;
  }
  return out;
}

}  // namespace duet
