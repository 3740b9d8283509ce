// Model::own_dense
#include <atomic>
#include <cerrno>
#include <cstring>
#include <unordered_map>

#include "base/block_reader.h"
#include "base/error.h"
#include "runtime/engine.h"
#include "runtime/model.h"

namespace duet {
namespace {

// One dense matrix: its pages in the file and its place among the copies.
struct Piece {
  ReadRange range;
  size_t head;  // bytes before the first weight
};

size_t round_up(size_t n) { return (n + kReadAlignment - 1) / kReadAlignment * kReadAlignment; }

void read_all(const GgufFile& file, const std::vector<Piece>& pieces, const StreamOptions& options) {
  std::vector<ReadRange> ranges;
  for (const Piece& piece : pieces)
    for (size_t at = 0; at < piece.range.n_bytes; at += kReadBytes) {
      ReadRange range = piece.range;
      range.offset += at;
      range.to += at;
      range.n_bytes = std::min(kReadBytes, piece.range.n_bytes - at);
      range.n_needed = std::min(range.n_bytes, piece.range.n_needed - std::min(at, piece.range.n_needed));
      ranges.push_back(range);
    }
  std::atomic<size_t> n_left{ranges.size()};
  std::atomic<int> first_error{0};
  const auto done = [&](uint64_t, int error) {
    int none = 0;
    if (error != 0) first_error.compare_exchange_strong(none, error);
    if (n_left.fetch_sub(1) == 1) n_left.notify_all();
  };
  const auto reader = BlockReader::open(file.part_paths(), done,
                                        {.backend = options.backend, .depth = options.depth, .expected = file.part_identities(), .fault = options.fault});
  reader->submit(ranges, ReadClass::demand);
  for (size_t left = n_left.load(); left != 0; left = n_left.load()) n_left.wait(left);
  if (const int error = first_error.load(); error != 0)
    fail(ErrorKind::io, file.source(), ": cannot read: ", error == ENODATA ? "the file has become shorter" : std::strerror(error));
}

}  // namespace

void Model::own_dense(const StreamOptions& options, bool beside_card) {
  std::vector<Weight*> weights{&token_embd_};
  if (!beside_card) weights.push_back(&output_);
  for (Layer& layer : layers_)
    if (!beside_card) weights.insert(weights.end(), {&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output});
  std::vector<Piece> pieces;
  std::unordered_map<const std::byte*, size_t> piece_of;  // a tied output is the embedding
  uint64_t total = 0;
  for (const Weight* w : weights) {
    if (!piece_of.emplace(w->data, pieces.size()).second) continue;
    const GgufFile::Place place = file_.place_of(w->data);
    const size_t head = place.offset % kReadAlignment, n_needed = head + w->rows * w->row_bytes;
    pieces.push_back({{.file = place.part, .offset = place.offset - head, .n_bytes = round_up(n_needed), .n_needed = n_needed}, head});
    total += round_up(n_needed);
  }
  dense_ = PageArray(total);
  std::byte* at = dense_.data();
  for (Piece& piece : pieces) {
    piece.range.to = at;
    at += piece.range.n_bytes;
  }
  read_all(file_, pieces, options);
  for (Weight* w : weights) {
    const Piece& piece = pieces[piece_of.at(w->data)];
    w->data = piece.range.to + piece.head;
  }
  // Norms and routers were read through the page cache, which counts as ours: a few bytes each, but as
  // much around them as the disk's read-ahead takes.
  for (const TensorView& tensor : file_.tensors()) file_.drop(tensor);
  for (const auto& path : file_.part_paths()) drop_from_cache(path);
}

}  // namespace duet
