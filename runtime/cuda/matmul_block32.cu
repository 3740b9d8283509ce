#include "runtime/cuda/matmul.cuh"

namespace duet::gpu {

MultiplyFn block32_product(DType dtype) {
  switch (dtype) {
    case DType::Q4_0: return multiply_blocks<BlockQ4_0>;
    case DType::Q4_1: return multiply_blocks<BlockQ4_1>;
    case DType::Q5_0: return multiply_blocks<BlockQ5_0>;
    case DType::Q5_1: return multiply_blocks<BlockQ5_1>;
    case DType::Q8_0: return multiply_blocks<BlockQ8_0>;
    case DType::IQ4_NL: return multiply_blocks<BlockIQ4_NL>;
    default: return nullptr;
  }
}

}  // namespace duet::gpu
