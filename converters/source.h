// What a conversion starts from: a folder or a GGUF file, resolved and checked.
#pragma once

#include <filesystem>
#include <optional>
#include <vector>

#include "converters/convert.h"
#include "converters/quantize.h"
#include "formats/safetensors.h"

namespace duet {

// Movable; jobs borrow from the files and from rope_factors.
struct ConversionSource {
  HParams hparams;
  std::vector<GgufKeyValue> metadata;  // of the output
  std::optional<Safetensors> weights;  // of a folder, unless only its vocabulary is converted
  std::optional<GgufFile> file;        // of GGUF -> GGUF
  std::vector<float> rope_factors;     // data of rope_freqs.weight
  std::string identity;            // which files these are, in which state
  std::vector<TensorJob> jobs;  // the tensors of the output, in the formats that options ask for
};

// Errors as of convert() and quantize().
ConversionSource open_folder(const std::filesystem::path& folder, const ConvertOptions& options);
ConversionSource open_gguf(const std::filesystem::path& input, const ConvertOptions& options);

// Names, sizes and dates of the files.
std::string identity_of(const GgufFile& file);

}  // namespace duet
