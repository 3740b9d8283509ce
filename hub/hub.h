// Repositories of models: which files a Hugging Face repository has, and which of them make up a quantization.
//
// The interface of the hub as its documentation describes it: GET {endpoint}/api/models/{repo}/tree/main?recursive=true
// gives an array of {type, path, size, lfs: {oid: sha256, size}}, further pages by a Link header; a file is at
// {endpoint}/{repo}/resolve/main/{path}.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hub/http.h"

namespace duet::hub {

// What `duet pull` is asked for.
struct ModelRef {
  std::string url;    // not empty: of one file (or the first of a split set)
  std::string repo;   // else "user/name"
  std::string quant;  // "": none given
};
// "user/name", "user/name:QUANT", also with a leading "hf.co/" or "https://huggingface.co/", or the URL of a .gguf
// file. Error(usage).
ModelRef parse_model_ref(const std::string& text);

struct HubFile {
  std::string path;  // inside the repository; safe to be used as a relative path
  uint64_t size = 0;
  std::string sha256;  // "": not known
};

// HF_ENDPOINT, HF_TOKEN (or the file that the hub's own tools keep it in), HF_HUB_OFFLINE.
struct HubAccess {
  std::string endpoint = "https://huggingface.co";
  std::string token;
  bool offline = false;
};
HubAccess hub_access_of_environment();

// All .gguf files. Error: io (see http_get), format (an answer that is not what a hub says).
std::vector<HubFile> hub_files(const HubAccess& access, const std::string& repo, const HttpOptions& options);
// The GGUF files of one page of a listing; `source` names it in errors. Error(format).
std::vector<HubFile> parse_listing(const std::string& page, const std::string& source);
std::string hub_url(const HubAccess& access, const std::string& repo, const std::string& path);

// A model in a repository: one file, or the parts of a split set in order.
struct Choice {
  std::string quant;  // "Q4_K_M", "i1-IQ2_M" or, where the name tells none, the name
  std::vector<HubFile> parts;
  size_t n_missing = 0;  // parts that the set should have
  uint64_t size() const;
};
std::vector<Choice> choices_of(const std::vector<HubFile>& files);
// The one with this quantization or file name; without one Q4_K_M, or the only one there is. Error(usage) with what
// there is; Error(io) for a set with missing parts.
const Choice& choose(const std::vector<Choice>& choices, const std::string& quant, const std::string& repo);

// Names of files: "model-00002-of-00005" -> {"model", 2, 5}.
struct SplitName {
  std::string stem;
  uint32_t number = 0, count = 0;
};
std::optional<SplitName> parse_split_name(std::string_view stem);
std::string split_name(const std::string& stem, uint32_t number, uint32_t count);
// "mixtral-8x7b.Q4_K_M" -> "Q4_K_M"; "" when it tells none.
std::string quant_of_name(std::string_view stem);

}  // namespace duet::hub
