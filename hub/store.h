// The models on this machine: those that duet has pulled, and those of other programs, which are used where they lie.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace duet::hub {

enum class Owner { duet, ollama, lm_studio, hugging_face };
const char* owner_name(Owner owner);  // "duet", "ollama", "lm-studio", "huggingface"

struct LocalModel {
  std::string name;            // "user/repo:Q4_K_M"; of Ollama "mixtral:8x7b"
  std::filesystem::path path;  // of its first part
  uint64_t n_bytes = 0;        // of all parts
  Owner owner = Owner::duet;
  std::optional<uint64_t> n_done = {};  // of a download that is not complete: bytes that have arrived
  std::string digest = {};              // SHA-256 where its owner tells it
};

// Where to look; folders need not exist.
struct ModelFolders {
  std::filesystem::path models;                     // duet's own: models/user/repo/file.gguf
  std::vector<std::filesystem::path> ollama;        // .../models with manifests/ and blobs/
  std::vector<std::filesystem::path> lm_studio;     // publisher/repo/file.gguf
  std::vector<std::filesystem::path> hugging_face;  // models--user--repo/snapshots/REVISION/file.gguf
};
// DUET_MODELS, OLLAMA_MODELS, LMSTUDIO_HOME, HF_HUB_CACHE, HF_HOME, or where these programs put them.
ModelFolders folders_of_environment();

// Sorted: duet's own first. Folders that cannot be read and files that are not what they should be are left out.
std::vector<LocalModel> local_models(const ModelFolders& folders);

// The model of this name: as listed, without the user ("repo:Q4_K_M"), without the quantization where only one is
// there, or the name of its file. Complete ones only. Error(usage) with the names when several answer to it.
std::optional<LocalModel> find_model(const std::vector<LocalModel>& models, const std::string& name);

// Removes one of duet's own, complete or not, with all its parts and the folders that it leaves empty. Error(usage) for
// one of another program, Error(io).
void remove_model(const ModelFolders& folders, const LocalModel& model);

// The name of a model in duet's own folder, or another of that form, by its path below it.
std::string model_name(const std::filesystem::path& below);

}  // namespace duet::hub
