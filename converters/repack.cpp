#include "converters/repack.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "converters/source.h"
#include "formats/gguf_parts.h"

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

// Of part `index`; of the only one: without split.* keys.
std::vector<GgufKeyValue> part_metadata(const std::vector<GgufKeyValue>& metadata, size_t index, size_t n_parts, size_t n_tensors) {
  std::vector<GgufKeyValue> out;
  if (index == 0) out = metadata;
  if (n_parts > 1) add_split_keys(out, index, n_parts, n_tensors);
  return out;
}

// Room for all of them, before the first is begun.
template <class PathOf>
void check_room(const std::vector<std::vector<TensorJob>>& parts, const PathOf& path_of) {
  uint64_t needed = 0, there = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    for (const TensorJob& job : parts[i]) needed += output_bytes(job);
    std::error_code ec;
    const fs::path part = part_file_of(path_of(i)), file = is_unfinished(path_of(i)) ? path_of(i) : part;
    if (fs::exists(file, ec)) there += fs::file_size(file, ec);
  }
  check_destination(path_of(0), needed - std::min(needed, there));
}

// Of the names of its parts.
fs::path stem_of(fs::path output) {
  if (output.extension() == ".gguf") output.replace_extension();
  return output;
}

// Files of this output, in whatever number, that a run which was cut off has left unfinished; of how many each is.
std::vector<std::pair<fs::path, size_t>> unfinished_files(const fs::path& output) {
  constexpr std::string_view kEnding = ".part.journal";
  const fs::path folder = output.has_parent_path() ? output.parent_path() : fs::path(".");
  const std::string stem = stem_of(output).filename().string();
  std::vector<std::pair<fs::path, size_t>> out;
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(folder, ec)) {
    std::string name = entry.path().filename().string();
    if (!name.ends_with(kEnding)) continue;
    name.resize(name.size() - kEnding.size());
    const GgufPartName part = parse_part_name(name);
    if (name == output.filename()) out.emplace_back(output.parent_path() / name, 1);
    else if (part.count > 1 && part.prefix == stem) out.emplace_back(output.parent_path() / name, part.count);
  }
  return out;
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

uint64_t source_bytes(const std::vector<TensorJob>& jobs) {
  uint64_t n = 0;
  for (const TensorJob& job : jobs) n += source_bytes(job);
  return n;
}

}  // namespace

fs::path part_path(const fs::path& output, size_t index, size_t n) {
  char suffix[64];
  std::snprintf(suffix, sizeof suffix, "-%05zu-of-%05zu.gguf", index + 1, n);
  return stem_of(output).string() + suffix;
}

void settle_unfinished(const fs::path& output, size_t n, const ConvertOptions& options) {
  const bool anew = options.overwrite && !options.resume;
  for (const auto& [path, count] : unfinished_files(output)) {
    if (anew)
      ResumableFile(path, 0, {.mode = PartOptions::Mode::replace, .identity = {}});  // begun and given up
    else if (count != n)
      fail(ErrorKind::usage, part_file_of(path).string(), ": was begun with other options and cannot be gone on with; --force without --resume begins anew");
  }
}

ConvertPlan plan_parts(const std::vector<GgufKeyValue>& metadata, const std::vector<TensorJob>& jobs, const std::string& recipe, const ConvertOptions& options) {
  ConvertPlan plan = plan_of(jobs, recipe);
  const auto parts = cut(jobs, options.split_max_bytes);
  plan.n_files = parts.size();
  for (size_t i = 0; i < parts.size(); ++i) {
    GgufWriter writer(std::filesystem::path{});
    for (const GgufKeyValue& kv : part_metadata(metadata, i, parts.size(), jobs.size())) writer.set(kv.key, kv.value);
    for (const TensorJob& job : parts[i]) writer.add_tensor(job.name, *job.format, job.shape);
    plan.file_bytes += writer.total_bytes();
  }
  return plan;
}

void write_parts(const fs::path& output, const std::vector<GgufKeyValue>& metadata, std::vector<TensorJob> jobs, const std::string& source,
                 const ConvertOptions& options) {
  const size_t n_tensors = jobs.size();
  const uint64_t total_bytes = source_bytes(jobs);
  const auto parts = cut(std::move(jobs), options.split_max_bytes);
  const size_t n = parts.size();
  if (n == 1) check_whole_name(output);
  if (n > UINT16_MAX) fail(ErrorKind::usage, "parts of ", options.split_max_bytes, " bytes make ", n, " files; at most ", UINT16_MAX);
  const auto path_of = [&](size_t i) { return n == 1 ? output : part_path(output, i, n); };
  // Cut off while the parts got their names: those that have them are of this run (ResumableFile::publish).
  ConvertOptions own = options;
  own.overwrite = options.overwrite || (options.resume && is_unfinished(path_of(0)));
  for (size_t i = 0; i < n; ++i) check_overwrite(path_of(i), own);
  settle_unfinished(output, n, options);
  check_room(parts, path_of);
  std::vector<std::unique_ptr<GgufWriter>> written;
  uint64_t done_bytes = 0;
  size_t first_tensor = 0;
  for (size_t i = 0; i < n; ++i) {
    const ConvertOptions as = options_of_part(own, done_bytes, total_bytes, first_tensor, n_tensors);
    written.push_back(write_gguf(path_of(i), part_metadata(metadata, i, n, n_tensors), parts[i], source, as));
    done_bytes += source_bytes(parts[i]);
    first_tensor += parts[i].size();
  }
  std::vector<GgufWriter*> files;
  for (const auto& file : written) files.push_back(file.get());
  GgufWriter::publish(files);
}

void repack(const fs::path& input, const fs::path& output, const ConvertOptions& options) {
  ConvertOptions as = options;
  as.recipe = "F32";
  ConversionSource source = open_gguf(input, as);
  for (TensorJob& job : source.jobs) {
    job.format = &stored_format(job);
    job.must_be_finite = false;
  }
  write_parts(output, own_metadata(*source.file), std::move(source.jobs), source.identity, options);
}

void merge_parts(const fs::path& input, const fs::path& output, const ConvertOptions& options) {
  const GgufFile file = GgufFile::open(input);
  std::vector<TensorJob> jobs;
  for (const TensorView& tensor : file.tensors())
    jobs.push_back({tensor.name, tensor.format, tensor.shape, {{.source = tensor, .drop = [file](const TensorView& view) { file.drop(view); }}}, false});
  ConvertOptions whole = options;
  whole.split_max_bytes = 0;
  write_parts(output, own_metadata(file), std::move(jobs), identity_of(file), whole);
}

}  // namespace duet
