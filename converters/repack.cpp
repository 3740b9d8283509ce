#include "converters/repack.h"

#include <algorithm>
#include <cstdio>
#include <system_error>

#include "base/error.h"
#include "converters/source.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

// The stored type of all of a tensor's parts.
const Format& stored_format(const TensorJob& job) {
  const Format& format = *job.runs.at(0).source.format;
  for (const RowRun& run : job.runs)
    if (run.source.format != &format)
      fail(ErrorKind::unsupported, "tensor '", job.name, "': its experts are of types ", format.name, " and ", run.source.format->name,
           ", which one tensor cannot hold; the file runs as it is, and duet quantize gives it types of its own");
  return format;
}

// As read, but for how it was split.
std::vector<GgufKeyValue> own_metadata(const GgufFile& file) {
  std::vector<GgufKeyValue> out;
  for (const GgufKeyValue& kv : file.metadata())
    if (!kv.key.starts_with("split.") && kv.key != "general.alignment") out.push_back(kv);
  return out;
}

uint64_t output_bytes(const TensorJob& job) {
  uint64_t n_rows = 1;
  for (size_t i = 0; i + 1 < job.shape.size(); ++i) n_rows *= job.shape[i];
  return n_rows * row_bytes(*job.format, job.shape.back());
}

std::vector<std::vector<TensorJob>> cut(std::vector<TensorJob> jobs, uint64_t max_bytes) {
  std::vector<std::vector<TensorJob>> parts(1);
  uint64_t filled = 0;
  for (TensorJob& job : jobs) {
    const uint64_t n = output_bytes(job);
    if (max_bytes > 0 && !parts.back().empty() && filled + n > max_bytes) {
      parts.emplace_back();
      filled = 0;
    }
    filled += n;
    parts.back().push_back(std::move(job));
  }
  return parts;
}

void add_split_keys(std::vector<GgufKeyValue>& metadata, size_t index, size_t n_parts, size_t n_tensors) {
  metadata.push_back({"split.no", GgufValue{GgufType::u16, {}, uint64_t{index}}});
  metadata.push_back({"split.count", GgufValue{GgufType::u16, {}, uint64_t{n_parts}}});
  metadata.push_back({"split.tensors.count", GgufValue{GgufType::i32, {}, static_cast<int64_t>(n_tensors)}});
}

// Progress over all parts, from that of one.
ConvertOptions options_of_part(const ConvertOptions& options, uint64_t done_bytes, uint64_t total_bytes, size_t first_tensor, size_t n_tensors) {
  ConvertOptions out = options;
  if (options.progress)
    out.progress = [=, report = options.progress](const ConvertProgress& p) {
      ConvertProgress all = p;
      all.done_bytes += done_bytes;
      all.total_bytes = total_bytes;
      all.tensor_index += first_tensor;
      all.n_tensors = n_tensors;
      report(all);
    };
  return out;
}

// Removes what it was told of, unless all went well.
struct Written {
  std::vector<fs::path> paths;
  bool keep = false;
  ~Written() {
    std::error_code ignored;
    for (const fs::path& path : paths)
      if (!keep) fs::remove(path, ignored);
  }
};

uint64_t source_bytes(const std::vector<TensorJob>& jobs) {
  uint64_t n = 0;
  for (const TensorJob& job : jobs) n += source_bytes(job);
  return n;
}

}  // namespace

fs::path part_path(const fs::path& output, size_t index, size_t n) {
  char suffix[64];
  std::snprintf(suffix, sizeof suffix, "-%05zu-of-%05zu.gguf", index + 1, n);
  fs::path stem = output;
  if (stem.extension() == ".gguf") stem.replace_extension();
  return stem.string() + suffix;
}

void write_parts(const fs::path& output, const std::vector<GgufKeyValue>& metadata, std::vector<TensorJob> jobs, const ConvertOptions& options) {
  const size_t n_tensors = jobs.size();
  const uint64_t total_bytes = source_bytes(jobs);
  const auto parts = cut(std::move(jobs), options.split_max_bytes);
  if (parts.size() == 1) return write_gguf(output, metadata, parts[0], options);
  if (parts.size() > UINT16_MAX) fail(ErrorKind::usage, "parts of ", options.split_max_bytes, " bytes make ", parts.size(), " files; at most ", UINT16_MAX);
  for (size_t i = 0; i < parts.size(); ++i) check_overwrite(part_path(output, i, parts.size()), options.overwrite);
  Written written;
  uint64_t done_bytes = 0;
  size_t first_tensor = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    std::vector<GgufKeyValue> keys;
    if (i == 0) keys = metadata;
    add_split_keys(keys, i, parts.size(), n_tensors);
    const fs::path path = part_path(output, i, parts.size());
    write_gguf(path, keys, parts[i], options_of_part(options, done_bytes, total_bytes, first_tensor, n_tensors));
    written.paths.push_back(path);
    done_bytes += source_bytes(parts[i]);
    first_tensor += parts[i].size();
  }
  written.keep = true;
}

void repack(const fs::path& input, const fs::path& output, const ConvertOptions& options) {
  ConvertOptions as = options;
  as.recipe = "F32";
  ConversionSource source = open_gguf(input, as);
  for (TensorJob& job : source.jobs) {
    job.format = &stored_format(job);
    job.must_be_finite = false;
  }
  write_parts(output, own_metadata(*source.file), std::move(source.jobs), options);
}

void merge_parts(const fs::path& input, const fs::path& output, const ConvertOptions& options) {
  const GgufFile file = GgufFile::open(input);
  std::vector<TensorJob> jobs;
  for (const TensorView& tensor : file.tensors())
    jobs.push_back({tensor.name, tensor.format, tensor.shape, {{.source = tensor, .drop = [file](const TensorView& view) { file.drop(view); }}}, false});
  write_gguf(output, own_metadata(file), jobs, options);
}

}  // namespace duet
