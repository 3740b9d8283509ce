#include "formats/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "base/bytes.h"
#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "quant/float8.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr const char* kIndexName = "model.safetensors.index.json";

struct Dtype {
  const char* name;
  uint64_t n_bytes;
  const Format* format = nullptr;  // null: known, but not a weight format here
};
struct Entry {
  std::string name;
  const Dtype* dtype = nullptr;
  std::vector<uint64_t> shape;
  uint64_t begin = 0, end = 0;  // from the start of the data
};

const Dtype& dtype_named(const std::string& name, const std::string& where) {
  static const Dtype kDtypes[] = {
      {"F32", 4, &format_of(DType::F32)}, {"F16", 2, &format_of(DType::F16)}, {"BF16", 2, &format_of(DType::BF16)}, {"F64", 8, {}},
      {"I64", 8, {}},         {"I32", 4, {}},         {"I16", 2, {}},           {"I8", 1, {}},
      {"U64", 8, {}},         {"U32", 4, {}},         {"U16", 2, {}},           {"U8", 1, {}},
      {"BOOL", 1, {}},        {"F8_E4M3", 1, &f8_e4m3()},     {"F8_E5M2", 1, {}},
  };
  for (const Dtype& dtype : kDtypes)
    if (name == dtype.name) return dtype;
  fail(ErrorKind::unsupported, where, ": dtype ", quote(name),
       " is not known; duet reads F32, F16, BF16 and F8_E4M3");
}

uint64_t uint_of(const Json& value, const std::string& where, const char* what) {
  if (!value.is_number_unsigned())
    fail(ErrorKind::format, where, ": ", what, " is no non-negative integer");
  return value.get<uint64_t>();
}

const Json& array_of(const Json& object, const char* key, const std::string& where) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_array())
    fail(ErrorKind::format, where, ": '", key, "' is missing or no array");
  return *it;
}

Entry read_entry(const std::string& name, const Json& value, const std::string& source) {
  const std::string where = concat(source, ": tensor ", quote(name));
  if (!value.is_object()) fail(ErrorKind::format, where, ": its description is no JSON object");
  Entry entry;
  entry.name = name;
  entry.dtype = &dtype_named(json_get<std::string>(value, "dtype", where), where);
  uint64_t n_bytes = entry.dtype->n_bytes;
  for (const Json& dim : array_of(value, "shape", where)) {
    entry.shape.push_back(uint_of(dim, where, "a dimension"));
    if (!checked_mul(n_bytes, entry.shape.back(), n_bytes))
      fail(ErrorKind::format, where, ": its size does not fit 64 bits");
  }
  const Json& offsets = array_of(value, "data_offsets", where);
  if (offsets.size() != 2)
    fail(ErrorKind::format, where, ": 'data_offsets' has ", offsets.size(), " numbers, expected 2");
  entry.begin = uint_of(offsets[0], where, "an offset");
  entry.end = uint_of(offsets[1], where, "an offset");
  if (entry.end < entry.begin || entry.end - entry.begin != n_bytes)
    fail(ErrorKind::format, where, ": offsets ", entry.begin, " to ", entry.end,
         ", its shape and dtype need ", n_bytes, " bytes");
  return entry;
}

// Data must be covered exactly: entries sorted by offset meet, the last ends with the file.
void check_coverage(const std::vector<Entry>& entries, uint64_t data_bytes,
                    const std::string& source) {
  uint64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected)
      fail(ErrorKind::format, source, ": tensor ", quote(entry.name), " begins at data byte ",
           entry.begin, ", expected ", expected, " (", entry.begin < expected ? "overlap" : "gap",
           ")");
    expected = entry.end;
  }
  if (expected != data_bytes)
    fail(ErrorKind::format, source, ": tensors end at data byte ", expected, ", the file has ",
         data_bytes, expected > data_bytes ? " bytes: it is truncated" : " bytes");
}

TensorView view_of(const Entry& entry, std::span<const std::byte> data, const std::string& source) {
  const std::string where = concat(source, ": tensor ", quote(entry.name));
  if (entry.dtype->format == nullptr)
    fail(ErrorKind::unsupported, where, " is of dtype ", entry.dtype->name,
         "; duet reads F32, F16, BF16 and F8_E4M3 weights");
  if (entry.shape.size() > 4)
    fail(ErrorKind::unsupported, where, " has ", entry.shape.size(),
         " dimensions, at most 4 accepted");
  // Kernels read 16-bit values in place. Writers pad the header to 8 bytes, so this is rare.
  if (entry.dtype->n_bytes > 1 && reinterpret_cast<uintptr_t>(data.data() + entry.begin) % 2 != 0)
    fail(ErrorKind::unsupported, where,
         " begins at an odd byte of the file; rewrite the file with a current safetensors library");
  if (entry.begin == entry.end) fail(ErrorKind::unsupported, where, " has no elements");
  TensorView view;
  view.name = entry.name;
  view.format = entry.dtype->format;
  view.shape = entry.shape.empty() ? std::vector<uint64_t>{1} : entry.shape;
  view.data = data.subspan(entry.begin, entry.end - entry.begin);
  return view;
}

// The entries of one file, by data offset, and the bytes that they cover.
struct Shard {
  std::vector<Entry> entries;
  std::span<const std::byte> data;
};

Shard read_shard(std::span<const std::byte> bytes, const std::string& source) {
  ByteReader in(bytes, source);
  const uint64_t header_bytes = in.read<uint64_t>("safetensors header length");
  if (header_bytes > kMaxHeaderBytes)
    fail(ErrorKind::format, source, ": header of ", header_bytes, " bytes, at most ",
         kMaxHeaderBytes, " accepted; not a safetensors file, or damaged");
  const std::string_view text = in.text(header_bytes, "safetensors header");
  const Json header = parse_json(text, source, {.max_bytes = kMaxHeaderBytes, .max_depth = 4});
  if (!header.is_object()) fail(ErrorKind::format, source, ": header is no JSON object");
  Shard shard;
  for (const auto& [name, value] : header.items())
    if (name != "__metadata__") shard.entries.push_back(read_entry(name, value, source));
  std::sort(shard.entries.begin(), shard.entries.end(), [](const Entry& a, const Entry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  check_coverage(shard.entries, in.remaining(), source);
  shard.data = in.take(in.remaining(), "tensor data");
  return shard;
}

std::vector<fs::path> files_ending(const fs::path& folder,
                                   std::initializer_list<const char*> endings) {
  std::vector<fs::path> out;
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(folder, ec))
    for (const char* ending : endings)
      if (entry.path().extension() == ending) out.push_back(entry.path());
  if (ec) fail(ErrorKind::io, folder.string(), ": cannot list the folder: ", ec.message());
  std::sort(out.begin(), out.end());
  return out;
}

// The weights file of a folder without an index.
fs::path single_file(const fs::path& folder) {
  const auto files = files_ending(folder, {".safetensors"});
  if (files.size() == 1) return files[0];
  if (files.size() > 1) {
    const fs::path model = folder / "model.safetensors";
    if (std::find(files.begin(), files.end(), model) != files.end()) return model;
    fail(ErrorKind::io, (folder / kIndexName).string(), ": missing, and the folder has ",
         files.size(), " .safetensors files");
  }
  const auto pickles = files_ending(folder, {".bin", ".pt", ".pth"});
  if (!pickles.empty())
    fail(ErrorKind::unsupported, folder.string(), ": only PyTorch pickles (",
         pickles[0].filename().string(),
         "), which can run programs when they are read; duet reads safetensors: get the repository's .safetensors files, or "
         "make some with torch.load(FILE, weights_only=True) and safetensors.torch.save_file");
  fail(ErrorKind::io, folder.string(), ": no .safetensors file there");
}

// Shard file name -> the tensors it must hold.
using WeightMap = std::map<std::string, std::unordered_set<std::string>>;

WeightMap read_index(const fs::path& path) {
  const std::string source = path.string();
  const Json index = parse_json(read_file(path, kMaxHeaderBytes), source,
                                {.max_bytes = kMaxHeaderBytes, .max_depth = 8});
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty())
    fail(ErrorKind::format, source, ": 'weight_map' is missing or empty");
  WeightMap out;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string())
      fail(ErrorKind::format, source, ": tensor ", quote(tensor), ": its shard is no file name");
    const auto name = file.get<std::string>();
    // A file beside the index, nothing else: an index must not lead to other folders.
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos)
      fail(ErrorKind::format, source, ": tensor ", quote(tensor), ": shard ", quote(name),
           " is no plain file name");
    out[name].insert(tensor);
  }
  return out;
}

}  // namespace

struct Safetensors::State {
  std::vector<MappedFile> files;
  std::vector<TensorView> tensors;
  std::unordered_map<std::string_view, const TensorView*> tensor_index;  // into tensors
  uint64_t file_bytes = 0;

  void add(std::span<const std::byte> bytes, const std::string& source,
           const std::unordered_set<std::string>* wanted);
  void add_file(const fs::path& path, const std::unordered_set<std::string>* wanted);
  void index();
};

// `wanted`: the tensors that the index places here; null takes all.
void Safetensors::State::add(std::span<const std::byte> bytes, const std::string& source,
                             const std::unordered_set<std::string>* wanted) {
  const Shard shard = read_shard(bytes, source);
  size_t n_found = 0;
  for (const Entry& entry : shard.entries) {
    if (wanted != nullptr && !wanted->contains(entry.name)) continue;
    tensors.push_back(view_of(entry, shard.data, source));
    ++n_found;
  }
  file_bytes += bytes.size();
  if (wanted == nullptr || n_found == wanted->size()) return;
  std::unordered_set<std::string> present;
  for (const Entry& entry : shard.entries) present.insert(entry.name);
  std::string missing;
  for (const std::string& name : *wanted)
    if (!present.contains(name) && (missing.empty() || name < missing)) missing = name;
  fail(ErrorKind::format, source, ": lacks tensor ", quote(missing), " (", wanted->size() - n_found,
       " in all) that the index places there");
}

void Safetensors::State::add_file(const fs::path& path,
                                  const std::unordered_set<std::string>* wanted) {
  files.push_back(MappedFile::open(path));
  add(files.back().bytes(), path.string(), wanted);
}

void Safetensors::State::index() {
  for (const TensorView& tensor : tensors) tensor_index.emplace(tensor.name, &tensor);
}

Safetensors Safetensors::open(const fs::path& path) {
  auto state = std::make_shared<State>();
  std::error_code ec;
  const fs::path index_path = path / kIndexName;
  if (!fs::is_directory(path, ec)) {
    state->add_file(path, nullptr);
  } else if (!fs::exists(index_path, ec)) {
    state->add_file(single_file(path), nullptr);
  } else {
    for (const auto& [shard, tensors] : read_index(index_path)) {
      if (!fs::exists(path / shard, ec))
        fail(ErrorKind::io, (path / shard).string(), ": this shard of the index is missing");
      state->add_file(path / shard, &tensors);
    }
  }
  state->index();
  return Safetensors(std::move(state));
}

Safetensors Safetensors::open_all(const std::vector<fs::path>& files) {
  auto state = std::make_shared<State>();
  for (const fs::path& file : files) state->add_file(file, nullptr);
  state->index();
  if (state->tensor_index.size() == state->tensors.size()) return Safetensors(std::move(state));
  std::unordered_set<std::string_view> seen;
  for (const TensorView& tensor : state->tensors)
    if (!seen.insert(tensor.name).second) fail(ErrorKind::format, files[0].parent_path().string(), ": two files hold tensor ", quote(tensor.name));
  return Safetensors(std::move(state));
}

Safetensors Safetensors::parse(std::span<const std::byte> bytes, const std::string& source) {
  auto state = std::make_shared<State>();
  state->add(bytes, source, nullptr);
  state->index();
  return Safetensors(std::move(state));
}

std::span<const TensorView> Safetensors::tensors() const { return state_->tensors; }
uint64_t Safetensors::file_bytes() const { return state_->file_bytes; }

std::vector<std::pair<fs::path, FileIdentity>> Safetensors::files() const {
  std::vector<std::pair<fs::path, FileIdentity>> out;
  for (const MappedFile& file : state_->files) out.emplace_back(file.path(), file.identity());
  return out;
}

std::string identity_of(const Safetensors& files) {
  std::string out;
  for (const auto& [path, identity] : files.files()) out += identity_line(path, identity);
  return out;
}

const TensorView* Safetensors::find_tensor(std::string_view name) const {
  const auto it = state_->tensor_index.find(name);
  return it == state_->tensor_index.end() ? nullptr : it->second;
}

void Safetensors::drop(const TensorView& tensor) const {
  for (const MappedFile& file : state_->files) file.drop(tensor.data);
}

}  // namespace duet
