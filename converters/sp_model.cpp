#include "converters/sp_model.h"

#include <bit>

#include "base/bytes.h"

namespace duet {
namespace {

// One field of a protobuf message: number, and a number or a byte string by its wire type.
struct Field {
  uint32_t number = 0;
  uint64_t value = 0;
  std::span<const std::byte> bytes;

  bool flag() const { return value != 0; }
  int integer() const { return static_cast<int>(static_cast<int64_t>(value)); }
};

uint64_t read_varint(ByteReader& in) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const auto byte = in.read<uint8_t>("a number");
    value |= uint64_t{byte & 0x7fu} << shift;
    if ((byte & 0x80u) == 0) return value;
  }
  in.bad("a number of more than ten bytes; not a SentencePiece model");
}

Field read_field(ByteReader& in) {
  const uint64_t tag = read_varint(in);
  Field field;
  field.number = static_cast<uint32_t>(tag >> 3);
  switch (tag & 7u) {
    case 0:
      field.value = read_varint(in);
      break;
    case 1:
      field.value = in.read<uint64_t>("a field");
      break;
    case 2:
      field.bytes = in.take(read_varint(in), "a field");
      break;
    case 5:
      field.value = in.read<uint32_t>("a field");
      break;
    default:
      in.bad("unknown field kind ", tag & 7u, "; not a SentencePiece model");
  }
  return field;
}

template <class Visit>
void for_each_field(std::span<const std::byte> bytes, const std::string& source, Visit&& visit) {
  ByteReader in(bytes, source);
  while (in.remaining() > 0) visit(read_field(in));
}

SpPiece parse_piece(std::span<const std::byte> bytes, const std::string& source) {
  SpPiece piece;
  for_each_field(bytes, source, [&](const Field& f) {
    if (f.number == 1)
      piece.text.assign(reinterpret_cast<const char*>(f.bytes.data()), f.bytes.size());
    if (f.number == 2) piece.score = std::bit_cast<float>(static_cast<uint32_t>(f.value));
    if (f.number == 3) piece.type = f.integer();
  });
  return piece;
}

void parse_trainer_spec(std::span<const std::byte> bytes, const std::string& source,
                        SpModel& model) {
  for_each_field(bytes, source, [&](const Field& f) {
    switch (f.number) {
      case 3:
        model.model_type = f.integer();
        break;
      case 40:
        model.unk_id = f.integer();
        break;
      case 41:
        model.bos_id = f.integer();
        break;
      case 42:
        model.eos_id = f.integer();
        break;
      case 43:
        model.pad_id = f.integer();
        break;
      default:
        break;
    }
  });
}

void parse_normalizer_spec(std::span<const std::byte> bytes, const std::string& source,
                           SpModel& model) {
  for_each_field(bytes, source, [&](const Field& f) {
    if (f.number == 2) model.has_normalization_rules = !f.bytes.empty();
    if (f.number == 3) model.add_dummy_prefix = f.flag();
    if (f.number == 4) model.remove_extra_whitespaces = f.flag();
  });
}

}  // namespace

SpModel parse_sp_model(std::span<const std::byte> bytes, const std::string& source) {
  SpModel model;
  for_each_field(bytes, source, [&](const Field& f) {
    if (f.number == 1) model.pieces.push_back(parse_piece(f.bytes, source));
    if (f.number == 2) parse_trainer_spec(f.bytes, source, model);
    if (f.number == 3) parse_normalizer_spec(f.bytes, source, model);
  });
  if (model.pieces.empty())
    fail(ErrorKind::format, source, ": no pieces; not a SentencePiece model");
  for (size_t i = 0; i < model.pieces.size(); ++i) {
    const SpPiece& piece = model.pieces[i];
    if (piece.type < 1 || piece.type > 6 || !(piece.score > -1e30f && piece.score < 1e30f))
      fail(ErrorKind::format, source, ": piece ", i, " has type ", piece.type, " and score ",
           piece.score, "; the model is damaged");
  }
  return model;
}

}  // namespace duet
