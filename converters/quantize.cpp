#include "converters/quantize.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "base/host.h"
#include "base/parallel.h"
#include "converters/write_queue.h"

namespace duet {
namespace {

// Elements per chunk: 4M floats' worth of rows are some 10 ms to 1 s of work, 2-16 MB of blocks.
constexpr uint64_t kChunkElems = uint64_t{4} << 20;
// Rows of a transposed matrix made at once: 128 bytes of each row of the source.
constexpr uint64_t kTileRows = 64;
constexpr size_t kBuffers = 3;  // being encoded, waiting, being written

// Starts reading these mapped bytes from disk without waiting for them.
void read_ahead(std::span<const std::byte> bytes) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(bytes.data());
  const uintptr_t begin = address / page * page;
  ::madvise(reinterpret_cast<void*>(begin), address - begin + bytes.size(), MADV_WILLNEED);
}

// Part of one run, encoded as one unit.
struct Chunk {
  const TensorJob* job = nullptr;
  const RowRun* run = nullptr;
  size_t job_index = 0;
  uint64_t run_row = 0;                // rows of the job before the run
  uint64_t first_row = 0, n_rows = 0;  // output rows within the run
  bool last_of_run = false;

  size_t source_row_bytes() const { return row_bytes(*run->source.format, run->cols()); }
  uint64_t source_bytes() const { return n_rows * source_row_bytes(); }
  uint64_t output_bytes() const { return n_rows * row_bytes(*job->format, run->cols()); }
};

std::vector<Chunk> cut_chunks(const std::vector<TensorJob>& jobs) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < jobs.size(); ++i) {
    uint64_t run_row = 0;
    for (const RowRun& run : jobs[i].runs) {
      const uint64_t n_rows = run.rows();
      const uint64_t step = std::max<uint64_t>(1, kChunkElems / run.cols());
      for (uint64_t row = 0; row < n_rows; row += step) {
        const uint64_t n = std::min(step, n_rows - row);
        chunks.push_back({&jobs[i], &run, i, run_row, row, n, row + n == n_rows});
      }
      run_row += n_rows;
    }
  }
  return chunks;
}

// Chunks of a scattered run cover it only all together.
std::span<const std::byte> source_span(const Chunk& chunk) {
  const std::span data = chunk.run->source.data;
  if (chunk.run->is_scattered()) return data;
  return data.subspan(chunk.first_row * chunk.source_row_bytes(), chunk.source_bytes());
}

void prefetch(const Chunk& chunk) {
  if (!chunk.run->is_scattered() || chunk.first_row == 0) read_ahead(source_span(chunk));
}

void drop_source(const Chunk& chunk) {
  if (!chunk.run->drop) return;
  if (!chunk.run->is_scattered()) {
    chunk.run->drop(row_slice(chunk.run->source, chunk.first_row, chunk.n_rows));
  } else if (chunk.last_of_run) {
    chunk.run->drop(chunk.run->source);
  }
}

[[noreturn]] void bad_value(const Chunk& chunk, uint64_t row) {
  fail(ErrorKind::format, "tensor '", chunk.run->source.name, "', row ", row,
       ": a value is not finite (NaN or infinity); the source is damaged");
}

bool all_finite(std::span<const float> values) {
  uint32_t largest = 0;  // magnitude bits order like magnitudes, infinity and NaN above all
  for (const float v : values)
    largest = std::max(largest, std::bit_cast<uint32_t>(v) & 0x7fffffffu);
  return largest < 0x7f800000u;
}

// Of a row of the chunk; null when there is none.
const float* importance_of(const Chunk& chunk, uint64_t row) {
  const TensorJob& job = *chunk.job;
  if (job.importance.empty()) return nullptr;
  uint64_t n_rows = 1;
  for (size_t i = 0; i + 1 < job.shape.size(); ++i) n_rows *= job.shape[i];
  const uint64_t cols = job.shape.back(), n_matrices = job.importance.size() / cols;
  return job.importance.data() + (chunk.run_row + chunk.first_row + row) / (n_rows / n_matrices) * cols;
}

// Values that are only copied, or unpacked to floats, need no opinion where the job has none.
bool is_judged(const TensorJob& job, bool same) { return job.must_be_finite || (!same && job.format->dtype != DType::F32); }

// Rows [begin, end) of the chunk, at most kTileRows.
void encode_tile(const Chunk& chunk, std::byte* out, uint64_t begin, uint64_t end, std::vector<float>& values) {
  const RowRun& run = *chunk.run;
  const Format& to = *chunk.job->format;
  const uint64_t cols = run.cols();
  const size_t out_bytes = row_bytes(to, cols);
  const bool same = run.source.format == &to && run.is_plain();
  const bool judged = is_judged(*chunk.job, same);
  if (!same || judged) read_rows(run, chunk.first_row + begin, end - begin, values.data());
  for (uint64_t i = begin; i < end; ++i) {
    const std::span row(values.data() + (i - begin) * cols, cols);
    const uint64_t from = run.transposed ? chunk.first_row + i : run.source_row(chunk.first_row + i);
    if (judged && !all_finite(row)) bad_value(chunk, from);
    if (same) {
      std::memcpy(out + i * out_bytes, run.source.data.data() + from * out_bytes, out_bytes);  // bit for bit
    } else {
      to.encode_row(row.data(), out + i * out_bytes, cols, importance_of(chunk, i));
      if (judged && !to.scales_finite(out + i * out_bytes, cols)) fail_too_large(run.source.name, from, to);
    }
  }
}

void encode_rows(const Chunk& chunk, std::byte* out, uint64_t begin, uint64_t end) {
  const uint64_t tile = chunk.run->transposed ? kTileRows : 1;
  std::vector<float> values(tile * chunk.run->cols());
  for (uint64_t i = begin; i < end; i += tile) encode_tile(chunk, out, i, std::min(i + tile, end), values);
}

void encode_chunk(const Chunk& chunk, WriteQueue::Buffer& buffer, int n_threads) {
  const uint64_t cols = chunk.run->cols();
  buffer.resize(chunk.output_bytes());
  // Grains of 64k elements keep all threads busy to the end of a chunk.
  const size_t grain = std::max<uint64_t>(chunk.run->transposed ? kTileRows : 1, (uint64_t{64} << 10) / cols);
  parallel_for(n_threads, chunk.n_rows, grain,
               [&](size_t begin, size_t end) { encode_rows(chunk, buffer.data(), begin, end); });
}

void check_cancel(const ConvertOptions& options) {
  if (options.cancel != nullptr && options.cancel->load())
    fail(ErrorKind::cancelled, "interrupted");
}

// Passes over the chunks that an interrupted run has left; their number.
size_t pass_finished(GgufWriter& writer, const std::vector<Chunk>& chunks, ConvertProgress& progress) {
  size_t n = 0;
  for (; n < chunks.size() && writer.has(chunks[n].output_bytes()); ++n) {
    writer.pass(chunks[n].output_bytes());
    progress.done_bytes += chunks[n].source_bytes();
  }
  return n;
}

void write_chunks(GgufWriter& writer, const std::vector<TensorJob>& jobs,
                  const ConvertOptions& options) {
  const std::vector<Chunk> chunks = cut_chunks(jobs);
  const int n_threads = thread_count(options.n_threads);
  ConvertProgress progress;
  progress.n_tensors = jobs.size();
  for (const Chunk& chunk : chunks) progress.total_bytes += chunk.source_bytes();
  const size_t first = pass_finished(writer, chunks, progress);
  if (first > 0 && options.progress) options.progress(progress);
  WriteQueue queue(kBuffers, [&writer](std::span<const std::byte> bytes) { writer.write(bytes); });
  for (size_t i = first; i < chunks.size(); ++i) {
    check_cancel(options);
    if (i + 1 < chunks.size()) prefetch(chunks[i + 1]);
    WriteQueue::Buffer buffer = queue.take();
    encode_chunk(chunks[i], buffer, n_threads);
    queue.put(std::move(buffer));
    drop_source(chunks[i]);
    progress.done_bytes += chunks[i].source_bytes();
    progress.tensor_index = chunks[i].job_index;
    progress.tensor = chunks[i].job->name;
    if (options.progress) options.progress(progress);
  }
  queue.finish();
  check_cancel(options);
}

}  // namespace

uint64_t rope_source_row(uint64_t row, uint64_t n_rows, uint32_t n_heads) {
  const uint64_t head_dim = n_rows / n_heads, half = head_dim / 2;
  const uint64_t head = row / head_dim, i = row % head_dim;
  return head * head_dim + (i % 2) * half + i / 2;
}

void fail_too_large(const std::string& tensor, uint64_t row, const Format& format) {
  fail(ErrorKind::format, "tensor '", tensor, "', row ", row, ": a value is too large for ", format.name,
       "; give the tensor another type (--tensor NAME=BF16 or F32)");
}

SourceRow find_row(const TensorJob& job, uint64_t row) {
  for (const RowRun& run : job.runs) {
    if (row < run.rows()) return {&run, row};
    row -= run.rows();
  }
  fail(ErrorKind::internal, "tensor '", job.name, "' has no row ", row, " more");
}

uint64_t source_bytes(const TensorJob& job) {
  uint64_t n = 0;
  for (const RowRun& run : job.runs) n += run.source.data.size();
  return n;
}

uint64_t output_bytes(const TensorJob& job) {
  uint64_t n_rows = 1;
  for (size_t i = 0; i + 1 < job.shape.size(); ++i) n_rows *= job.shape[i];
  return n_rows * row_bytes(*job.format, job.shape.back());
}

uint64_t RowRun::source_row(uint64_t row) const { return permute_heads == 0 ? row : rope_source_row(row, rows(), permute_heads); }

namespace {

// Columns [first, first + n) of the source as rows.
void read_columns(const RowRun& run, uint64_t first, uint64_t n, float* out) {
  const Format& format = *run.source.format;
  const uint64_t cols = run.cols();
  const size_t stored_bytes = row_bytes(format, run.rows());
  std::vector<float> piece(n);
  for (uint64_t c = 0; c < cols; ++c) {
    format.decode_row(run.source.data.data() + c * stored_bytes + first * format.block_bytes, piece.data(), n);
    for (uint64_t r = 0; r < n; ++r) out[r * cols + c] = piece[r];
  }
}

}  // namespace

void read_rows(const RowRun& run, uint64_t first, uint64_t n, float* out) {
  const uint64_t cols = run.cols();
  if (run.transposed) read_columns(run, first, n, out);
  const size_t bytes = run.transposed ? 0 : row_bytes(*run.source.format, cols);
  for (uint64_t i = 0; i < n; ++i) {
    float* values = out + i * cols;
    if (!run.transposed) {
      const uint64_t from = run.source_row(first + i);
      run.source.format->decode_row(run.source.data.data() + from * bytes, values, cols);
      if (run.scale) run.scale(from, values);
    }
    if (run.add) run.add(first + i, values);
  }
}

TensorView row_slice(const TensorView& view, uint64_t first, uint64_t n) {
  const size_t bytes = row_bytes(*view.format, view.cols());
  return {view.name, view.format, {n, view.cols()}, view.data.subspan(first * bytes, n * bytes)};
}

ConvertPlan plan_of(const std::vector<TensorJob>& jobs, const std::string& recipe) {
  ConvertPlan plan;
  plan.recipe = recipe;
  double n_elems = 0;
  for (const TensorJob& job : jobs) {
    PlannedTensor tensor{job.name, job.format, job.shape, 0};
    uint64_t n = 1;
    for (const uint64_t d : job.shape) n *= d;
    tensor.n_bytes = output_bytes(job);
    plan.source_bytes += source_bytes(job);
    plan.output_bytes += tensor.n_bytes;
    n_elems += static_cast<double>(n);
    plan.tensors.push_back(std::move(tensor));
  }
  if (n_elems > 0) plan.bits_per_weight = 8.0 * static_cast<double>(plan.output_bytes) / n_elems;
  return plan;
}

PartOptions part_options(const ConvertOptions& options, const std::vector<TensorJob>& jobs, const std::string& source, const std::string& settings) {
  Sha256 hash;
  hash.add(std::as_bytes(std::span(settings)));
  for (const TensorJob& job : jobs) hash.add(std::as_bytes(std::span(job.importance)));
  PartOptions out;
  using Mode = PartOptions::Mode;
  out.mode = options.resume ? Mode::resume : options.overwrite ? Mode::replace : Mode::fresh;
  out.identity = {options.program, sha256_of(std::as_bytes(std::span(source))), hex(hash.finish())};
  out.notice = options.notice;
  out.cancel = options.cancel;
  return out;
}

std::unique_ptr<GgufWriter> write_gguf(const std::filesystem::path& output, const std::vector<GgufKeyValue>& metadata,
                                       const std::vector<TensorJob>& jobs, const std::string& source, const ConvertOptions& options) {
  check_overwrite(output, options);
  check_cancel(options);
  auto writer = std::make_unique<GgufWriter>(output, part_options(options, jobs, source, ""));
  for (const GgufKeyValue& kv : metadata) writer->set(kv.key, kv.value);
  for (const TensorJob& job : jobs) writer->add_tensor(job.name, *job.format, job.shape);
  writer->begin();
  write_chunks(*writer, jobs, options);
  writer->complete();
  return writer;
}

void check_overwrite(const std::filesystem::path& output, bool overwrite) {
  if (!overwrite && std::filesystem::exists(output))
    fail(ErrorKind::io, output.string(),
         ": exists already; choose another name or use --force to replace it");
}

void check_overwrite(const std::filesystem::path& output, const ConvertOptions& options) {
  if (options.overwrite || !std::filesystem::exists(output)) return;
  if (!is_unfinished(output)) return check_overwrite(output, false);
  if (!options.resume)
    fail(ErrorKind::io, output.string(), ": is of an unfinished run; --resume goes on with it, --force begins anew");
}

int thread_count(int n_threads) { return n_threads > 0 ? n_threads : read_host_cores().usable(); }

}  // namespace duet
