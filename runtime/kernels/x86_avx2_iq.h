// The codebook formats (IQ1_S .. IQ3_S) and the ternary ones times act256 in 256-bit registers: blocks
// are unpacked to WideBlock by portable code, 10 ns each, and multiplied as Q6_K is.
#pragma once

#include "runtime/kernels/x86_avx2_k.h"

namespace duet {
namespace {

// The first eight rows times T tokens.
template <class Block, size_t T>
void decode_wide_rows(const MatmulArgs& a) noexcept {
  const RowsOf8 rows(a);
  Ahead ahead(a, 8);
  __m256 y[T] = {};
  for (size_t b = 0; b < a.cols / 256; ++b) {
    const BlockAct256* x[T];
    for (size_t t = 0; t < T; ++t) x[t] = reinterpret_cast<const BlockAct256*>(a.x + t * a.x_stride) + b;
    TokenSums sums[T];
    alignas(32) float d[8];
    for (size_t r = 0; r < 8; ++r) {
      ahead.fetch(sizeof(Block));
      WideBlock wide;
      unpack(reinterpret_cast<const Block*>(rows.at[r])[b], wide);
      decode_block<WideBlock, T>(wide, x, r, sums);
      d[r] = wide.d;
    }
    for (size_t t = 0; t < T; ++t) y[t] = add_sums<WideBlock>(sums[t], _mm256_load_ps(d), __m256{}, x[t]->d, y[t]);
  }
  for (size_t t = 0; t < T; ++t) rows.store(y[t], t);
}

template <class Weights>
struct WidePanel : KPanel<WideBlock> {
  using Block = Weights;

  void unpack(const Block* const rows[8], size_t v, size_t n_cols) {
    WideBlock wide[8];
    const WideBlock* at[8];
    for (size_t j = 0; j < 8; ++j) {
      duet::unpack(*rows[j], wide[j]);
      at[j] = &wide[j];
    }
    KPanel<WideBlock>::unpack(at, v, n_cols);
  }
};

template <class Block>
void matmul_wide(const MatmulArgs& a) noexcept {
  switch (a.n_tokens) {
    case 1: return for_eight_rows(a, decode_wide_rows<Block, 1>);
    case 2: return for_eight_rows(a, decode_wide_rows<Block, 2>);
    case 3: return for_eight_rows(a, decode_wide_rows<Block, 3>);
    default: return matmul_panels<WidePanel<Block>>(a);
  }
}

void set_iq_256(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::IQ1_S)] = matmul_wide<BlockIQ1_S>;
  table.matmul[static_cast<size_t>(DType::IQ1_M)] = matmul_wide<BlockIQ1_M>;
  table.matmul[static_cast<size_t>(DType::IQ2_XXS)] = matmul_wide<BlockIQ2_XXS>;
  table.matmul[static_cast<size_t>(DType::IQ2_XS)] = matmul_wide<BlockIQ2_XS>;
  table.matmul[static_cast<size_t>(DType::IQ2_S)] = matmul_wide<BlockIQ2_S>;
  table.matmul[static_cast<size_t>(DType::IQ3_XXS)] = matmul_wide<BlockIQ3_XXS>;
  table.matmul[static_cast<size_t>(DType::IQ3_S)] = matmul_wide<BlockIQ3_S>;
  table.matmul[static_cast<size_t>(DType::TQ1_0)] = matmul_wide<BlockTQ1_0>;
  table.matmul[static_cast<size_t>(DType::TQ2_0)] = matmul_wide<BlockTQ2_0>;
}

}  // namespace
}  // namespace duet
