// What device.cpp queues: one function for each operation. Arguments as in runtime/gpu/device.h.
#pragma once

#include "runtime/gpu/device.h"

struct CUstream_st;

namespace duet::gpu {

#if defined(DUET_GPU_CUDA)
using Stream = CUstream_st;
#else
struct Stream;
#endif

// Products with weights of one format. Null: not of this family.
using MultiplyFn = void (*)(const Product& product, Stream* stream);
MultiplyFn float_product(DType dtype);
MultiplyFn block32_product(DType dtype);
MultiplyFn super_block_product(DType dtype);
MultiplyFn codebook_product(DType dtype);

void normalize(const float* x, const float* w, float eps, size_t n, size_t cols, float* y, ActRows acts, Stream* stream);
void quantize(const float* x, size_t n, size_t cols, ActRows acts, Stream* stream);
void silu_mul(const float* gate, const float* up, size_t n, size_t cols, float* h, ActRows acts, Stream* stream);

// Heads of at most so many elements.
inline constexpr uint32_t kMaxHeadDim = 256;
bool supports_heads(const HeadShape& shape);
void rotate_and_store(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, const float* cos_sin, float* q, float* k,
                      const float* v, Stream* stream);
void attend(const HeadShape& shape, const KvRun* runs, size_t n_runs, size_t n, size_t max_keys, float scale, const float* q,
            void* scratch, float* out, Stream* stream);
size_t attention_scratch_bytes(const HeadShape& shape, size_t n, size_t max_keys);

void choose_experts(const float* logits, size_t n, size_t n_expert, size_t n_used, int32_t* chosen, float* weights, Stream* stream);
void group(const int32_t* chosen, size_t n, size_t n_expert, size_t n_used, int32_t* slot_of, int32_t* token_of, int32_t* first, Stream* stream);
void combine(const float* y, const int32_t* slot_of, const float* weights, size_t n, size_t n_used, size_t cols, float* residual, Stream* stream);

}  // namespace duet::gpu
