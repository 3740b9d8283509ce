// Runs a model over a text and sums up the inputs of its matrices: importance matrices, and how often
// each expert was used.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "formats/imatrix.h"
#include "runtime/engine.h"

namespace duet {

struct ImatrixOptions {
  uint32_t n_batch = 0;  // 0: the memory plan's
  KvType kv_type = KvType::f32;
  bool output = false;   // the output head too
  const std::atomic<bool>* cancel = nullptr;
  std::function<void(size_t done, size_t n_chunks)> progress = {};  // chunks
};

// Sums of squares of the inputs of every matrix, in double, rows in the order of the text. Runs loops
// on n_threads.
class ImatrixCollector {
 public:
  explicit ImatrixCollector(const HParams& hparams, bool output, int n_threads) : n_expert_(hparams.n_expert), output_(output), n_threads_(n_threads) {}
  void add(const ProductInput& input);
  // Error(format) when an input was not finite, naming the tensor.
  Imatrix result() const;

 private:
  struct Sums {
    std::vector<double> squares;  // [n_matrices, cols]
    std::vector<uint64_t> rows;   // [n_matrices]
  };
  size_t n_expert_;
  bool output_;
  int n_threads_;
  std::map<std::string, Sums, std::less<>> sums_;
};

// Over chunks [n_chunks, n_ctx] of ids (perplexity_chunks), each evaluated on its own.
Imatrix collect_imatrix(const Engine& engine, std::span<const Token> chunks, uint32_t n_ctx, const ImatrixOptions& options);

// How many rows each expert of a layer saw, from the importance of its gate: [n_expert]; empty when
// the imatrix has none of its own for experts.
std::vector<uint64_t> expert_coverage(const Imatrix& imatrix, const HParams& hparams, uint32_t layer);

}  // namespace duet
