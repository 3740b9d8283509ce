// GGUF bytes -> reader, typed look-ups, hyper-parameters, and one row of every tensor decoded.
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "formats/gguf.h"
#include "formats/schema.h"

namespace {

using namespace duet;

template <class Body>
void allow_error(Body&& body) {
  try {
    body();
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;  // a mistake of ours, not of the file
  }
}

void use(const GgufFile& file) {
  for (const GgufKeyValue& kv : file.metadata()) {
    allow_error([&] { (void)file.get_uint(kv.key); });
    allow_error([&] { (void)file.get_float(kv.key); });
    allow_error([&] { (void)file.get_bool(kv.key); });
    allow_error([&] { (void)file.get_string(kv.key); });
    allow_error([&] { (void)file.get_strings(kv.key); });
  }
  for (const TensorView& tensor : file.tensors()) {
    std::vector<float> row(tensor.cols());
    tensor.format->decode_row(tensor.data.data(), row.data(), row.size());
    (void)tensor.format->scales_finite(tensor.data.data(), row.size());
  }
  (void)tensor_table(read_hparams(file, [](const std::string&) {}));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A copy: a mapped file is aligned to pages, the fuzzer's buffer to nothing.
  const std::vector<uint8_t> bytes(data, data + size);
  allow_error([&] { use(GgufFile::parse(std::as_bytes(std::span(bytes)), "fuzz")); });
  return 0;
}
