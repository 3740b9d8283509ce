#include "formats/imatrix.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "base/bytes.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"

namespace duet {
namespace {

constexpr std::string_view kSums = ".in_sum2", kCounts = ".counts";

[[noreturn]] void bad(const std::string& source, const auto&... parts) {
  fail(ErrorKind::format, source, ": ", parts...);
}

void check_values(const std::string& source, const std::string& name, const ImatrixEntry& entry) {
  const auto good = [](float v) { return std::isfinite(v) && v >= 0; };
  if (entry.counts.empty() || entry.sums.size() % entry.counts.size() != 0)
    bad(source, "importance of '", name, "': ", entry.sums.size(), " values for ", entry.counts.size(), " matrices");
  if (!std::all_of(entry.sums.begin(), entry.sums.end(), good) || !std::all_of(entry.counts.begin(), entry.counts.end(), good))
    bad(source, "importance of '", name, "' has a value that is negative or not finite; the file is damaged");
}

// ---- GGUF -----------------------------------------------------------------------------------

std::vector<float> floats_of(const std::string& source, const TensorView& tensor) {
  if (tensor.format->dtype != DType::F32) bad(source, "tensor '", tensor.name, "' is ", tensor.format->name, ", expected F32");
  std::vector<float> out(tensor.n_elems());
  std::memcpy(out.data(), tensor.data.data(), tensor.data.size());
  return out;
}

Imatrix from_gguf(const GgufFile& file) {
  const std::string& source = file.source();
  Imatrix out;
  const std::string* type = file.get_string("general.type");
  if (type == nullptr || *type != "imatrix") bad(source, "not an importance matrix but ", type ? *type : "another kind of GGUF", "; make one by duet imatrix");
  if (const auto* datasets = file.get_strings("imatrix.datasets")) out.datasets = *datasets;
  out.n_chunks = static_cast<uint32_t>(std::min<uint64_t>(file.get_uint("imatrix.chunk_count").value_or(0), UINT32_MAX));
  out.chunk_size = static_cast<uint32_t>(std::min<uint64_t>(file.get_uint("imatrix.chunk_size").value_or(0), UINT32_MAX));
  for (const TensorView& tensor : file.tensors()) {
    if (!tensor.name.ends_with(kSums)) continue;
    const std::string name = tensor.name.substr(0, tensor.name.size() - kSums.size());
    const TensorView* counts = file.find_tensor(name + std::string(kCounts));
    if (counts == nullptr) bad(source, "sums of '", name, "' have no counts");
    ImatrixEntry entry{floats_of(source, tensor), floats_of(source, *counts)};
    if (entry.counts.size() > 1 && entry.counts.size() != tensor.rows())
      bad(source, "importance of '", name, "': sums of ", tensor.rows(), " matrices, counts of ", entry.counts.size());
    check_values(source, name, entry);
    out.entries.emplace(name, std::move(entry));
  }
  if (out.entries.empty()) bad(source, "an importance matrix without entries");
  return out;
}

// ---- legacy ---------------------------------------------------------------------------------

size_t read_count(ByteReader& in, std::string_view what) {
  const auto n = in.read<int32_t>(what);
  if (n < 0) in.bad("negative number of ", what, ": ", n);
  return static_cast<size_t>(n);
}

Imatrix from_legacy(std::span<const std::byte> bytes, const std::string& source) {
  ByteReader in(bytes, source);
  Imatrix out;
  out.legacy = true;
  const size_t n_entries = read_count(in, "entries");
  if (n_entries == 0) in.bad("an importance matrix without entries");
  for (size_t i = 0; i < n_entries; ++i) {
    const std::string name(in.text(read_count(in, "name bytes"), "a name"));
    ImatrixEntry entry;
    entry.counts = {static_cast<float>(read_count(in, "calls"))};
    const size_t n = read_count(in, "values");
    const auto values = in.take(uint64_t{n} * sizeof(float), "values");
    entry.sums.resize(n);
    std::memcpy(entry.sums.data(), values.data(), values.size());
    check_values(source, name, entry);
    if (!out.entries.emplace(name, std::move(entry)).second) in.bad("'", name, "' is there twice");
  }
  if (in.remaining() >= 4) out.n_chunks = static_cast<uint32_t>(read_count(in, "chunks"));
  if (in.remaining() >= 4) out.datasets.emplace_back(in.text(read_count(in, "name bytes"), "the text's name"));
  return out;
}

// ---- look-up --------------------------------------------------------------------------------

// Sums and counts of all matrices of a tensor.
struct Gathered {
  std::vector<double> sums;    // [n_matrices, cols]
  std::vector<double> counts;  // [n_matrices]
};

void append(Gathered& out, const ImatrixEntry& entry, size_t n_matrices) {
  out.sums.insert(out.sums.end(), entry.sums.begin(), entry.sums.end());
  for (size_t m = 0; m < n_matrices; ++m) out.counts.push_back(double{entry.counts[entry.n_matrices() == 1 ? 0 : m]});
}

const ImatrixEntry* find_entry(const Imatrix& imatrix, const std::string& name) {
  const auto it = imatrix.entries.find(name);
  return it == imatrix.entries.end() ? nullptr : &it->second;
}

// What the imatrix has for the tensor, under its name or those of its experts; empty when it has nothing.
Gathered gather(const Imatrix& imatrix, const TensorSpec& spec, size_t n_matrices, const std::string& source) {
  const size_t cols = spec.shape.back();
  Gathered out;
  const auto check = [&](const std::string& name, const ImatrixEntry& entry, size_t n) {
    if (entry.sums.size() != n * cols || (entry.n_matrices() != 1 && entry.n_matrices() != n))
      bad(source, "importance of '", name, "' is for ", entry.n_matrices(), " x ", entry.sums.size() / entry.n_matrices(),
          " inputs, the model's tensor has ", n, " x ", cols, "; it was made with another model");
  };
  if (const ImatrixEntry* whole = find_entry(imatrix, spec.gguf_name)) {
    check(spec.gguf_name, *whole, n_matrices);
    append(out, *whole, n_matrices);
    return out;
  }
  if (n_matrices == 1) return out;
  const ImatrixEntry none{std::vector<float>(cols), {0.0f}};
  bool any = false;
  for (size_t e = 0; e < n_matrices; ++e) {
    const std::string name = split_expert_name(spec.kind, spec.layer, static_cast<int>(e));
    const ImatrixEntry* part = find_entry(imatrix, name);
    if (part != nullptr) check(name, *part, 1);
    any |= part != nullptr;
    append(out, part != nullptr ? *part : none, 1);
  }
  return any ? out : Gathered{};
}

}  // namespace

Imatrix parse_imatrix(std::span<const std::byte> bytes, const std::string& source) {
  if (bytes.size() >= 4 && std::memcmp(bytes.data(), "GGUF", 4) == 0) return from_gguf(GgufFile::parse(bytes, source));
  return from_legacy(bytes, source);
}

Imatrix read_imatrix(const std::filesystem::path& path) {
  const MappedFile file = MappedFile::open(path);
  return parse_imatrix(file.bytes(), path.string());
}

void write_imatrix(const std::filesystem::path& path, const Imatrix& imatrix) {
  GgufWriter writer(path);
  writer.set("general.type", GgufValue::string("imatrix"));
  writer.set("imatrix.datasets", GgufValue::strings(imatrix.datasets));
  writer.set("imatrix.chunk_count", GgufValue::u32(imatrix.n_chunks));
  writer.set("imatrix.chunk_size", GgufValue::u32(imatrix.chunk_size));
  const Format& f32 = format_of(DType::F32);
  for (const auto& [name, entry] : imatrix.entries) {
    writer.add_tensor(name + std::string(kSums), f32, {entry.n_matrices(), entry.sums.size() / entry.n_matrices()});
    writer.add_tensor(name + std::string(kCounts), f32, {entry.n_matrices(), 1});
  }
  writer.begin();
  for (const auto& [name, entry] : imatrix.entries) {
    writer.write(std::as_bytes(std::span(entry.sums)));
    writer.write(std::as_bytes(std::span(entry.counts)));
  }
  writer.finish();
}

std::optional<TensorImportance> find_importance(const Imatrix& imatrix, const TensorSpec& spec, const std::string& source) {
  const size_t cols = spec.shape.back(), n_matrices = spec.shape.size() == 3 ? spec.shape[0] : 1;
  const Gathered all = gather(imatrix, spec, n_matrices, source);
  TensorImportance out;
  out.weights.resize(n_matrices * cols);
  std::vector<double> mean(cols);
  double n_rows = 0;
  for (size_t m = 0; m < all.counts.size(); ++m) {
    if (all.counts[m] <= 0) continue;
    n_rows += all.counts[m];
    for (size_t c = 0; c < cols; ++c) mean[c] += all.sums[m * cols + c];
  }
  if (n_rows <= 0) return std::nullopt;
  for (size_t m = 0; m < n_matrices; ++m) {
    const bool known = all.counts[m] > 0;
    if (!known) out.without_data.push_back(m);
    for (size_t c = 0; c < cols; ++c) {
      const double weight = known ? all.sums[m * cols + c] / all.counts[m] : mean[c] / n_rows;
      if (weight > double{FLT_MAX}) bad(source, "importance of '", spec.gguf_name, "' has a mean that is too large; the file is damaged");
      out.weights[m * cols + c] = static_cast<float>(weight);
    }
  }
  return out;
}

}  // namespace duet
