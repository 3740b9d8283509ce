#include "runtime/cuda/codebooks.cuh"
#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {

const FormatOperations* codebook_operations(DType dtype) {
  switch (dtype) {
    case DType::IQ1_S: return &kOperations<BlockIQ1_S>;
    case DType::IQ1_M: return &kOperations<BlockIQ1_M>;
    case DType::IQ2_XXS: return &kOperations<BlockIQ2_XXS>;
    case DType::IQ2_XS: return &kOperations<BlockIQ2_XS>;
    case DType::IQ2_S: return &kOperations<BlockIQ2_S>;
    case DType::IQ3_XXS: return &kOperations<BlockIQ3_XXS>;
    case DType::IQ3_S: return &kOperations<BlockIQ3_S>;
    case DType::TQ1_0: return &kOperations<BlockTQ1_0>;
    case DType::TQ2_0: return &kOperations<BlockTQ2_0>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
