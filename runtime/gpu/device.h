// One accelerator: memory, copies, and the operations of the forward pass on it. Implemented by a module that is
// loaded at run time (libduet_cuda.so), so that the program itself needs no driver; its kernels compiled for the CPU
// (runtime/cuda/emulation.h) are the device that tests use.
//
// Everything that works on the device is queued in order on its one stream, the copies of *_beside() on a second
// one; the host waits only in synchronize() and download(). Matrix products with quantized weights have the bits of
// the tables in runtime/kernels/kernels.h: exact integer sums, one chain of fused multiply-adds in block order. All
// else agrees to rounding. What a row becomes never depends on the rows beside it.
//
// Pointers named so are of device memory: rows 16-byte aligned, row-major, sizes in elements. Matrices of weights begin
// at multiples of 16 bytes, their rows follow each other row_bytes apart; memory is allocated in whole 16 bytes. Nothing throws: an
// operation that fails is remembered, and told by the next synchronize().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "quant/format.h"

namespace duet::gpu {

struct DeviceInfo {
  char name[128];            // "NVIDIA GeForce RTX 4090"
  int major, minor;          // compute capability
  int n_processors;          // streaming multiprocessors
  uint64_t total_bytes;
  double memory_bytes_per_s; // of its data sheet: clock times width of the bus; 0: not told
};

// Where quantized forms of rows go: one after the other, act_row_bytes() apart. Null: not wanted.
struct ActRows {
  std::byte *act32 = nullptr, *act256 = nullptr;
};

// A matrix [rows, cols], or one for each expert, all of one format.
struct Matrices {
  DType dtype;
  const std::byte* const* data;  // device array of pointers: [n]
  size_t n, rows, cols, row_bytes;
};

// Rows sorted by expert, for products that each take their own matrix.
struct Grouping {
  const int32_t* first;  // [n_expert + 1] first slot of each expert; null: no experts, every row takes matrix 0
  const int32_t* token;  // [n_slots] the row of x that a slot reads; null: the slot's own
};

// y[slot * y_stride + r] (+)= sum over c of W[expert of slot][r][c] * x[row of slot][c]
struct Product {
  Matrices w;
  Grouping grouping;
  const std::byte* x;  // rows in format_of(w.dtype).act, act_row_bytes() apart
  size_t n;            // slots
  float* y;
  size_t y_stride;
  bool add;            // to what is in y, as one rounded addition
};

// Keys and values of one layer of one sequence, [position][n_head_kv][head_dim]; F32, F16, or Q8_0: int8 there, and
// half-precision scales [position][n_head_kv][head_dim / 32] apart.
struct KvLayer {
  std::byte *keys, *values, *key_scales, *value_scales;
};

// Rows [row, row + n) of the chunk are positions [first, first + n) of a sequence.
struct KvRun {
  KvLayer kv;
  uint32_t row, n, first;
};

struct HeadShape {
  uint32_t n_head, n_head_kv, head_dim, n_rot;
  uint32_t window;  // 0: none
  DType kv_type;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const DeviceInfo& info() const = 0;
  // Weights that multiply() takes, heads that attend() and rotate_and_store() take.
  virtual bool supports(DType dtype) const = 0;
  virtual bool supports(const HeadShape& shape) const = 0;
  virtual uint64_t free_bytes() = 0;

  // ---- memory: null when there is not enough ----
  virtual void* allocate(size_t n_bytes) = 0;  // 256-byte aligned
  virtual void release(void* p) = 0;           // null: nothing
  virtual void* allocate_host(size_t n_bytes) = 0;  // pinned; usable where the host writes and the device reads
  virtual void release_host(void* p) = 0;

  // ---- copies ----
  // From pageable memory: `src` may change when it returns. From allocate_host(): after the next synchronize().
  virtual void upload(void* dst, const void* src, size_t n_bytes) = 0;
  virtual void download(void* dst, const void* src, size_t n_bytes) = 0;  // waits for it
  virtual void copy(void* dst, const void* src, size_t n_bytes) = 0;      // on the device
  // On the second stream, from allocate_host() memory; begins when slot `slot` (0 or 1) was let go of by release_slot().
  virtual void upload_beside(int slot, void* dst, const void* src, size_t n_bytes) = 0;
  virtual void await_slot(int slot) = 0;    // what follows on the first stream comes after the uploads for it
  virtual void release_slot(int slot) = 0;  // uploads that follow for it come after what is queued now
  virtual bool slot_read(int slot) = 0;     // waits until its host memory may be written again; false: an error
  // Null, or what has failed since the last time (then the device cannot be used any more).
  virtual const char* synchronize() = 0;

  // ---- operations; n rows each ----
  // y = rms_norm(x) * w, [n, cols]; `y` may be null. And its quantized forms.
  virtual void normalize(const float* x, const float* w, float eps, size_t n, size_t cols, float* y, ActRows acts) = 0;
  virtual void quantize(const float* x, size_t n, size_t cols, ActRows acts) = 0;
  // h = silu(gate) * up, [n, cols], and its quantized forms. `h` may be null or gate.
  virtual void silu_mul(const float* gate, const float* up, size_t n, size_t cols, float* h, ActRows acts) = 0;
  virtual void multiply(const Product& product) = 0;
  // Rotates q [n, n_head * head_dim] and k [n, n_head_kv * head_dim] in place by cos_sin [n, n_rot] (kernels.h: rope)
  // and stores k and v. runs: device array.
  virtual void rotate_and_store(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, const float* cos_sin,
                                float* q, float* k, const float* v) = 0;
  // out [n, n_head * head_dim] = softmax(q k^T * scale) v over the keys each row sees: at its position and before,
  // within the window. max_keys: the most keys any row of the chunk sees. `scratch`: attention_scratch_bytes().
  virtual void attend(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, size_t max_keys, float scale,
                      const float* q, void* scratch, float* out) = 0;
  // Never less for more rows or more keys.
  virtual size_t attention_scratch_bytes(const HeadShape& shape, size_t n, size_t max_keys) const = 0;
  // The n_used largest of logits [n, n_expert], lowest index first among equals, best first, and the softmax over them.
  virtual void choose_experts(const float* logits, size_t n, size_t n_expert, size_t n_used, int32_t* chosen, float* weights) = 0;
  // Slots of (row, rank) pairs sorted by expert, row and rank: slot_of [n * n_used], token_of [n * n_used] the row of a
  // slot, first [n_expert + 1].
  virtual void group(const int32_t* chosen, size_t n, size_t n_expert, size_t n_used, int32_t* slot_of, int32_t* token_of, int32_t* first) = 0;
  // residual row t += weights[t][rank] * y row slot_of[t][rank], rank by rank.
  virtual void combine(const float* y, const int32_t* slot_of, const float* weights, size_t n, size_t n_used, size_t cols, float* residual) = 0;
};

inline constexpr uint32_t kModuleVersion = 3;  // one more with every change of Device

// What a module says, in these words, on a machine without a card: nothing is wrong there.
inline constexpr const char *kNoDriver = "no driver for cards is installed", *kNoDevice = "there is no card";

// The module's one entry, "duet_gpu_open": device `index` of those there are (0: the first). A null pointer and one
// line in `message` [n_message] when there is none (one of the above), it cannot be used, or the versions differ.
using OpenFn = Device* (*)(uint32_t version, int index, char* message, size_t n_message);
inline constexpr const char* kOpenName = "duet_gpu_open";

}  // namespace duet::gpu
