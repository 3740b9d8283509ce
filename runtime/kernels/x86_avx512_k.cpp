// AVX-512 VNNI kernels of the 256-element formats (Q2_K .. Q6_K, IQ4_XS) times act256.
//
// vpdpbusd multiplies unsigned quants (with an offset where they are signed) by activations and adds
// four; how scales come in, and how offsets go out again: x86_avx512_k_panel.h, x86_avx512_k_rows.h
// (one token), x86_avx512_k_strips.h (a few; one of Q2_K and Q3_K).
#include "runtime/kernels/x86_avx512_iq.h"
#include "runtime/kernels/x86_avx512_k_strips.h"
#include "runtime/kernels/x86_avx512_k_rows.h"

namespace duet {
namespace {

bool cheap_mulld() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
}

}  // namespace

void add_avx512_k(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul_k<BlockQ2_K>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul_k<BlockQ3_K>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] =
      cheap_mulld() ? matmul_k<BlockQ4_K> : matmul_k<BlockQ4_K, false>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul_k<BlockQ5_K>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul_k<BlockQ6_K>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul_k<BlockIQ4_XS>;
  table.matmul[static_cast<size_t>(DType::IQ1_S)] = matmul512<WideRows<BlockIQ1_S>>;
  table.matmul[static_cast<size_t>(DType::IQ1_M)] = matmul512<WideRows<BlockIQ1_M>>;
  table.matmul[static_cast<size_t>(DType::IQ2_XXS)] = matmul512<WideRows<BlockIQ2_XXS>>;
  table.matmul[static_cast<size_t>(DType::IQ2_XS)] = matmul512<WideRows<BlockIQ2_XS>>;
  table.matmul[static_cast<size_t>(DType::IQ2_S)] = matmul512<WideRows<BlockIQ2_S>>;
  table.matmul[static_cast<size_t>(DType::IQ3_XXS)] = matmul512<WideRows<BlockIQ3_XXS>>;
  table.matmul[static_cast<size_t>(DType::IQ3_S)] = matmul512<WideRows<BlockIQ3_S>>;
  table.matmul[static_cast<size_t>(DType::TQ1_0)] = matmul512<WideRows<BlockTQ1_0>>;
  table.matmul[static_cast<size_t>(DType::TQ2_0)] = matmul512<WideRows<BlockTQ2_0>>;
}

}  // namespace duet
