#include "runtime/expert_source.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/error.h"
#include "runtime/memory_plan.h"

namespace duet {
namespace {

constexpr std::array kParts{ExpertPart::gate, ExpertPart::up, ExpertPart::down};
size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
size_t index_of(ExpertPart part) { return static_cast<size_t>(part); }

Weight& part_of(Expert& expert, ExpertPart part) {
  return part == ExpertPart::gate ? expert.gate : part == ExpertPart::up ? expert.up : expert.down;
}
const Weight& part_of(const Expert& expert, ExpertPart part) { return part_of(const_cast<Expert&>(expert), part); }
size_t weight_bytes(const Weight& w) { return w.rows * w.row_bytes; }

}  // namespace

// Memory for one expert, and how much of it has landed.
struct ExpertSource::Buffer {
  uint64_t index = 0;
  std::byte* memory = nullptr;
  size_t n_bytes = 0;
  bool is_staging = false;
  size_t layer = 0;
  int32_t expert = -1;  // what it holds or is being filled with; -1: nothing
  Expert weights;
  std::array<size_t, 4> first_piece{};          // of each part; then their number
  std::array<size_t, 3> part_bytes{};           // to be read
  std::unique_ptr<std::atomic<Piece>[]> pieces; // room for the largest expert
  std::atomic<uint32_t> n_waiting{0};
  std::atomic<int> error{0};
  std::atomic<uint64_t> n_read{0};  // bytes that have landed
  bool unwanted = false;            // holds a wrong guess, of which pieces may be under way
  uint32_t distance = 0;            // of the guess that it was filled for

  bool holds(size_t l, int32_t e) const { return layer == l && expert == e; }
  bool complete() const { return n_waiting.load(std::memory_order_acquire) == 0 && error.load() == 0; }
};

ExpertSource::ExpertSource(const Model& model, std::vector<uint32_t> slots, uint32_t n_staging, const StreamOptions& options)
    : model_(&model),
      n_expert_(model.hparams().n_expert),
      piece_bytes_(std::max(round_up(options.piece_bytes, kReadAlignment), kReadAlignment)),
      under_way_bytes_(options.depth * piece_bytes_),
      lookahead_(options.lookahead),
      lookahead_layers_(std::min(options.lookahead_layers, kLookaheadLayers)),
      policy_(n_expert_, slots),
      current_(n_expert_) {
  DUET_ASSERT(n_expert_ > 0 && n_staging >= 2 && slots.size() <= model.layers().size());
  make_shapes(model, slots.size());
  make_buffers(slots, n_staging);
  reader_ = BlockReader::open(model.file().part_paths(), [this](uint64_t tag, int error) { landed(tag, error); },
                              {.backend = options.backend, .depth = options.depth, .expected = model.file().part_identities(), .fault = options.fault});
}

ExpertSource::~ExpertSource() { reader_.reset(); }

void ExpertSource::make_shapes(const Model& model, size_t n_layer) {
  std::vector<uint64_t> file_bytes;
  for (const auto& file : model.file().part_identities()) file_bytes.push_back(file.size);
  for (size_t l = 0; l < n_layer; ++l) {
    LayerShape& shape = shapes_.emplace_back();
    for (const Expert& expert : model.layers()[l].experts) {
      auto& ranges = shape.ranges.emplace_back();
      size_t& padding = shape.padding.emplace_back();
      for (const ExpertPart part : kParts) {
        const Weight& w = part_of(expert, part);
        const GgufFile::Place place = model.file().place_of(w.data);
        const size_t head = place.offset % kReadAlignment, n_needed = head + weight_bytes(w);
        const uint64_t first = place.offset - head, n_bytes = round_up(n_needed, kReadAlignment);
        const uint64_t n_there = std::min(n_bytes, std::max(file_bytes.at(place.part), first + n_needed) - first);
        ranges[index_of(part)] = {place.part, first, n_bytes, n_needed, head, n_there};
        padding += n_there - weight_bytes(w);
      }
    }
    for (const ExpertPart part : kParts) {
      shape.part_at[index_of(part)] = shape.bytes;
      uint64_t largest = 0;
      for (const Expert& expert : model.layers()[l].experts) largest = std::max(largest, slot_part_bytes(weight_bytes(part_of(expert, part))));
      shape.bytes += largest;
    }
  }
}

void ExpertSource::make_buffers(const std::vector<uint32_t>& slots, uint32_t n_staging) {
  size_t total = 0;
  for (size_t l = 0; l < shapes_.size(); ++l) {
    largest_ = std::max(largest_, shapes_[l].bytes);
    total += slots[l] * shapes_[l].bytes;
  }
  memory_ = PageArray(total + n_staging * largest_);
  std::byte* at = memory_.data();
  const auto add = [&](size_t n_bytes, bool is_staging) {
    auto buffer = std::make_unique<Buffer>();
    buffer->index = buffers_.size();
    buffer->memory = at;
    buffer->n_bytes = n_bytes;
    buffer->is_staging = is_staging;
    buffer->pieces = std::make_unique<std::atomic<Piece>[]>(n_bytes / piece_bytes_ + 3);
    at += n_bytes;
    buffers_.push_back(std::move(buffer));
    return buffers_.back().get();
  };
  for (size_t l = 0; l < shapes_.size(); ++l) {
    std::vector<Buffer*>& of_layer = slots_.emplace_back();
    for (uint32_t i = 0; i < slots[l]; ++i) of_layer.push_back(add(shapes_[l].bytes, false));
  }
  for (uint32_t i = 0; i < n_staging; ++i) staging_.push_back(add(largest_, true));
}

ExpertSource::Pass::Pass(ExpertSource* source, const Tokens& tokens) : source_(source) {
  if (source == nullptr) return;
  lock_ = std::unique_lock(source->mutex_);
  source->tokens_ = tokens;
  source->is_short_ = tokens.n < kAllExpertsTokens;
  source->finished_ = false;
}

ExpertSource::Pass::~Pass() {
  if (source_ != nullptr) source_->finish();
}

// ---- a layer ---------------------------------------------------------------------------------------

void ExpertSource::begin(size_t layer, std::span<const int32_t> chosen, size_t n_used) {
  DUET_ASSERT(!in_layer_);
  in_layer_ = true;
  layer_ = layer;
  n_started_ = 0;
  policy_.use(layer, chosen, n_used, step_);
  std::fill(current_.begin(), current_.end(), nullptr);
  for (const int32_t e : step_.hits) current_[static_cast<size_t>(e)] = &slot_buffer(layer, policy_.slot_of(layer, e));
  adopt_expected();
  expect_next();
  start_more();
}

// Of the layers that stream, behind the last that this chunk reaches.
size_t ExpertSource::end_layer() const {
  const bool skips_last = tokens_.n_last == 0 && shapes_.size() == model_->layers().size();
  return shapes_.size() - skips_last;
}

void ExpertSource::expect_next() {
  const size_t next = layer_ + 1;
  if (next == end_layer()) {
    if (tokens_.n_next >= kAllExpertsTokens) expect_all(0);
  } else if ((next + 1 == model_->layers().size() ? tokens_.n_last : tokens_.n) >= kAllExpertsTokens) {
    expect_all(next);
  }
}

void ExpertSource::expect_all(size_t layer) {
  for (int32_t e = 0; e < static_cast<int32_t>(n_expert_); ++e)
    if (policy_.slot_of(layer, e) == ExpertPolicy::kStaging) expected_.push_back({.layer = layer, .expert = e});
}

size_t ExpertSource::guess_reach() const {
  if (lookahead_ == Lookahead::off || !is_short_ || n_started_ < step_.loads.size()) return 0;
  if (expected_.empty() && free_staging(shapes_[layer_].bytes) == nullptr) return 0;
  size_t reach = std::min<size_t>(lookahead_layers_, end_layer() - 1 - layer_);
  while (reach > 0 && lookahead_ == Lookahead::automatic && !gates_[reach - 1].open()) --reach;
  return reach;
}

// What is being read and still guessed goes on. The next layer's comes before that of the others.
void ExpertSource::guess(std::span<const Guess> guesses) {
  DUET_ASSERT(in_layer_ && is_short_);
  expected_.swap(expected_before_);
  expected_.clear();
  for (const auto& [layer, expert] : guesses) {
    if (policy_.slot_of(layer, expert) != ExpertPolicy::kStaging) continue;
    const auto distance = static_cast<uint32_t>(layer - layer_);
    const auto known = std::find_if(expected_before_.begin(), expected_before_.end(),
                                    [&, l = layer, e = expert](const Expected& x) { return x.layer == l && x.expert == e && x.buffer != nullptr; });
    if (known != expected_before_.end()) {
      if (distance == 1) reader_->promote(known->buffer->index << 32, known->buffer->first_piece[3], ReadClass::ahead);
      expected_.push_back(std::exchange(*known, {}));
    } else if (lookahead_ == Lookahead::on || gates_[distance - 1].open()) {
      expected_.push_back({.layer = layer, .expert = expert, .distance = distance});
    }
  }
  for (Expected& x : expected_before_) discard(x);
  start_more();
}

// What was read ahead for this layer waits in staging. What is needed is used first, being there
// first; the rest was a wrong guess. A guess whose reading failed is read again. Guesses for later layers
// give way where experts of this one have to pass through staging.
void ExpertSource::adopt_expected() {
  size_t n_adopted = 0;
  for (Expected& x : expected_) {
    if (x.layer != layer_) continue;
    const auto load = std::find_if(step_.loads.begin(), step_.loads.end(), [&](const auto& l) { return l.expert == x.expert; });
    if (x.buffer == nullptr || load == step_.loads.end() || x.buffer->error.load() != 0) {
      discard(x);
      continue;
    }
    adopt(x, *load);
    const auto place = step_.loads.begin() + static_cast<ptrdiff_t>(n_adopted++);
    std::rotate(place, load, load + 1);
  }
  const bool crowded = std::any_of(step_.loads.begin() + static_cast<ptrdiff_t>(n_adopted), step_.loads.end(),
                                   [](const auto& load) { return load.slot == ExpertPolicy::kStaging; });
  std::erase_if(expected_, [&](Expected& x) {
    if (x.layer != layer_ && crowded) discard(x);
    return x.layer == layer_ || crowded;
  });
}

// Where the policy wants to keep it, buffers change places, or (where that cannot be) it is copied when it
// has been computed.
void ExpertSource::adopt(Expected& expected, const ExpertPolicy::Load& load) {
  Buffer& buffer = *std::exchange(expected.buffer, nullptr);
  reader_->promote(buffer.index << 32, buffer.first_piece[3], ReadClass::demand);
  const uint64_t n_read = buffer.n_read.load(std::memory_order_relaxed);
  speculative_bytes_ += n_read;
  if (buffer.distance > 0) {
    GuessStats& stats = guesses_[buffer.distance - 1];
    ++stats.right;
    stats.used_bytes += n_read;
    gates_[buffer.distance - 1].gained(n_read);
  }
  current_[static_cast<size_t>(load.expert)] = &buffer;
  if (load.slot == ExpertPolicy::kStaging || !can_exchange(buffer, slot_buffer(layer_, load.slot))) return;
  Buffer*& old = slots_[layer_][static_cast<size_t>(load.slot)];
  old->expert = -1;
  std::swap(old->is_staging, buffer.is_staging);
  std::swap(*std::find(staging_.begin(), staging_.end(), &buffer), old);
}

// Layers may have experts of different sizes. Two buffers of staging hold any, as what passes through it needs.
bool ExpertSource::can_exchange(const Buffer& staging, const Buffer& slot) const {
  if (slot.n_bytes >= staging.n_bytes) return true;
  const auto holds_any = [&](const Buffer* b) { return b->n_bytes == largest_; };
  return std::count_if(staging_.begin(), staging_.end(), holds_any) > 2;
}

// Starts what buffers allow: this layer's loads in their order, then the next layer's.
void ExpertSource::start_more() {
  for (; n_started_ < step_.loads.size(); ++n_started_) {
    const auto [expert, slot] = step_.loads[n_started_];
    Buffer*& buffer = current_[static_cast<size_t>(expert)];
    if (buffer != nullptr) continue;  // read ahead
    buffer = slot == ExpertPolicy::kStaging ? free_staging(shapes_[layer_].bytes) : &slot_buffer(layer_, slot);
    if (buffer == nullptr) return;
    start(*buffer, layer_, expert, ReadClass::demand);
  }
  start_expected();
}

void ExpertSource::start_expected() {
  for (Expected& x : expected_) {
    if (x.buffer != nullptr) continue;
    x.buffer = free_staging(shapes_[x.layer].bytes);
    if (x.buffer == nullptr) return;
    start(*x.buffer, x.layer, x.expert, x.distance <= 1 ? ReadClass::ahead : ReadClass::speculative);
    x.buffer->distance = x.distance;
    if (x.distance > 0) ++guesses_[x.distance - 1].asked;
  }
}

// The smallest that will do.
ExpertSource::Buffer* ExpertSource::free_staging(size_t n_bytes) const {
  Buffer* best = nullptr;
  for (Buffer* buffer : staging_) {
    if (buffer->expert >= 0 || buffer->n_bytes < n_bytes || buffer->n_waiting.load(std::memory_order_acquire) != 0) continue;
    if (best == nullptr || buffer->n_bytes < best->n_bytes) best = buffer;
  }
  return best;
}

// Pieces of gate and up take turns, as their rows are used together; then those of down.
void ExpertSource::start(Buffer& buffer, size_t layer, int32_t expert, ReadClass urgency) {
  drain(buffer);
  settle(buffer);
  const LayerShape& shape = shapes_[layer];
  const auto& ranges = shape.ranges[static_cast<size_t>(expert)];
  buffer.layer = layer;
  buffer.expert = expert;
  buffer.weights = model_->layers()[layer].experts[static_cast<size_t>(expert)];
  buffer.error.store(0);
  std::array<size_t, 3> n_pieces{};
  for (size_t p = 0; p < 3; ++p) {
    n_pieces[p] = (ranges[p].n_bytes + piece_bytes_ - 1) / piece_bytes_;
    buffer.first_piece[p + 1] = buffer.first_piece[p] + n_pieces[p];
    buffer.part_bytes[p] = ranges[p].n_there;
    part_of(buffer.weights, kParts[p]).data = buffer.memory + shape.part_at[p] + ranges[p].head;
  }
  const size_t n = buffer.first_piece[3];
  reads_.clear();
  const auto add = [&](size_t p, size_t i) {
    if (i >= n_pieces[p]) return;
    const Range& range = ranges[p];
    const size_t at = i * piece_bytes_, n_bytes = std::min(piece_bytes_, range.n_bytes - at);
    reads_.push_back({.file = range.file, .offset = range.offset + at, .n_bytes = n_bytes,
                     .n_needed = std::min(n_bytes, range.n_needed - std::min(range.n_needed, at)),
                     .to = buffer.memory + shape.part_at[p] + at, .tag = buffer.index << 32 | (buffer.first_piece[p] + i)});
  };
  for (size_t i = 0; i < std::max(n_pieces[0], n_pieces[1]); ++i) {
    add(0, i);
    add(1, i);
  }
  for (size_t i = 0; i < n_pieces[2]; ++i) add(2, i);
  for (size_t i = 0; i < n; ++i) buffer.pieces[i].store(Piece::waiting, std::memory_order_relaxed);
  buffer.n_waiting.store(static_cast<uint32_t>(n), std::memory_order_release);
  reader_->submit(reads_, urgency);
}

void ExpertSource::landed(uint64_t tag, int error) {
  Buffer& buffer = *buffers_[tag >> 32];
  if (error != 0) buffer.error.store(error);
  else buffer.n_read.fetch_add(piece_size(buffer, tag & 0xffffffff), std::memory_order_relaxed);
  buffer.pieces[tag & 0xffffffff].store(error == 0 ? Piece::landed : Piece::failed, std::memory_order_release);
  buffer.n_waiting.fetch_sub(1, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
}

size_t ExpertSource::piece_size(const Buffer& buffer, size_t piece) const {
  const size_t part = piece < buffer.first_piece[1] ? 0 : piece < buffer.first_piece[2] ? 1 : 2;
  return std::min(piece_bytes_, buffer.part_bytes[part] - (piece - buffer.first_piece[part]) * piece_bytes_);
}

// Staging may be held up by reads of a wrong guess that were under way already.
const Expert& ExpertSource::need(int32_t expert) {
  Buffer*& buffer = current_[static_cast<size_t>(expert)];
  for (Buffer* staging : staging_) {
    if (buffer != nullptr) break;
    if (staging->expert >= 0) continue;
    drain(*staging);
    start_more();
  }
  DUET_ASSERT(buffer != nullptr);
  return buffer->weights;
}

void ExpertSource::wait(int32_t expert, ExpertPart part, size_t first_row, size_t end_row) {
  const Buffer& buffer = *current_[static_cast<size_t>(expert)];
  if (buffer.complete()) return;
  const size_t p = index_of(part), row_bytes = part_of(buffer.weights, part).row_bytes;
  const size_t head = shapes_[layer_].ranges[static_cast<size_t>(expert)][p].head;
  const size_t first = buffer.first_piece[p] + (head + first_row * row_bytes) / piece_bytes_;
  const size_t last = buffer.first_piece[p] + (head + end_row * row_bytes - 1) / piece_bytes_;
  for (size_t i = first; i <= last; ++i) {
    wait_while([&] { return buffer.pieces[i].load(std::memory_order_acquire) == Piece::waiting; });
    if (buffer.pieces[i].load(std::memory_order_relaxed) == Piece::landed) continue;
    const int error = buffer.error.load();
    fail(ErrorKind::io, model_->file().source(), ": cannot read expert ", expert, " of layer ", layer_, ": ",
         error == ENODATA ? "the file has become shorter" : std::strerror(error));
  }
}

template <class Busy>
void ExpertSource::wait_while(const Busy& busy) {
  if (!busy()) return;
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const uint32_t seen = epoch_.load(std::memory_order_acquire);
    if (!busy()) break;
    epoch_.wait(seen, std::memory_order_acquire);
  }
  wait_ns_ += static_cast<uint64_t>((std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1));
}

void ExpertSource::drain(const Buffer& buffer) {
  wait_while([&] { return buffer.n_waiting.load(std::memory_order_acquire) != 0; });
}

void ExpertSource::done(int32_t expert) {
  Buffer* buffer = current_[static_cast<size_t>(expert)];
  padding_bytes_ += shapes_[layer_].padding[static_cast<size_t>(expert)];
  if (!buffer->is_staging) return;
  const auto load = std::find_if(step_.loads.begin(), step_.loads.end(), [=](const auto& l) { return l.expert == expert; });
  if (load->slot != ExpertPolicy::kStaging) copy(*buffer, slot_buffer(layer_, load->slot));
  current_[static_cast<size_t>(expert)] = nullptr;
  buffer->expert = -1;
  start_more();
}

// Both of this layer.
void ExpertSource::copy(const Buffer& from, Buffer& to) {
  drain(to);
  std::memcpy(to.memory, from.memory, shapes_[layer_].bytes);
  to.layer = from.layer;
  to.expert = from.expert;
  to.weights = from.weights;
  for (const ExpertPart part : kParts) {
    Weight& w = part_of(to.weights, part);
    w.data = to.memory + (w.data - from.memory);
  }
  to.error.store(0);
}

void ExpertSource::end() {
  in_layer_ = false;
  finished_ = layer_ + 1 == end_layer();
}

// ---- endings ---------------------------------------------------------------------------------------

// A guess that did not come true: what has not begun is not read.
void ExpertSource::discard(Expected& expected) {
  if (expected.buffer == nullptr) return;
  Buffer& buffer = *std::exchange(expected.buffer, nullptr);
  reader_->cancel(buffer.index << 32, buffer.first_piece[3]);
  buffer.expert = -1;
  buffer.unwanted = true;
}

// Nothing is under way into this buffer.
void ExpertSource::settle(Buffer& buffer) {
  const uint64_t n_read = buffer.n_read.exchange(0);
  if (!std::exchange(buffer.unwanted, false)) return;
  speculative_bytes_ += n_read;
  wasted_bytes_ += n_read;
  if (buffer.distance == 0) return;
  guesses_[buffer.distance - 1].wasted_bytes += n_read;
  gates_[buffer.distance - 1].lost(std::min(n_read, under_way_bytes_));
}

// What is being read for the next pass goes on.
void ExpertSource::finish() {
  if (finished_ && tokens_.n_next >= kAllExpertsTokens) return;
  abandon();
  if (is_short_)
    for (LookaheadGate& gate : gates_) gate.passed();
}

// The pass is over, by an error in the middle of a layer perhaps: nothing is left under way, and an
// expert of which something is missing is not there.
void ExpertSource::abandon() {
  reader_->cancel(0, UINT64_MAX);
  for (Expected& x : expected_) discard(x);
  expected_.clear();
  for (const auto& buffer : buffers_) {
    drain(*buffer);
    settle(*buffer);
  }
  for (Buffer* buffer : staging_) buffer->expert = -1;
  if (!in_layer_) return;
  in_layer_ = false;
  for (const auto& [expert, slot] : step_.loads)
    if (slot != ExpertPolicy::kStaging) {
      const Buffer& buffer = slot_buffer(layer_, slot);
      if (!buffer.holds(layer_, expert) || !buffer.complete()) policy_.forget(layer_, expert);
    }
}

void ExpertSource::check_unchanged() const {
  if (const auto file = reader_->changed_file())
    fail(ErrorKind::io, model_->file().part_paths()[*file].string(), ": the file was changed while it was being read; open it again");
}

void ExpertSource::shrink(const std::vector<uint32_t>& slots) {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> freed;
  for (size_t layer = 0; layer < slots.size(); ++layer) {
    freed.clear();
    policy_.shrink(layer, slots[layer], freed);
    for (const int32_t slot : freed) {
      Buffer& buffer = slot_buffer(layer, slot);
      drain(buffer);
      buffer.expert = -1;
      memory_.give_back(buffer.memory, buffer.n_bytes);
    }
  }
}

void ExpertSource::set_lookahead(Lookahead lookahead, uint32_t n_layers) {
  const std::lock_guard lock(mutex_);
  lookahead_ = lookahead;
  lookahead_layers_ = std::min(n_layers, kLookaheadLayers);
}

std::vector<bool> ExpertSource::resident() const {
  std::vector<bool> out;
  for (size_t layer = 0; layer < shapes_.size(); ++layer)
    for (size_t expert = 0; expert < n_expert_; ++expert) out.push_back(policy_.slot_of(layer, static_cast<int32_t>(expert)) != ExpertPolicy::kStaging);
  return out;
}

StreamStats ExpertSource::stats() const {
  std::vector<uint32_t> slots;
  for (size_t layer = 0; layer < shapes_.size(); ++layer) slots.push_back(policy_.slots(layer));
  const BlockReaderStats reads = reader_->stats();
  const std::string refused = reads.fallbacks > 0 ? concat(", ", reads.fallbacks, " reads refused and made through the page cache") : "";
  return {.hits = policy_.hits(),
          .misses = policy_.misses(),
          .reads = reads,
          .padding_bytes = padding_bytes_,
          .speculative_bytes = speculative_bytes_,
          .wasted_bytes = wasted_bytes_,
          .guesses = guesses_,
          .wait_ns = wait_ns_.load(),
          .backend = reader_->name() + refused,
          .slots = std::move(slots)};
}

}  // namespace duet
