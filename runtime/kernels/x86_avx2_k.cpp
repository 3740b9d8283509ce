// AVX2 kernels of the 256-element formats.
#include "runtime/kernels/x86_avx2_k.h"

namespace duet {

void add_avx2_k(KernelTable& table) {
  table.matmul[static_cast<size_t>(DType::Q2_K)] = matmul_k<BlockQ2_K>;
  table.matmul[static_cast<size_t>(DType::Q3_K)] = matmul_k<BlockQ3_K>;
  table.matmul[static_cast<size_t>(DType::Q4_K)] = matmul_k<BlockQ4_K>;
  table.matmul[static_cast<size_t>(DType::Q5_K)] = matmul_k<BlockQ5_K>;
  table.matmul[static_cast<size_t>(DType::Q6_K)] = matmul_k<BlockQ6_K>;
  table.matmul[static_cast<size_t>(DType::IQ4_XS)] = matmul_k<BlockIQ4_XS>;
}

}  // namespace duet
