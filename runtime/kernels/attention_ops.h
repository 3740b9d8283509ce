// Attention of the SIMD tables, written once over xsimd batches (contract: kernels.h).
#pragma once

#include "runtime/kernels/attention_float.h"
#include "runtime/kernels/attention_q8.h"

namespace duet {
namespace {

template <class Isa>
struct AttentionOps {
  static void attention(const AttentionArgs& args) noexcept {
    using Float = AttentionFloat<Isa>;
    if (args.kv.type == DType::F32) typename Float::template Call<typename Float::F32>(args).run();
    if (args.kv.type == DType::F16) typename Float::template Call<typename Float::F16>(args).run();
    if (args.kv.type == DType::Q8_0) typename AttentionQ8<Isa>::Call(args).run();
  }
  static void add_to(KernelTable& table) { table.attention = attention; }
};

}  // namespace
}  // namespace duet
