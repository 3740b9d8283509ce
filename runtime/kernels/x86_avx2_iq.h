// The codebook formats (IQ1_S .. IQ3_S) and the ternary ones times act256 in 256-bit registers: blocks
// are unpacked to WideBlock by portable code, 10 ns each, and multiplied as Q6_K is.
#pragma once

#include "runtime/kernels/x86_avx2_k.h"

namespace duet {
namespace {

template <class Weights>
struct WidePanel : KPanel<WideBlock> {
  using Block = Weights;

  static DUET_INLINE const WideBlock& form(const Block& stored, WideBlock& out) {
    duet::unpack(stored, out);
    return out;
  }

  void unpack(const Block* const rows[8], size_t v, size_t n_cols) {
    WideBlock wide[8];
    const WideBlock* at[8];
    for (size_t j = 0; j < 8; ++j) at[j] = &form(*rows[j], wide[j]);
    KPanel<WideBlock>::unpack(at, v, n_cols);
  }
};

void set_iq_256(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::IQ1_S)] = matmul_k<WidePanel<BlockIQ1_S>>;
  table.matmul[static_cast<size_t>(DType::IQ1_M)] = matmul_k<WidePanel<BlockIQ1_M>>;
  table.matmul[static_cast<size_t>(DType::IQ2_XXS)] = matmul_k<WidePanel<BlockIQ2_XXS>>;
  table.matmul[static_cast<size_t>(DType::IQ2_XS)] = matmul_k<WidePanel<BlockIQ2_XS>>;
  table.matmul[static_cast<size_t>(DType::IQ2_S)] = matmul_k<WidePanel<BlockIQ2_S>>;
  table.matmul[static_cast<size_t>(DType::IQ3_XXS)] = matmul_k<WidePanel<BlockIQ3_XXS>>;
  table.matmul[static_cast<size_t>(DType::IQ3_S)] = matmul_k<WidePanel<BlockIQ3_S>>;
  table.matmul[static_cast<size_t>(DType::TQ1_0)] = matmul_k<WidePanel<BlockTQ1_0>>;
  table.matmul[static_cast<size_t>(DType::TQ2_0)] = matmul_k<WidePanel<BlockTQ2_0>>;
}

}  // namespace
}  // namespace duet
