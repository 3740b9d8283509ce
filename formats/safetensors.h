// Hugging Face safetensors: one file or a sharded set with model.safetensors.index.json.
//
// File: u64 header length, JSON {name: {dtype, shape, data_offsets [begin, end)}}, data.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/mapped_file.h"
#include "formats/tensor.h"

namespace duet {

// Parsed and validated completely in open(), then trusted: no overlap, no gap, sizes exact, header
// at most 100 MB. Formats F32, F16, BF16 and F8_E4M3 become TensorViews; another dtype is Error(unsupported)
// naming the tensor. Scalars (empty shape) appear with shape {1}. Immutable; copies share.
class Safetensors {
 public:
  // `path`: a folder (index.json, or model.safetensors, or the only *.safetensors there) or a file.
  // Throws Error: io (missing shard, named), format (damage), unsupported (dtype; only .bin/.pt).
  static Safetensors open(const std::filesystem::path& path);
  // Files that hold one model together. Error(format) when two of them hold a tensor.
  static Safetensors open_all(const std::vector<std::filesystem::path>& files);
  static Safetensors parse(std::span<const std::byte> bytes, const std::string& source);

  std::span<const TensorView> tensors() const;  // by shard, then by data offset: reading order
  const TensorView* find_tensor(std::string_view name) const;
  uint64_t file_bytes() const;
  // The files, and which they were when they were mapped.
  std::vector<std::pair<std::filesystem::path, FileIdentity>> files() const;
  void drop(const TensorView& tensor) const;    // pages not needed again soon

 private:
  struct State;
  explicit Safetensors(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

// Names, sizes and dates of the files: a line for each.
std::string identity_of(const Safetensors& files);

}  // namespace duet
