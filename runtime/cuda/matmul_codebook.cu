#include "runtime/cuda/codebooks.cuh"
#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {

MultiplyFn codebook_product(DType dtype) {
  switch (dtype) {
    case DType::IQ1_S: return multiply_blocks<BlockIQ1_S>;
    case DType::IQ1_M: return multiply_blocks<BlockIQ1_M>;
    case DType::IQ2_XXS: return multiply_blocks<BlockIQ2_XXS>;
    case DType::IQ2_XS: return multiply_blocks<BlockIQ2_XS>;
    case DType::IQ2_S: return multiply_blocks<BlockIQ2_S>;
    case DType::IQ3_XXS: return multiply_blocks<BlockIQ3_XXS>;
    case DType::IQ3_S: return multiply_blocks<BlockIQ3_S>;
    case DType::TQ1_0: return multiply_blocks<BlockTQ1_0>;
    case DType::TQ2_0: return multiply_blocks<BlockTQ2_0>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
