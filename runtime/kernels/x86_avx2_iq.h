// The codebook formats (IQ1_S .. IQ3_S) and the ternary ones times act256 in 256-bit registers: blocks
// are unpacked to WideBlock by portable code, 10 ns each, and multiplied as Q6_K is.
#pragma once

#include "runtime/kernels/x86_avx2_k.h"

namespace duet {
namespace {

// The first eight rows.
template <class Block>
void decode_wide_rows(const MatmulArgs& a) noexcept {
  const auto* x = reinterpret_cast<const BlockAct256*>(a.x);
  const RowsOf8 rows(a);
  Ahead ahead(a, 8);
  __m256 y = {};
  for (size_t b = 0; b < a.cols / 256; ++b) {
    DecodeSums sums;
    for (size_t r = 0; r < 8; ++r) {
      ahead.fetch(sizeof(Block));
      WideBlock wide;
      unpack(reinterpret_cast<const Block*>(rows.at[r])[b], wide);
      decode_block(wide, x[b], r, sums);
    }
    const __m256 scale = _mm256_mul_ps(_mm256_load_ps(sums.wide_d), _mm256_broadcast_ss(&x[b].d));
    y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum_lanes(sums.dot)), scale, y);
  }
  rows.store(y);
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
  if (a.n_tokens == 1) return for_eight_rows(a, decode_wide_rows<Block>);
  matmul_panels<WidePanel<Block>>(a);
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
