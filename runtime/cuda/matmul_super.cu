#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {

const FormatOperations* super_block_operations(DType dtype) {
  switch (dtype) {
    case DType::Q2_K: return &kOperations<BlockQ2_K>;
    case DType::Q3_K: return &kOperations<BlockQ3_K>;
    case DType::Q4_K: return &kOperations<BlockQ4_K>;
    case DType::Q5_K: return &kOperations<BlockQ5_K>;
    case DType::Q6_K: return &kOperations<BlockQ6_K>;
    case DType::IQ4_XS: return &kOperations<BlockIQ4_XS>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
