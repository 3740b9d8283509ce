#include <algorithm>
#include <array>
#include <unordered_set>

#include "base/bytes.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"

namespace duet {
namespace {

constexpr uint32_t kVersion = 3;
// Tensors arrive in pieces of one row or a few; the disk likes some MiB at a time.
constexpr size_t kBufferBytes = size_t{4} << 20;

struct DeclaredTensor {
  std::string name;
  const Format* format;
  std::vector<uint64_t> shape;
  uint64_t n_bytes;
};

class HeaderBytes {
 public:
  template <class T>
  void number(T value) {
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void string(std::string_view text) {
    number<uint64_t>(text.size());
    out_ += text;
  }
  void value(const GgufValue& value) {
    number(static_cast<uint32_t>(value.type));
    if (value.type != GgufType::array) {
      std::visit([&](const auto& v) { scalar(value.type, v); }, value.data);
      return;
    }
    number(static_cast<uint32_t>(value.element_type));
    std::visit([&](const auto& v) { elements(value.element_type, v); }, value.data);
  }
  size_t size() const { return out_.size(); }
  void pad_to(uint64_t n) { out_.resize(n, '\0'); }
  const std::string& bytes() const { return out_; }

 private:
  template <class T>
  void narrow(T value, GgufType type) {
    switch (type) {
      case GgufType::u8:
        number(static_cast<uint8_t>(value));
        break;
      case GgufType::i8:
        number(static_cast<int8_t>(value));
        break;
      case GgufType::u16:
        number(static_cast<uint16_t>(value));
        break;
      case GgufType::i16:
        number(static_cast<int16_t>(value));
        break;
      case GgufType::u32:
        number(static_cast<uint32_t>(value));
        break;
      case GgufType::i32:
        number(static_cast<int32_t>(value));
        break;
      case GgufType::u64:
        number(static_cast<uint64_t>(value));
        break;
      case GgufType::i64:
        number(static_cast<int64_t>(value));
        break;
      default:
        fail(ErrorKind::internal, "GGUF metadata: an integer cannot be stored as type ",
             static_cast<int>(type));
    }
  }

  void scalar(GgufType type, uint64_t v) { narrow(v, type); }
  void scalar(GgufType type, int64_t v) { narrow(v, type); }
  void scalar(GgufType type, bool v) {
    DUET_ASSERT(type == GgufType::boolean);
    number(static_cast<uint8_t>(v));
  }
  void scalar(GgufType type, double v) {
    DUET_ASSERT(type == GgufType::f32 || type == GgufType::f64);
    if (type == GgufType::f32)
      number(static_cast<float>(v));
    else
      number(v);
  }
  void scalar(GgufType type, const std::string& v) {
    DUET_ASSERT(type == GgufType::string);
    string(v);
  }
  template <class T>
  void scalar(GgufType, const std::vector<T>&) {
    fail(ErrorKind::internal, "GGUF metadata: a list is not a scalar");
  }
  template <class T>
  void elements(GgufType type, const std::vector<T>& list) {
    number<uint64_t>(list.size());
    for (const auto& element : list) scalar(type, element);
  }
  template <class T>
  void elements(GgufType, const T&) {
    fail(ErrorKind::internal, "GGUF metadata: a scalar is not a list");
  }

  std::string out_;
};

uint64_t align_up(uint64_t value, uint64_t alignment) {
  uint64_t out = 0;
  DUET_ASSERT(checked_align_up(value, alignment, out));
  return out;
}

}  // namespace

struct GgufWriter::State {
  std::filesystem::path path;
  std::vector<GgufKeyValue> metadata;
  std::vector<DeclaredTensor> tensors;
  std::unordered_set<std::string> names;
  std::optional<PartOptions> part_options;
  std::unique_ptr<OutputFile> file;     // from begin() on: one of these
  std::unique_ptr<ResumableFile> part;
  std::vector<std::byte> buffer;
  size_t current = 0;      // tensor being written
  uint64_t delivered = 0;  // bytes of it

  uint64_t alignment() const;
  HeaderBytes header() const;
  uint64_t data_bytes() const;
  bool begun() const { return file != nullptr || part != nullptr; }
  void put(std::span<const std::byte> bytes);
  void raw(std::span<const std::byte> bytes);
  void flush();
  void check_room(uint64_t n) const;
  void end_tensor();
};

uint64_t GgufWriter::State::alignment() const {
  for (const GgufKeyValue& kv : metadata)
    if (kv.key == "general.alignment") return std::get<uint64_t>(kv.value.data);
  return 32;
}

HeaderBytes GgufWriter::State::header() const {
  HeaderBytes out;
  out.number<uint32_t>(0x46554747);  // "GGUF"
  out.number(kVersion);
  out.number<uint64_t>(tensors.size());
  out.number<uint64_t>(metadata.size());
  for (const GgufKeyValue& kv : metadata) {
    out.string(kv.key);
    out.value(kv.value);
  }
  uint64_t offset = 0;
  for (const DeclaredTensor& tensor : tensors) {
    out.string(tensor.name);
    out.number(static_cast<uint32_t>(tensor.shape.size()));
    for (size_t d = tensor.shape.size(); d-- > 0;) out.number(tensor.shape[d]);  // innermost first
    out.number(static_cast<uint32_t>(tensor.format->dtype));
    out.number(offset);
    offset += align_up(tensor.n_bytes, alignment());
  }
  out.pad_to(align_up(out.size(), alignment()));
  return out;
}

uint64_t GgufWriter::State::data_bytes() const {
  uint64_t n = 0;
  for (const DeclaredTensor& tensor : tensors) n += align_up(tensor.n_bytes, alignment());
  return n;
}

void GgufWriter::State::put(std::span<const std::byte> bytes) {
  if (buffer.size() + bytes.size() > kBufferBytes) flush();
  if (bytes.size() >= kBufferBytes)
    raw(bytes);
  else
    buffer.insert(buffer.end(), bytes.begin(), bytes.end());
}

void GgufWriter::State::raw(std::span<const std::byte> bytes) {
  if (part != nullptr) return part->write(bytes);
  file->write(bytes);
}

void GgufWriter::State::flush() {
  raw(buffer);
  buffer.clear();
}

void GgufWriter::State::end_tensor() {
  const uint64_t padding = align_up(delivered, alignment()) - delivered;
  put(std::vector<std::byte>(padding));
  ++current;
  delivered = 0;
}

GgufWriter::GgufWriter(std::filesystem::path path) : state_(std::make_unique<State>()) {
  state_->path = std::move(path);
}

GgufWriter::GgufWriter(std::filesystem::path path, PartOptions options) : GgufWriter(std::move(path)) {
  state_->part_options = std::move(options);
}

GgufWriter::~GgufWriter() = default;

void GgufWriter::set(std::string key, GgufValue value) {
  DUET_ASSERT(!state_->begun());
  auto& metadata = state_->metadata;
  const auto it =
      std::find_if(metadata.begin(), metadata.end(), [&](const auto& kv) { return kv.key == key; });
  if (it == metadata.end())
    metadata.push_back({std::move(key), std::move(value)});
  else
    it->value = std::move(value);
}

void GgufWriter::add_tensor(std::string name, const Format& format, std::vector<uint64_t> shape) {
  DUET_ASSERT(!state_->begun());
  DUET_ASSERT(!shape.empty() && shape.size() <= 4);
  DUET_ASSERT(shape.back() % format.block_elems == 0);
  uint64_t n_bytes = row_bytes(format, shape.back());
  for (size_t d = 0; d + 1 < shape.size(); ++d)
    DUET_ASSERT(checked_mul(n_bytes, shape[d], n_bytes));
  DUET_ASSERT(n_bytes > 0);
  if (!state_->names.insert(name).second)
    fail(ErrorKind::internal, "tensor '", name, "' declared twice");
  state_->tensors.push_back({std::move(name), &format, std::move(shape), n_bytes});
}

uint64_t GgufWriter::total_bytes() const { return state_->header().size() + state_->data_bytes(); }

void GgufWriter::begin() {
  DUET_ASSERT(!state_->begun());
  const HeaderBytes header = state_->header();
  const uint64_t n_bytes = header.size() + state_->data_bytes();
  const auto bytes = std::as_bytes(std::span(header.bytes()));
  if (state_->part_options) {
    PartOptions options = *state_->part_options;
    options.identity.settings += concat(" ", sha256_of(bytes));
    state_->part = std::make_unique<ResumableFile>(state_->path, n_bytes, std::move(options));
  } else {
    state_->file = std::make_unique<OutputFile>(state_->path, n_bytes);
  }
  state_->buffer.reserve(kBufferBytes);
  state_->put(bytes);
}

void GgufWriter::State::check_room(uint64_t n) const {
  DUET_ASSERT(begun() && current < tensors.size());
  const DeclaredTensor& tensor = tensors[current];
  if (n > tensor.n_bytes - delivered)
    fail(ErrorKind::internal, "tensor '", tensor.name, "': ", delivered + n, " bytes delivered, declared ", tensor.n_bytes);
}

void GgufWriter::write(std::span<const std::byte> bytes) {
  state_->check_room(bytes.size());
  state_->put(bytes);
  state_->delivered += bytes.size();
  if (state_->delivered == state_->tensors[state_->current].n_bytes) state_->end_tensor();
}

bool GgufWriter::has(uint64_t n) const {
  DUET_ASSERT(state_->begun());
  if (state_->part == nullptr) return false;
  const uint64_t at = state_->part->position() + state_->buffer.size(), intact = state_->part->intact();
  return at <= intact && n <= intact - at;
}

void GgufWriter::pass(uint64_t n) {
  DUET_ASSERT(has(n));
  state_->check_room(n);
  state_->flush();
  state_->part->skip(n);
  state_->delivered += n;
  if (state_->delivered == state_->tensors[state_->current].n_bytes) state_->end_tensor();
}

void GgufWriter::save_state(const std::vector<std::span<const std::byte>>& pieces) {
  DUET_ASSERT(state_->part != nullptr && state_->delivered == 0);
  state_->flush();
  state_->part->save_state(pieces);
}

std::vector<std::byte> GgufWriter::take_state() {
  DUET_ASSERT(state_->part != nullptr);
  return state_->part->take_state();
}

void GgufWriter::finish() {
  complete();
  publish(std::array{this});
}

void GgufWriter::complete() {
  DUET_ASSERT(state_->begun());
  if (state_->current < state_->tensors.size())
    fail(ErrorKind::internal, "tensor '", state_->tensors[state_->current].name,
         "' is incomplete: ", state_->delivered, " of ", state_->tensors[state_->current].n_bytes,
         " bytes");
  state_->flush();
  if (state_->part != nullptr) state_->part->complete();
}

void GgufWriter::publish(std::span<GgufWriter* const> files) {
  std::vector<ResumableFile*> parts;
  for (const GgufWriter* writer : files) {
    if (writer->state_->part != nullptr) parts.push_back(writer->state_->part.get());
    else writer->state_->file->commit();
  }
  ResumableFile::publish(parts);
}

}  // namespace duet
