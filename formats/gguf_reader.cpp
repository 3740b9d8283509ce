// Reading one GGUF file: header, metadata, tensor directory, each number checked before its use.
// Files that form a set: gguf_set.cpp.
#include <algorithm>
#include <array>
#include <bit>
#include <unordered_set>

#include "base/bytes.h"
#include "base/error.h"
#include "formats/gguf_parts.h"

namespace duet {
namespace {

constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxKeyBytes = 65535;
// A whole tokenizer.json is one string.
constexpr uint64_t kMaxStringBytes = uint64_t{64} << 20;
// Real files have some dozens of keys, some thousands of tensors and at most a million list items.
constexpr uint64_t kMaxKeys = uint64_t{1} << 16;
constexpr uint64_t kMaxTensors = uint64_t{1} << 20;
// Ceiling of decoded metadata in memory, so that a large hostile file cannot demand more.
constexpr uint64_t kMaxMetadataBytes = uint64_t{1} << 30;
constexpr uint32_t kGgmlTypeCount = 43;  // ids below it are (or were) ggml types

constexpr std::array<const char*, 13> kTypeNames = {
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};
constexpr std::array<uint64_t, 13> kLeastBytes = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};

// One part being read. The order of members is the order of the file.
class PartReader {
 public:
  PartReader(std::span<const std::byte> bytes, const std::string& source)
      : in_(bytes, source), bytes_(bytes), source_(source) {}

  GgufPart read() {
    read_prologue();
    const uint64_t n_tensors = in_.read<uint64_t>("tensor count");
    const uint64_t n_keys = in_.read<uint64_t>("metadata count");
    check_count(n_keys, kMaxKeys, 8 + 4 + 1, "metadata count");
    check_count(n_tensors, kMaxTensors, 8 + 4 + 8 + 4 + 8, "tensor count");
    read_metadata(n_keys);
    read_alignment();
    read_directory(n_tensors);
    bind_data();
    return std::move(part_);
  }

 private:
  struct Place {
    uint64_t offset, n_bytes;
  };

  void read_prologue() {
    if (bytes_.empty()) fail(ErrorKind::format, source_, ": not a GGUF file: it is empty");
    const auto magic = bytes_.first(std::min<size_t>(4, bytes_.size()));
    const std::string_view text(reinterpret_cast<const char*>(magic.data()), magic.size());
    if (text != "GGUF")
      fail(ErrorKind::format, source_, ": not a GGUF file: starts with ", quote(text),
           ", expected 'GGUF'");
    in_.take(4, "magic");
    part_.version = in_.read<uint32_t>("version");
    if (part_.version != 0 && (part_.version & 0xffffu) == 0)
      fail(ErrorKind::unsupported, source_, ": big-endian GGUF (version ",
           __builtin_bswap32(part_.version), " byte-swapped); duet reads little-endian files only");
    if (part_.version < 2 || part_.version > 3)
      fail(ErrorKind::unsupported, source_, ": GGUF version ", part_.version,
           ", duet reads versions 2 and 3");
  }

  void check_count(uint64_t n, uint64_t most, uint64_t least_bytes, const char* what) const {
    if (n > most || n > in_.remaining() / least_bytes)
      in_.bad(what, " is ", n, ", more than the ", in_.remaining(),
              " bytes left (or any real model) can hold");
  }

  void charge(uint64_t n_bytes) {
    if (n_bytes > kMaxMetadataBytes - metadata_bytes_)
      in_.bad("metadata larger than ", kMaxMetadataBytes, " bytes");
    metadata_bytes_ += n_bytes;
  }

  std::string read_string(uint64_t most, const char* what) {
    const uint64_t n = in_.read<uint64_t>(what);
    if (n > most) in_.bad(what, " of ", n, " bytes, at most ", most, " accepted");
    charge(n);
    return std::string(in_.text(n, what));
  }

  void read_metadata(uint64_t n_keys) {
    std::unordered_set<std::string> seen;
    part_.metadata.reserve(n_keys);
    for (uint64_t i = 0; i < n_keys; ++i) {
      std::string key = read_string(kMaxKeyBytes, "metadata key");
      if (key.empty()) in_.bad("metadata key ", i, " is empty");
      if (!seen.insert(key).second) in_.bad("metadata key ", quote(key), " appears twice");
      key_ = key;
      GgufValue value = read_value();
      part_.metadata.push_back({std::move(key), std::move(value)});
    }
  }

  GgufType read_type() {
    const uint32_t id = in_.read<uint32_t>("metadata type");
    if (id >= kTypeNames.size()) in_.bad("key ", quote(key_), ": type id ", id, " does not exist");
    return static_cast<GgufType>(id);
  }

  GgufValue read_value() {
    GgufValue value;
    value.type = read_type();
    if (value.type == GgufType::array) {
      read_array(value);
      return value;
    }
    switch (value.type) {
      case GgufType::f32:
      case GgufType::f64:
        value.data = read_float(value.type);
        break;
      case GgufType::boolean:
        value.data = read_bool();
        break;
      case GgufType::string:
        value.data = read_string(kMaxStringBytes, "metadata string");
        break;
      case GgufType::i8:
      case GgufType::i16:
      case GgufType::i32:
      case GgufType::i64:
        value.data = read_signed(value.type);
        break;
      default:
        value.data = read_unsigned(value.type);
    }
    return value;
  }

  void read_array(GgufValue& value) {
    value.element_type = read_type();
    if (value.element_type == GgufType::array)
      in_.bad("key ", quote(key_), ": arrays of arrays are not accepted");
    const uint64_t n = in_.read<uint64_t>("array length");
    const uint64_t least = kLeastBytes[static_cast<size_t>(value.element_type)];
    if (n > in_.remaining() / least)
      in_.bad("key ", quote(key_), ": array of ", n, " elements in ", in_.remaining(),
              " remaining bytes");
    const GgufType type = value.element_type;
    switch (type) {
      case GgufType::f32:
      case GgufType::f64:
        value.data = read_list<double>(n, [&] { return read_float(type); });
        break;
      case GgufType::boolean:
        value.data = read_list<bool>(n, [&] { return read_bool(); });
        break;
      case GgufType::string:
        value.data = read_list<std::string>(
            n, [&] { return read_string(kMaxStringBytes, "string of an array"); });
        break;
      case GgufType::i8:
      case GgufType::i16:
      case GgufType::i32:
      case GgufType::i64:
        value.data = read_list<int64_t>(n, [&] { return read_signed(type); });
        break;
      default:
        value.data = read_list<uint64_t>(n, [&] { return read_unsigned(type); });
    }
  }

  template <class T, class ReadOne>
  std::vector<T> read_list(uint64_t n, ReadOne read_one) {
    if (n > kMaxMetadataBytes) in_.bad("key ", quote(key_), ": array of ", n, " elements");
    charge(n * sizeof(T));
    std::vector<T> out;
    out.reserve(n);
    for (uint64_t i = 0; i < n; ++i) out.push_back(read_one());
    return out;
  }

  uint64_t read_unsigned(GgufType type) {
    switch (type) {
      case GgufType::u8:
        return in_.read<uint8_t>("metadata value");
      case GgufType::u16:
        return in_.read<uint16_t>("metadata value");
      case GgufType::u32:
        return in_.read<uint32_t>("metadata value");
      default:
        return in_.read<uint64_t>("metadata value");
    }
  }

  int64_t read_signed(GgufType type) {
    switch (type) {
      case GgufType::i8:
        return in_.read<int8_t>("metadata value");
      case GgufType::i16:
        return in_.read<int16_t>("metadata value");
      case GgufType::i32:
        return in_.read<int32_t>("metadata value");
      default:
        return in_.read<int64_t>("metadata value");
    }
  }

  double read_float(GgufType type) {
    if (type == GgufType::f32) return double{in_.read<float>("metadata value")};
    return in_.read<double>("metadata value");
  }

  bool read_bool() {
    const uint8_t raw = in_.read<uint8_t>("metadata value");
    if (raw > 1) in_.bad("key ", quote(key_), ": boolean with value ", unsigned{raw});
    return raw == 1;
  }

  void read_alignment() {
    part_.alignment = kDefaultAlignment;
    for (const GgufKeyValue& kv : part_.metadata) {
      if (kv.key != "general.alignment") continue;
      if (kv.value.type != GgufType::u32)
        in_.bad("general.alignment is of type ", gguf_type_name(kv.value.type), ", expected u32");
      part_.alignment = std::get<uint64_t>(kv.value.data);
      if (!std::has_single_bit(part_.alignment) || part_.alignment < 8 ||
          part_.alignment > (1u << 20))
        in_.bad("general.alignment is ", part_.alignment,
                ", expected a power of two from 8 to 1048576");
    }
  }

  void read_directory(uint64_t n_tensors) {
    std::unordered_set<std::string> seen;
    part_.tensors.reserve(n_tensors);
    places_.reserve(n_tensors);
    for (uint64_t i = 0; i < n_tensors; ++i) {
      TensorView tensor;
      tensor.name = read_string(kMaxKeyBytes, "tensor name");
      if (tensor.name.empty()) in_.bad("tensor ", i, " has no name");
      if (!seen.insert(tensor.name).second)
        in_.bad("tensor ", quote(tensor.name), " appears twice");
      tensor.shape = read_shape(tensor.name);
      tensor.format = read_format(tensor.name);
      places_.push_back(read_place(tensor));
      part_.tensors.push_back(std::move(tensor));
    }
  }

  // Row-major; the file has the innermost dimension first.
  std::vector<uint64_t> read_shape(const std::string& name) {
    const uint32_t n_dims = in_.read<uint32_t>("dimension count");
    if (n_dims < 1 || n_dims > 4)
      in_.bad("tensor ", quote(name), " has ", n_dims, " dimensions, expected 1 to 4");
    std::vector<uint64_t> shape(n_dims);
    for (uint32_t d = n_dims; d-- > 0;) {
      shape[d] = in_.read<uint64_t>("tensor dimension");
      if (shape[d] == 0) in_.bad("tensor ", quote(name), " has a dimension of 0");
    }
    return shape;
  }

  const Format* read_format(const std::string& name) {
    const uint32_t id = in_.read<uint32_t>("tensor type");
    if (id >= kGgmlTypeCount)
      in_.bad("tensor ", quote(name), " has type id ", id, ", which does not exist");
    const Format* format = find_format(id);
    if (format == nullptr)
      fail(ErrorKind::unsupported, source_, ": tensor ", quote(name), " is of type ",
           ggml_type_name(id), ", which duet cannot read");
    return format;
  }

  // Offset of the tensor from the start of the data and its size; not yet compared with the file.
  Place read_place(const TensorView& tensor) {
    const Format& format = *tensor.format;
    if (tensor.cols() % format.block_elems != 0)
      in_.bad("tensor ", quote(tensor.name), ": rows of ", tensor.cols(),
              " elements are no multiple of the ", format.block_elems, " of a ", format.name,
              " block");
    uint64_t n_bytes = tensor.cols() / format.block_elems;
    bool fits = checked_mul(n_bytes, format.block_bytes, n_bytes);
    uint64_t n_elems = 1;
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      fits = fits && checked_mul(n_elems, tensor.shape[d], n_elems);
      if (d + 1 < tensor.shape.size())
        fits = fits && checked_mul(n_bytes, tensor.shape[d], n_bytes);
    }
    if (!fits) in_.bad("tensor ", quote(tensor.name), ": its size does not fit 64 bits");
    return {in_.read<uint64_t>("tensor offset"), n_bytes};
  }

  void bind_data() {
    uint64_t start = 0;
    if (!checked_align_up(in_.offset(), part_.alignment, start)) in_.bad("header end overflows");
    uint64_t previous_end = 0;
    for (size_t i = 0; i < places_.size(); ++i) {
      TensorView& tensor = part_.tensors[i];
      const Place& place = places_[i];
      if (place.offset % part_.alignment != 0)
        in_.bad("tensor ", quote(tensor.name), ": offset ", place.offset, " is not aligned to ",
                part_.alignment);
      if (place.offset < previous_end)
        in_.bad("tensor ", quote(tensor.name), ": offset ", place.offset, " lies before the end ",
                previous_end, " of the tensor listed before it (overlap or wrong order)");
      uint64_t begin = 0;
      if (!checked_add(place.offset, place.n_bytes, previous_end) ||
          !checked_add(start, place.offset, begin) || begin > bytes_.size() ||
          place.n_bytes > bytes_.size() - begin)
        in_.bad("tensor ", quote(tensor.name), ": ", place.n_bytes, " bytes at data offset ",
                place.offset, " lie outside the file of ", bytes_.size(),
                " bytes; the file is truncated or damaged");
      tensor.data = bytes_.subspan(begin, place.n_bytes);
    }
  }

  ByteReader in_;
  std::span<const std::byte> bytes_;
  const std::string& source_;
  GgufPart part_;
  std::vector<Place> places_;  // parallel to part_.tensors
  std::string key_;            // being read, for messages
  uint64_t metadata_bytes_ = 0;
};

}  // namespace

const char* gguf_type_name(GgufType type) { return kTypeNames[static_cast<size_t>(type)]; }

GgufPart read_gguf_part(std::span<const std::byte> bytes, const std::string& source) {
  return PartReader(bytes, source).read();
}

}  // namespace duet
