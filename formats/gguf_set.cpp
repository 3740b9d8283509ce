// GgufFile: one file, or the parts "-0000N-of-0000M.gguf" of a set joined, and typed look-ups.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <iterator>
#include <unordered_map>

#include "base/error.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "formats/gguf_parts.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

bool all_of_kind(std::string_view text, int (*kind)(int)) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [&](char c) {
    return kind(static_cast<unsigned char>(c)) != 0;
  });
}

std::string part_file_name(const GgufPartName& name, uint64_t number) {
  std::array<char, 32> digits{};
  std::snprintf(digits.data(), digits.size(), "-%05llu-of-%05llu.gguf",
                static_cast<unsigned long long>(number),
                static_cast<unsigned long long>(name.count));
  return name.prefix + digits.data();
}

// What follows ".gguf" in the names of files cut by `split` or an old upload tool: "-split-a",
// ".part-a", ".part1of2".
bool is_piece_suffix(std::string_view suffix) {
  if (suffix.starts_with("-split-")) return all_of_kind(suffix.substr(7), std::isalpha);
  if (suffix.starts_with(".part-")) return all_of_kind(suffix.substr(6), std::isalpha);
  if (!suffix.starts_with(".part")) return false;
  const size_t of = suffix.find("of");
  return of != std::string_view::npos && all_of_kind(suffix.substr(5, of - 5), std::isdigit) &&
         all_of_kind(suffix.substr(of + 2), std::isdigit);
}

void refuse_raw_piece(const fs::path& path) {
  constexpr std::string_view kEnding = ".gguf";
  const std::string file_name = path.filename().string();
  const size_t at = file_name.rfind(kEnding);
  if (at == std::string::npos ||
      !is_piece_suffix(std::string_view(file_name).substr(at + kEnding.size())))
    return;
  const std::string whole = file_name.substr(0, at + kEnding.size());
  fail(ErrorKind::unsupported, path.string(), ": a raw piece of '", whole,
       "': join all pieces in order first (cat PIECES > ", whole, ")");
}

uint64_t uint_or(const GgufPart& part, std::string_view key, uint64_t fallback) {
  for (const GgufKeyValue& kv : part.metadata) {
    if (kv.key != key) continue;
    if (const auto* u = std::get_if<uint64_t>(&kv.value.data)) return *u;
    if (const auto* i = std::get_if<int64_t>(&kv.value.data); i != nullptr && *i >= 0)
      return static_cast<uint64_t>(*i);
  }
  return fallback;
}

std::string value_kind(const GgufValue& value) {
  if (value.type != GgufType::array) return gguf_type_name(value.type);
  return concat("an array of ", gguf_type_name(value.element_type));
}

}  // namespace

GgufPartName parse_part_name(const std::string& file_name) {
  constexpr std::string_view kTail = "-00000-of-00000.gguf";
  if (file_name.size() <= kTail.size()) return {};
  const size_t at = file_name.size() - kTail.size();
  const std::string_view tail = std::string_view(file_name).substr(at);
  const std::string_view number = tail.substr(1, 5), count = tail.substr(10, 5);
  const bool matches = tail[0] == '-' && tail.substr(6, 4) == "-of-" && tail.ends_with(".gguf");
  if (!matches || !all_of_kind(number, std::isdigit) || !all_of_kind(count, std::isdigit))
    return {};
  return {file_name.substr(0, at), std::stoull(std::string(number)),
          std::stoull(std::string(count))};
}

void check_whole_name(const fs::path& path) {
  const GgufPartName name = parse_part_name(path.filename().string());
  if (name.count > 1)
    fail(ErrorKind::usage, path.string(), ": one file, but named part ", name.number, " of ", name.count,
         " of a set; choose another name");
}

struct GgufFile::State {
  std::string source;
  uint32_t version = 0;
  uint64_t alignment = 0;
  uint64_t file_bytes = 0;
  std::vector<MappedFile> files;  // empty when parsed from memory
  size_t n_parts = 0;
  std::vector<GgufKeyValue> metadata;
  std::vector<TensorView> tensors;
  std::unordered_map<std::string_view, const GgufKeyValue*> key_index;   // into metadata
  std::unordered_map<std::string_view, const TensorView*> tensor_index;  // into tensors

  void add(GgufPart part, uint64_t n_bytes);
  void index();
  void open_set(const fs::path& folder, const GgufPartName& name);
  template <class T>
  const T* typed(std::string_view key, const char* expected) const;
};

// Metadata come from the first part.
void GgufFile::State::add(GgufPart part, uint64_t n_bytes) {
  if (n_parts++ == 0) {
    version = part.version;
    alignment = part.alignment;
    metadata = std::move(part.metadata);
  }
  file_bytes += n_bytes;
  std::move(part.tensors.begin(), part.tensors.end(), std::back_inserter(tensors));
}

void GgufFile::State::index() {
  for (const GgufKeyValue& kv : metadata) key_index.emplace(kv.key, &kv);
  for (const TensorView& tensor : tensors) {
    if (!tensor_index.emplace(tensor.name, &tensor).second)
      fail(ErrorKind::format, source, ": tensor ", quote(tensor.name),
           " is in two parts of the set");
  }
}

void GgufFile::State::open_set(const fs::path& folder, const GgufPartName& name) {
  uint64_t n_tensors = 0;
  for (uint64_t number = 1; number <= name.count; ++number) {
    const fs::path path = folder / part_file_name(name, number);
    if (std::error_code ec; !fs::exists(path, ec))
      fail(ErrorKind::io, path.string(), ": part ", number, " of ", name.count,
           " is missing; put all parts in one folder");
    files.push_back(MappedFile::open(path));
    GgufPart part = read_gguf_part(files.back().bytes(), path.string());
    const uint64_t no = uint_or(part, "split.no", number - 1),
                   count = uint_or(part, "split.count", name.count);
    if (no != number - 1 || count != name.count)
      fail(ErrorKind::format, path.string(), ": named part ", number, " of ", name.count,
           ", but its metadata say part ", no + 1, " of ", count);
    if (number == 1) n_tensors = uint_or(part, "split.tensors.count", 0);
    add(std::move(part), files.back().bytes().size());
  }
  if (n_tensors != 0 && n_tensors != tensors.size())
    fail(ErrorKind::format, source, ": the parts have ", tensors.size(),
         " tensors, split.tensors.count says ", n_tensors);
  // Joined, it is one model: a copy of these keys into one file would name parts that it lacks.
  std::erase_if(metadata, [](const GgufKeyValue& kv) { return kv.key.starts_with("split."); });
}

GgufFile GgufFile::open(const fs::path& path) {
  auto state = std::make_shared<State>();
  state->source = path.string();
  MappedFile file = MappedFile::open(path);
  refuse_raw_piece(path);
  const GgufPartName name = parse_part_name(path.filename().string());
  GgufPart part = read_gguf_part(file.bytes(), state->source);
  const uint64_t count = uint_or(part, "split.count", 0);
  const uint64_t number = uint_or(part, "split.no", 0) + 1;
  if (count > 1 && name.count <= 1)
    fail(ErrorKind::io, state->source, ": part ", number, " of ", count, " of a set, but not named '",
         part_file_name({"...", number, count}, number),
         "', so the other parts cannot be found; restore its name");
  if (name.count > 1) {
    if (name.number < 1 || name.number > name.count)
      fail(ErrorKind::format, state->source, ": named part ", name.number, " of ", name.count);
    state->open_set(path.parent_path(), name);
  } else {
    state->files.push_back(std::move(file));
    state->add(std::move(part), state->files.back().bytes().size());
  }
  state->index();
  return GgufFile(std::move(state));
}

GgufFile GgufFile::parse(std::span<const std::byte> bytes, const std::string& source) {
  auto state = std::make_shared<State>();
  state->source = source;
  state->add(read_gguf_part(bytes, source), bytes.size());
  state->index();
  return GgufFile(std::move(state));
}

const std::string& GgufFile::source() const { return state_->source; }
uint32_t GgufFile::version() const { return state_->version; }
uint64_t GgufFile::file_bytes() const { return state_->file_bytes; }
size_t GgufFile::n_parts() const { return state_->n_parts; }
uint32_t GgufFile::alignment() const { return static_cast<uint32_t>(state_->alignment); }
std::span<const GgufKeyValue> GgufFile::metadata() const { return state_->metadata; }
std::span<const TensorView> GgufFile::tensors() const { return state_->tensors; }

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto it = state_->key_index.find(key);
  return it == state_->key_index.end() ? nullptr : &it->second->value;
}

const TensorView* GgufFile::find_tensor(std::string_view name) const {
  const auto it = state_->tensor_index.find(name);
  return it == state_->tensor_index.end() ? nullptr : it->second;
}

// Null when absent; Error(format) when the value holds another alternative than T.
template <class T>
const T* GgufFile::State::typed(std::string_view key, const char* expected) const {
  const auto it = key_index.find(key);
  if (it == key_index.end()) return nullptr;
  const GgufValue& value = it->second->value;
  const T* data = std::get_if<T>(&value.data);
  if (data == nullptr)
    fail(ErrorKind::format, source, ": key '", key, "' is ", value_kind(value), ", expected ",
         expected);
  return data;
}

std::optional<uint64_t> GgufFile::get_uint(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!std::holds_alternative<int64_t>(value->data))
    return *state_->typed<uint64_t>(key, "an integer");
  const int64_t number = std::get<int64_t>(value->data);
  if (number < 0)
    fail(ErrorKind::format, source(), ": key '", key, "' is ", number,
         ", expected a non-negative integer");
  return static_cast<uint64_t>(number);
}

std::optional<double> GgufFile::get_float(std::string_view key) const {
  const double* value = state_->typed<double>(key, "a floating-point number");
  return value == nullptr ? std::nullopt : std::optional(*value);
}

std::optional<bool> GgufFile::get_bool(std::string_view key) const {
  const bool* value = state_->typed<bool>(key, "a boolean");
  return value == nullptr ? std::nullopt : std::optional(*value);
}

const std::string* GgufFile::get_string(std::string_view key) const {
  return state_->typed<std::string>(key, "a string");
}

const std::vector<std::string>* GgufFile::get_strings(std::string_view key) const {
  return state_->typed<std::vector<std::string>>(key, "an array of strings");
}

std::vector<fs::path> GgufFile::part_paths() const {
  std::vector<fs::path> out;
  for (const MappedFile& file : state_->files) out.push_back(file.path());
  return out;
}

std::vector<FileIdentity> GgufFile::part_identities() const {
  std::vector<FileIdentity> out;
  for (const MappedFile& file : state_->files) out.push_back(file.identity());
  return out;
}

GgufFile::Place GgufFile::place_of(const std::byte* data) const {
  const auto address = reinterpret_cast<uintptr_t>(data);
  for (size_t i = 0; i < state_->files.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(state_->files[i].bytes().data());
    if (address >= begin && address - begin < state_->files[i].bytes().size()) return {i, address - begin};
  }
  fail(ErrorKind::internal, state_->source, ": bytes outside the mapped file");
}

void GgufFile::drop(const TensorView& tensor) const { drop(tensor.data, false); }

void GgufFile::fetch(std::span<const std::byte> bytes) const {
  for (const MappedFile& file : state_->files) file.fetch(bytes);
}

void GgufFile::drop(std::span<const std::byte> bytes, bool cached) const {
  for (const MappedFile& file : state_->files) file.drop(bytes, cached);
}

}  // namespace duet
