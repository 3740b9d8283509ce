// Model folders in Mistral's own form: params.json, consolidated*.safetensors, tokenizer.model.
#pragma once

#include <filesystem>

#include "base/json_fwd.h"
#include "formats/safetensors.h"
#include "formats/schema.h"

namespace duet {

// There is no model in Hugging Face form, but one in Mistral's: a folder may hold both.
bool is_mistral_folder(const std::filesystem::path& folder);
// Error: io, unsupported (only pickles: consolidated.00.pt).
Safetensors open_consolidated(const std::filesystem::path& folder);
// params.json as config.json would say it. Names in it are Mistral's (dim, n_layers, moe) or, in the first release
// of 8x7B, Hugging Face's. What it lacks comes from the weights or, with a notice, from the published models.
Json config_of_params(const std::filesystem::path& folder, const Safetensors& weights, const NoticeFn& notice);

}  // namespace duet
