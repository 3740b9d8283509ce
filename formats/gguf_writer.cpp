#include <algorithm>
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
  std::unique_ptr<OutputFile> file;  // from begin() on
  std::vector<std::byte> buffer;
  size_t current = 0;      // tensor being written
  uint64_t delivered = 0;  // bytes of it

  uint64_t alignment() const;
  HeaderBytes header() const;
  uint64_t data_bytes() const;
  void put(std::span<const std::byte> bytes);
  void flush();
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
    file->write(bytes);
  else
    buffer.insert(buffer.end(), bytes.begin(), bytes.end());
}

void GgufWriter::State::flush() {
  file->write(buffer);
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

GgufWriter::~GgufWriter() = default;

void GgufWriter::set(std::string key, GgufValue value) {
  DUET_ASSERT(state_->file == nullptr);
  auto& metadata = state_->metadata;
  const auto it =
      std::find_if(metadata.begin(), metadata.end(), [&](const auto& kv) { return kv.key == key; });
  if (it == metadata.end())
    metadata.push_back({std::move(key), std::move(value)});
  else
    it->value = std::move(value);
}

void GgufWriter::add_tensor(std::string name, const Format& format, std::vector<uint64_t> shape) {
  DUET_ASSERT(state_->file == nullptr);
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
  DUET_ASSERT(state_->file == nullptr);
  const HeaderBytes header = state_->header();
  state_->file = std::make_unique<OutputFile>(state_->path, header.size() + state_->data_bytes());
  state_->buffer.reserve(kBufferBytes);
  state_->put(std::as_bytes(std::span(header.bytes())));
}

void GgufWriter::write(std::span<const std::byte> bytes) {
  DUET_ASSERT(state_->file != nullptr && state_->current < state_->tensors.size());
  const DeclaredTensor& tensor = state_->tensors[state_->current];
  if (bytes.size() > tensor.n_bytes - state_->delivered)
    fail(ErrorKind::internal, "tensor '", tensor.name, "': ", state_->delivered + bytes.size(),
         " bytes delivered, declared ", tensor.n_bytes);
  state_->put(bytes);
  state_->delivered += bytes.size();
  if (state_->delivered == tensor.n_bytes) state_->end_tensor();
}

void GgufWriter::finish() {
  DUET_ASSERT(state_->file != nullptr);
  if (state_->current < state_->tensors.size())
    fail(ErrorKind::internal, "tensor '", state_->tensors[state_->current].name,
         "' is incomplete: ", state_->delivered, " of ", state_->tensors[state_->current].n_bytes,
         " bytes");
  state_->flush();
  state_->file->commit();
}

}  // namespace duet
