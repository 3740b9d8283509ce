// GGUF files: reader (v2, v3, split sets) and streaming writer (v3).
//
// Layout: "GGUF", u32 version, u64 n_tensors, u64 n_kv; n_kv x {string key, u32 type, value};
// n_tensors x {string name, u32 n_dims, u64 ne[n_dims] (innermost first), u32 type, u64 offset};
// padding to general.alignment (32); tensor data, each tensor at its offset from there, aligned.
// A string is u64 length + bytes; an array is u32 element type, u64 count, elements.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/mapped_file.h"
#include "base/resumable_file.h"
#include "formats/tensor.h"

namespace duet {

enum class GgufType : uint32_t {
  u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, boolean = 7,
  string = 8, array = 9, u64 = 10, i64 = 11, f64 = 12,
};

// Values of tokenizer.ggml.token_type (SentencePiece's numbers).
enum class TokenType : uint8_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

// A metadata value. Scalars are widened, `type` keeps the stored type so that a copy is exact.
struct GgufValue {
  GgufType type = GgufType::u32;
  GgufType element_type = GgufType::u32;  // of arrays
  std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<uint64_t>,
               std::vector<int64_t>, std::vector<double>, std::vector<bool>,
               std::vector<std::string>>
      data;  // unsigned/signed/float/bool/string scalars, then arrays of the same

  static GgufValue u32(uint32_t v) { return {GgufType::u32, {}, uint64_t{v}}; }
  static GgufValue f32(float v) { return {GgufType::f32, {}, double{v}}; }
  static GgufValue boolean(bool v) { return {GgufType::boolean, {}, v}; }
  static GgufValue string(std::string v) { return {GgufType::string, {}, std::move(v)}; }
  static GgufValue strings(std::vector<std::string> v) { return {GgufType::array, GgufType::string, std::move(v)}; }
  static GgufValue f32s(std::vector<double> v) { return {GgufType::array, GgufType::f32, std::move(v)}; }
  static GgufValue i32s(std::vector<int64_t> v) { return {GgufType::array, GgufType::i32, std::move(v)}; }
};

struct GgufKeyValue {
  std::string key;
  GgufValue value;
};

// An open GGUF file or split set: parsed and validated completely in open(), then trusted.
// Immutable, thread-safe; views live as long as the object (or a copy of it: copies share).
class GgufFile {
 public:
  // Opens `path`; where its name or metadata says "-0000N-of-0000M", the other parts beside it too.
  // Throws Error: io (missing file or part, named), format (damage, with byte offset), unsupported
  // (version, big-endian, a tensor type duet cannot read, raw-cut pieces such as ".gguf-split-a").
  static GgufFile open(const std::filesystem::path& path);
  // Parses bytes in memory (tests, fuzzing): one file, not a set. `bytes` must outlive the object.
  static GgufFile parse(std::span<const std::byte> bytes, const std::string& source);

  const std::string& source() const;  // for messages
  uint32_t version() const;
  uint64_t file_bytes() const;        // all parts
  size_t n_parts() const;
  uint32_t alignment() const;

  std::span<const GgufKeyValue> metadata() const;  // in file order (of the first part)
  const GgufValue* find(std::string_view key) const;
  // Typed look-ups: nullopt/null when absent; Error(format) "source: key 'x' is T, expected U" when
  // of another type or out of range. Integers accept every integer type (files differ).
  std::optional<uint64_t> get_uint(std::string_view key) const;
  std::optional<double> get_float(std::string_view key) const;
  std::optional<bool> get_bool(std::string_view key) const;
  const std::string* get_string(std::string_view key) const;
  const std::vector<std::string>* get_strings(std::string_view key) const;

  std::span<const TensorView> tensors() const;     // in file order, parts concatenated
  const TensorView* find_tensor(std::string_view name) const;
  // Where bytes of a tensor lie on disk, for those who read them other than through the mapping. Not
  // for parse(): Error(internal).
  struct Place {
    size_t part;      // index into part_paths()
    uint64_t offset;  // of the first byte
  };
  std::vector<std::filesystem::path> part_paths() const;
  std::vector<FileIdentity> part_identities() const;  // when they were parsed
  Place place_of(const std::byte* data) const;
  // Tells the kernel that this tensor's pages will not be read again soon.
  void drop(const TensorView& tensor) const;
  // Of any bytes, as MappedFile has them; cached: those that its page cache has, too.
  void drop(std::span<const std::byte> bytes, bool cached) const;
  void fetch(std::span<const std::byte> bytes) const;

 private:
  struct State;
  explicit GgufFile(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

// Writes one GGUF v3 file as a stream: declare everything, then deliver tensor data in the declared
// order. Output is byte-stable for equal input and atomic (base/mapped_file.h).
class GgufWriter {
 public:
  explicit GgufWriter(std::filesystem::path path);
  // As a file that an interrupted run can go on with (base/resumable_file.h). Metadata and declarations are
  // part of its settings without being named there.
  GgufWriter(std::filesystem::path path, PartOptions options);
  ~GgufWriter();
  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;

  void set(std::string key, GgufValue value);  // replaces an equal key in place
  // Declares a tensor; shape row-major, outermost first; cols a multiple of the format's block.
  void add_tensor(std::string name, const Format& format, std::vector<uint64_t> shape);
  uint64_t total_bytes() const;  // of the finished file, from the declarations

  void begin();  // checks disk space, writes the header; nothing may be declared afterwards
  // Appends to the current tensor; may be called in pieces. A tensor is complete when its declared
  // size has been delivered; more, or the next tensor too early, is a programmer error.
  void write(std::span<const std::byte> bytes);
  // Whether an interrupted run has left the next n bytes of tensor data, and passing over them.
  bool has(uint64_t n) const;
  void pass(uint64_t n);
  // Of ResumableFile: what is needed to go on after the last tensor written; that of an earlier run.
  void save_state(const std::vector<std::span<const std::byte>>& pieces);
  std::vector<std::byte> take_state();
  void finish();  // checks completeness, fsync, rename; forgets how to go on
  // The same in two steps, for files that belong together: none gets its name before all are complete.
  void complete();
  static void publish(std::span<GgufWriter* const> files);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace duet
