// Several token sequences evaluated together: one pass over the weights, and over the experts that any
// of them needs, serves them all.
//
//   Batch batch(engine, {.n_ctx = 4096, .n_sequences = 8});
//   Sequence a = batch.new_sequence(), b = batch.new_sequence();
//   batch.evaluate({{{&a, ids_of_a}, {&b, ids_of_b}}});       // chunks of prompts and single tokens alike
//   batch.logits(rows);                                       // row: of all tokens evaluated, in order
//
// What a sequence becomes is that of a Session with the same tokens, to the bit, whatever it shares
// its batches with (up to ModelInfo::exact_batch tokens at once).
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine.h"

namespace duet {

struct BatchOptions {
  uint32_t n_ctx = 0;        // positions of each sequence; 0: the memory plan's
  uint32_t n_batch = 0;      // tokens evaluated at once; 0: the memory plan's
  uint32_t n_sequences = 1;  // whose keys and values must fit into memory at the same time
  KvType kv_type = KvType::f16;
  const std::atomic<bool>* cancel = nullptr;  // checked between layers; true -> Error(cancelled)
  RoutingFn routing = {};    // of all rows; never called for a dense model
};

// Tokens and their keys and values. Physical memory follows as positions are written.
class Sequence {
 public:
  Sequence(Sequence&&) noexcept;
  Sequence& operator=(Sequence&&) noexcept;
  ~Sequence();

  std::span<const Token> tokens() const;  // evaluated so far
  void truncate(size_t n);                // drops all but the first n tokens
  // Becomes the first n tokens of another sequence of the same Batch, which stays as it is.
  void copy_prefix(const Sequence& from, size_t n);
  // Physical memory of the most tokens that it has held, about.
  size_t bytes() const;

  // Keys and values as bytes, to be kept elsewhere: of a layer, of tokens [kBlock * block, ... + n), n <= kBlock.
  // They fit sequences of any n_ctx whose batch has the same fingerprint().
  static constexpr size_t kBlock = 256;
  size_t n_layer() const;
  size_t block_bytes(size_t n) const;  // of a layer
  void save(size_t layer, size_t block, size_t n, std::span<std::byte> out) const;  // of tokens evaluated
  // What has been saved; other layers at the same time. The sequence still ends where it did, until continue_with().
  void load(size_t layer, size_t block, size_t n, std::span<const std::byte> in);
  // All layers of the tokens behind the sequence's own have been loaded.
  void continue_with(std::span<const Token> tokens);

 private:
  friend class Batch;
  struct State;
  explicit Sequence(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// The scratch of the forward pass, allocated on creation. One thread at a time. Sequences and their batch may
// die in any order.
class Batch {
 public:
  struct Part {
    Sequence* sequence;  // in one part only
    std::span<const Token> tokens;
    size_t n_outputs = kAllOutputs;  // last tokens, of which logits() or hidden() will be asked for
  };
  static constexpr size_t kMaxLogitRows = 64;

  // Error(memory) when n_sequences do not fit.
  Batch(const Engine& engine, const BatchOptions& options);
  Batch(Batch&&) noexcept;
  ~Batch();

  uint32_t n_ctx() const;
  uint32_t n_batch() const;
  size_t sequence_bytes() const;  // of one that is full
  Sequence new_sequence() const;
  // Hexadecimal. What Sequence::save() gives fits sequences of batches with the same one: of files with the same
  // metadata and tensors (a sample of each is read), wherever they are, kernels and KvType. Error(io).
  std::string fingerprint() const;

  // Appends 1 to n_batch tokens in all. Error(usage) for ids outside the vocabulary and sequences beyond
  // n_ctx. After an error all sequences are as before.
  void evaluate(std::span<const Part> parts);
  // Logits of these rows, all with outputs, at most kMaxLogitRows, of the last evaluate(): [rows.size(), n_vocab], until the
  // next call.
  std::span<const float> logits(std::span<const size_t> rows);
  // The hidden state of a row that its logits are made from, [n_embd].
  std::vector<float> hidden(size_t row);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace duet
