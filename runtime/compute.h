// What attention, experts and output share: aligned scratch, activations with their quantized
// forms, and matrix products split over threads by rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/parallel.h"
#include "quant/format.h"
#include "runtime/kernels/kernels.h"
#include "runtime/model.h"
#include "runtime/observer.h"

namespace duet {

// Uninitialised memory on a cache line boundary; large ones get physical pages when first written.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(size_t n) : size_(n) {
    const size_t n_bytes = (n * sizeof(T) + 63) / 64 * 64;
    if (n_bytes == 0) return;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, n_bytes)));
    if (!data_) fail(ErrorKind::memory, "cannot allocate ", n_bytes, " bytes of working memory");
  }
  T* data() const { return data_.get(); }
  size_t size_bytes() const { return size_ * sizeof(T); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
  size_t size_ = 0;
};

// 4 MiB: what a core's share of the caches holds while products run over it.
inline constexpr size_t kPanelFloats = size_t{1} << 20;

struct Compute {
  const KernelTable* kernels = nullptr;
  int n_threads = 1;
  float* panels = nullptr;  // [n_threads, kPanelFloats] of scratch for the task at hand
  const Placement* placement = nullptr;  // of the threads; null: anywhere
  const ProductObserver* observer = nullptr;  // null: nobody looks

  // Runs body() with the threads at hand: every entry to the forward pass goes through here.
  template <class Body>
  void team(const Body& body) const {
    static const Placement kAnywhere;
    run_team(n_threads, placement != nullptr ? *placement : kAnywhere, body);
  }
  float* panel(size_t worker) const { return panels + worker * kPanelFloats; }
  // Threads for work that touches about so many bytes: waking others costs as long as one core
  // takes to read 64 KiB.
  int threads_for(uint64_t n_bytes) const { return n_bytes < (uint64_t{64} << 10) ? 1 : n_threads; }
};

// A set of ActFormats, as bits.
using ActFormats = unsigned;
inline ActFormats act_bit(ActFormat format) { return 1u << static_cast<unsigned>(format); }
inline ActFormats act_bit(const Weight& weight) {
  return act_bit(weight.format->act) | (weight.low_rank != nullptr ? act_bit(ActFormat::f32) : 0);
}
inline constexpr ActFormats kAllActFormats = 7;

// Input of matrix products: up to max_rows rows of `cols` floats, and the same rows in the formats
// that integer dot products read. A row is quantized once and serves all matrices fed by it.
class Activations {
 public:
  // Only these formats can be used; quantize() reads floats, set_part() does not.
  Activations(size_t max_rows, size_t cols, ActFormats formats = kAllActFormats);

  float* row(size_t i) { return floats_.data() + i * cols_; }
  size_t cols() const { return cols_; }
  // Makes the quantized forms of row i.
  void quantize(const KernelTable& kernels, size_t i, ActFormats formats);
  // Columns [first, first + n) of row i in one format, from n floats; both multiples of its block.
  void set_part(const KernelTable& kernels, size_t i, size_t first, const float* values, size_t n, ActFormat format);
  // Copies row `from` of another of the same width, in these formats only.
  void copy_row(size_t i, const Activations& other, size_t from, ActFormats formats);
  const std::byte* data(ActFormat format, size_t i) const;
  size_t stride(ActFormat format) const;  // bytes from row to row
  size_t size_bytes() const { return floats_.size_bytes() + act32_.size_bytes() + act256_.size_bytes(); }

 private:
  size_t cols_, act32_stride_, act256_stride_;
  AlignedArray<float> floats_;               // [max_rows, cols]
  AlignedArray<std::byte> act32_, act256_;   // [max_rows, stride]
};

// acts row t = rms_norm(x row t) * weight, quantized, for n rows of x [n, acts.cols()].
void normalize(const Compute& compute, const float* x, size_t n, const std::vector<float>& weight, float eps,
               Activations& acts, ActFormats formats);

// Tells compute.observer, which must be there, of rows [n_rows, cols] for one weight.
void observe(const Compute& compute, TensorKind kind, int layer, const float* rows, size_t n_rows, size_t cols);

// ModelInfo::exact_batch.
uint32_t exact_batch(const Model& model);

// Rows [first, first + n) of a weight times tokens.
struct Product {
  const Weight* w;
  size_t first_row, n_rows;
  const Activations* x;
  size_t first_token, n_tokens;
  float* y;         // y[t * y_stride + r] for row first_row + r
  size_t y_stride;
  const float* inner = nullptr;  // of a weight with adapters, which needs it: see InnerProducts
  const std::byte* next = nullptr;  // MatmulArgs::next
};

// What adapters make of the input of products, a x: once for all the pieces that products are made in.
class InnerProducts {
 public:
  void clear();
  void add(const Product& product);    // its tokens; any weight
  void make(const Compute& compute);   // those of all that were added
  // Product::inner of the i-th that was added, [n_tokens, rank], until clear(); null without adapters.
  const float* of(size_t i) const { return first_[i] == kNone ? nullptr : values_.data() + first_[i]; }

 private:
  static constexpr size_t kNone = SIZE_MAX;
  struct Piece {
    Product tokens;
    size_t first;  // in values_
  };
  std::vector<size_t> first_;  // in values_, by product
  std::vector<Piece> pieces_;
  size_t n_values_ = 0;
  std::vector<float> values_;
};

// On the calling thread; `panel` is scratch of any size.
void multiply(const Compute& compute, const Product& product, std::span<float> panel);

// Tokens that pass over a piece of weights at once: their activations stay in the caches.
inline constexpr size_t kTokenBlock = 512;

// Matrix products collected and then run in one parallel loop. The pieces do not depend on the
// number of threads, so neither do the results.
class MatmulQueue {
 public:
  explicit MatmulQueue(size_t max_jobs) { jobs_.reserve(max_jobs); }
  // y[t * y_stride + r] = sum over c of w[r][c] * x[first_row + t][c], t in [0, n_tokens)
  void add(const Weight& w, const Activations& x, size_t first_row, size_t n_tokens, float* y, size_t y_stride);
  void run(const Compute& compute);  // and empties the queue
  // The same for products of one weight that is still being read: pieces in ascending order of rows (several
  // products: by turns), each after ready(first_row, end_row) has returned.
  void run_arriving(const Compute& compute, const std::function<void(size_t, size_t)>& ready);

 private:
  struct Job {
    Product all;
    size_t rows_per_chunk, n_chunks, first_chunk;
  };
  struct Emptied;
  struct Chunk {
    const Job* job;
    size_t index;
  };
  void make_inner(const Compute& compute);
  Chunk chunk_at(size_t i, bool alike) const;
  bool alike() const;
  static const std::byte* rows_of(const Chunk& chunk);
  void run_chunk(const Compute& compute, size_t worker, const Chunk& chunk, const std::byte* next) const;

  std::vector<Job> jobs_;
  InnerProducts inner_;
  size_t n_chunks_ = 0;
  uint64_t n_bytes_ = 0;  // of weights, counted once per token
};

}  // namespace duet
