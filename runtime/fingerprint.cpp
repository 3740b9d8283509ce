#include "runtime/fingerprint.h"

#include <algorithm>
#include <map>

#include "base/mapped_file.h"
#include "base/sha256.h"

namespace duet {
namespace {

constexpr size_t kSample = 4096;

std::span<const std::byte> middle(std::span<const std::byte> data) {
  const size_t n = std::min(kSample, data.size());
  return data.subspan((data.size() - n) / 2, n);
}

// Where the data of each part's first tensor begins; a part without tensors is all header.
std::map<size_t, uint64_t> header_bytes(const GgufFile& file) {
  std::map<size_t, uint64_t> out;
  for (const TensorView& tensor : file.tensors()) {
    const auto place = file.place_of(tensor.data.data());
    const auto [at, fresh] = out.try_emplace(place.part, place.offset);
    if (!fresh) at->second = std::min(at->second, place.offset);
  }
  return out;
}

}  // namespace

std::string fingerprint_of(const GgufFile& file, std::string_view more) {
  const auto headers = header_bytes(file);
  const auto paths = file.part_paths();
  Sha256 hash;
  for (size_t part = 0; part < paths.size(); ++part) {
    const MappedFile mapped = MappedFile::open(paths[part]);
    const auto header = headers.find(part);
    const size_t n = header == headers.end() ? mapped.bytes().size() : std::min<size_t>(header->second, mapped.bytes().size());
    hash.add(mapped.bytes().first(n));
  }
  for (const TensorView& tensor : file.tensors()) hash.add(middle(tensor.data));
  hash.add(std::span(more.data(), more.size()));
  return hex(hash.finish());
}

}  // namespace duet
