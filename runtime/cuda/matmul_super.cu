#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {

MultiplyFn super_block_product(DType dtype) {
  switch (dtype) {
    case DType::Q2_K: return multiply_blocks<BlockQ2_K>;
    case DType::Q3_K: return multiply_blocks<BlockQ3_K>;
    case DType::Q4_K: return multiply_blocks<BlockQ4_K>;
    case DType::Q5_K: return multiply_blocks<BlockQ5_K>;
    case DType::Q6_K: return multiply_blocks<BlockQ6_K>;
    case DType::IQ4_XS: return multiply_blocks<BlockIQ4_XS>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
