// GGUF -> GGUF without touching a weight: experts merged, shards joined or cut.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "converters/convert.h"
#include "converters/quantize.h"

namespace duet {

// The old per-expert layout -> the merged one; merged files are copied. Every block keeps its bits.
// Error: as of quantize(); unsupported when experts of one tensor have different types.
void repack(const std::filesystem::path& input, const std::filesystem::path& output, const ConvertOptions& options);

// All parts of a split file -> one file, tensors as they are.
void merge_parts(const std::filesystem::path& input, const std::filesystem::path& output, const ConvertOptions& options);

// Where part `index` (from 0) of n goes: "model.gguf" -> "model-00001-of-00003.gguf".
std::filesystem::path part_path(const std::filesystem::path& output, size_t index, size_t n);

// What runs that were cut off have left of this output goes when one begins anew. Error(usage) when it is of another
// number of files than n and is to stay.
void settle_unfinished(const std::filesystem::path& output, size_t n, const ConvertOptions& options);

// The jobs as one file, or, when max_bytes > 0 and they are larger, as parts of about at most so many
// bytes (a tensor is never cut): metadata in the first, split.* keys in all. After an error nothing is left
// behind, unless options.resume, and files that were there are as before. Error(io) when a file exists and may not be replaced. source: as of part_options().
void write_parts(const std::filesystem::path& output, const std::vector<GgufKeyValue>& metadata, std::vector<TensorJob> jobs,
                 const std::string& source, const ConvertOptions& options);

// What that makes.
ConvertPlan plan_parts(const std::vector<GgufKeyValue>& metadata, const std::vector<TensorJob>& jobs, const std::string& recipe, const ConvertOptions& options);

}  // namespace duet
