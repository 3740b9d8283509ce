// Experts of a model that does not fit in memory. A fixed set of buffers is filled from the file as
// the router chooses; what is computed first is read first, and rows can be used as soon as they
// have landed. Which experts stay is runtime/expert_policy's decision; how bytes are read is
// base/block_reader's.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "base/block_reader.h"
#include "base/pages.h"
#include "runtime/engine.h"
#include "runtime/expert_policy.h"
#include "runtime/lookahead_gate.h"
#include "runtime/model.h"

namespace duet {

enum class ExpertPart : uint8_t { gate, up, down };

// Tokens from which on a chunk can be taken to need all of 8 experts: each is left out by a token
// with probability 3/4, so by all of 32 with 1e-4.
inline constexpr size_t kAllExpertsTokens = 32;

// One chunk of tokens at a time uses it (Pass); within a pass, layers one after the other. wait() may
// be called by all threads of the team, the rest by one.
class ExpertSource {
 public:
  // Buffers for slots[layer] experts of the first slots.size() layers, which are those that stream, and n_staging (>= 2) more. The model must outlive
  // the source. Error: io, unsupported (StreamOptions::backend), memory.
  ExpertSource(const Model& model, std::vector<uint32_t> slots, uint32_t n_staging, const StreamOptions& options);
  ~ExpertSource();

  // Tokens of a chunk, those of them that pass the model's last layer, and those of the chunk that will follow
  // at once (0: none will).
  struct Tokens {
    size_t n = 0, n_last = 0, n_next = 0;
  };
  // The right to use the source for one chunk. Whatever ends it, an error included, leaves the
  // source usable.
  class Pass {
   public:
    // A long chunk that follows has its first layer read ahead. Null: does nothing.
    Pass(ExpertSource* source, const Tokens& tokens);
    ~Pass();
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

   private:
    ExpertSource* source_;
    std::unique_lock<std::mutex> lock_;
  };

  // The chunk has reached a layer; chosen [n_tokens, n_used]. Reads begin. A chunk long enough to
  // need all experts of the next layer too has them read ahead.
  void begin(size_t layer, std::span<const int32_t> chosen, size_t n_used);
  // How many layers ahead guesses are worth while in this layer; 0 in long chunks, and where there is no buffer.
  size_t guess_reach() const;
  struct Guess {
    size_t layer;
    int32_t expert;
  };
  // What the next layers will probably need, the nearest layer first, in it the most probable expert, instead of
  // what was guessed before. Missing ones are read while nothing else is, into buffers that nobody uses; what
  // has not begun when it turns out to be wrong is not read.
  void guess(std::span<const Guess> guesses);
  // What is there, and what is being read, in the order in which it arrives.
  std::span<const int32_t> hits() const { return step_.hits; }
  std::span<const ExpertPolicy::Load> loads() const { return step_.loads; }
  // A chosen expert, in memory; of those in loads(), asked for in their order, rows [first, end) only
  // after wait(). Valid until done(); at most n_staging experts of loads() may be in use at once.
  const Expert& need(int32_t expert);
  void wait(int32_t expert, ExpertPart part, size_t first_row, size_t end_row);  // Error(io)
  // This expert has been computed: its buffer may serve another.
  void done(int32_t expert);
  void end();  // of the layer

  // Error(io) when the file has been written to since it was opened: what was read may be another
  // model's.
  void check_unchanged() const;
  // From now on layers hold so many experts, none more than before; the memory of the others goes
  // back to the system and is not used again. Between passes.
  void shrink(const std::vector<uint32_t>& slots);

  void set_lookahead(Lookahead lookahead, uint32_t n_layers);  // between passes

  StreamStats stats() const;
  std::vector<bool> resident() const;  // [n_layer, n_expert] held by a slot; between passes

 private:
  struct Range {  // of one part of one expert, in whole pages of the file
    size_t file = 0;
    uint64_t offset = 0;
    size_t n_bytes = 0, n_needed = 0, head = 0;  // head: bytes before the first weight
    size_t n_there = 0;  // of n_bytes, before the end of the file
  };
  struct LayerShape {
    std::array<size_t, 3> part_at{};  // of each part in a buffer
    size_t bytes = 0;
    std::vector<std::array<Range, 3>> ranges;  // [n_expert]
    std::vector<size_t> padding;               // [n_expert] bytes read beside the weights
  };
  struct Buffer;
  enum class Piece : uint8_t { waiting, landed, failed };
  // An expert of a later layer.
  struct Expected {
    size_t layer = 0;
    int32_t expert = -1;
    uint32_t distance = 0;     // layers ahead when it was guessed; 0: certain
    Buffer* buffer = nullptr;  // null: its reading has not begun
  };

  void make_shapes(const Model& model, size_t n_layer);
  void make_buffers(const std::vector<uint32_t>& slots, uint32_t n_staging);
  Buffer* free_staging(size_t n_bytes) const;
  Buffer& slot_buffer(size_t layer, int32_t slot) { return *slots_[layer][static_cast<size_t>(slot)]; }
  void adopt_expected();
  void adopt(Expected& expected, const ExpertPolicy::Load& load);
  bool can_exchange(const Buffer& staging, const Buffer& slot) const;
  size_t end_layer() const;
  void expect_next();
  void expect_all(size_t layer);
  void start_more();
  void start_expected();
  size_t piece_size(const Buffer& buffer, size_t piece) const;
  void start(Buffer& buffer, size_t layer, int32_t expert, ReadClass urgency);
  void landed(uint64_t tag, int error);
  template <class Busy>
  void wait_while(const Busy& busy);
  void drain(const Buffer& buffer);
  void finish();
  void abandon();
  void discard(Expected& expected);
  void settle(Buffer& buffer);
  void copy(const Buffer& from, Buffer& to);

  const Model* model_;
  size_t n_expert_, piece_bytes_;
  uint64_t under_way_bytes_;  // at most, of reads that have begun
  Lookahead lookahead_;
  uint32_t lookahead_layers_;
  std::array<LookaheadGate, kLookaheadLayers> gates_;  // one layer ahead, two, ...
  std::vector<LayerShape> shapes_;
  ExpertPolicy policy_;
  PageArray memory_;
  size_t largest_ = 0;  // expert of any layer
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::vector<Buffer*>> slots_;  // [n_layer][slots]
  std::vector<Buffer*> staging_;

  std::mutex mutex_;
  // Of the pass and layer at hand.
  bool in_layer_ = false;
  Tokens tokens_;
  bool is_short_ = false, finished_ = false;  // the pass
  size_t layer_ = 0, n_started_ = 0;  // of step_.loads
  ExpertPolicy::Step step_;
  std::vector<Buffer*> current_;  // [n_expert] null: not chosen or not started
  std::vector<ReadRange> reads_;  // scratch of start()
  std::vector<Expected> expected_, expected_before_;  // to be read when this layer has all it needs, in this order; scratch
  uint64_t padding_bytes_ = 0, speculative_bytes_ = 0, wasted_bytes_ = 0;
  std::array<GuessStats, kLookaheadLayers> guesses_{};

  std::atomic<uint32_t> epoch_{0};  // counts landings, for those who wait
  std::atomic<uint64_t> wait_ns_{0};
  std::unique_ptr<BlockReader> reader_;  // last: its threads call landed()
};

}  // namespace duet
