#include <algorithm>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "runtime/vocabulary.h"

namespace duet {
namespace {

// A well-spread hash never comes near it: only a vocabulary made to collide does.
constexpr size_t kMaxProbes = 4096;

// Up to 8 bytes as one number, by loads of fixed size: a memcpy of n bytes would be a call.
uint64_t load_tail(const char* at, size_t n) {
  if (n == 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    return word;
  }
  if (n >= 4) {
    uint32_t low, high;
    std::memcpy(&low, at, 4);
    std::memcpy(&high, at + n - 4, 4);
    return uint64_t{high} << 32 | low;
  }
  const auto byte = [at](size_t i) { return uint64_t{static_cast<unsigned char>(at[i])}; };
  return byte(0) | byte(n / 2) << 8 | byte(n - 1) << 16;
}

uint32_t hash_piece(std::string_view piece) {
  constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15;
  uint64_t hash = piece.size() * kMultiplier;
  while (!piece.empty()) {
    const size_t n = std::min<size_t>(8, piece.size());
    hash = (hash ^ load_tail(piece.data(), n)) * kMultiplier;
    hash ^= hash >> 29;
    piece.remove_prefix(n);
  }
  return static_cast<uint32_t>(hash >> 32);
}

}  // namespace

PieceMap::PieceMap(const std::vector<std::string>& pieces, const std::string& source)
    : pieces_(&pieces), slots_(std::bit_ceil(pieces.size() * 2 + 1)), mask_(slots_.size() - 1) {
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].empty()) continue;
    const uint32_t hash = hash_piece(pieces[i]);
    size_t at = hash & mask_;
    for (size_t n_probes = 0; slots_[at].id >= 0; at = (at + 1) & mask_) {
      if (slots_[at].hash == hash && pieces[static_cast<size_t>(slots_[at].id)] == pieces[i])
        fail(ErrorKind::format, source, ": tokens ", slots_[at].id, " and ", i,
             " of the vocabulary are the same text; the file is damaged");
      if (++n_probes > kMaxProbes)
        fail(ErrorKind::format, source, ": the vocabulary is degenerate (token ", i, ")");
    }
    slots_[at] = {hash, static_cast<Token>(i)};
  }
}

std::optional<Token> PieceMap::find(std::string_view piece) const {
  if (piece.empty()) return std::nullopt;
  const uint32_t hash = hash_piece(piece);
  for (size_t at = hash & mask_; slots_[at].id >= 0; at = (at + 1) & mask_) {
    const Slot& slot = slots_[at];
    if (slot.hash == hash && (*pieces_)[static_cast<size_t>(slot.id)] == piece) return slot.id;
  }
  return std::nullopt;
}

}  // namespace duet
