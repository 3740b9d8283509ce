#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {

const FormatOperations* block32_operations(DType dtype) {
  switch (dtype) {
    case DType::Q4_0: return &kOperations<BlockQ4_0>;
    case DType::Q4_1: return &kOperations<BlockQ4_1>;
    case DType::Q5_0: return &kOperations<BlockQ5_0>;
    case DType::Q5_1: return &kOperations<BlockQ5_1>;
    case DType::Q8_0: return &kOperations<BlockQ8_0>;
    case DType::IQ4_NL: return &kOperations<BlockIQ4_NL>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
