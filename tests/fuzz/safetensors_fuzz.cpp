// Safetensors bytes -> reader, and the first and last byte of every tensor.
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "formats/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace duet;
  const std::vector<uint8_t> bytes(data, data + size);
  try {
    const Safetensors file = Safetensors::parse(std::as_bytes(std::span(bytes)), "fuzz");
    volatile unsigned sum = 0;
    for (const TensorView& tensor : file.tensors()) {
      sum = sum + std::to_integer<unsigned>(tensor.data.front()) +
            std::to_integer<unsigned>(tensor.data.back());
      DUET_ASSERT(tensor.data.size() == tensor.rows() * row_bytes(*tensor.format, tensor.cols()));
    }
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
