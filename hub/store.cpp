#include "hub/store.h"

#include <algorithm>
#include <cctype>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/user_folders.h"
#include "hub/hub.h"
#include "hub/part_file.h"

namespace duet::hub {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxEntries = 100000;  // of one tree of folders
constexpr int kMaxDepth = 6;
constexpr uint64_t kMaxManifest = 1 << 20;

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

bool has_ending(const fs::path& path, std::string_view ending) { return lower(path.filename().string()).ends_with(ending); }

// All regular files (also behind links), without what cannot be read.
std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code ec;
  fs::recursive_directory_iterator entry(folder, fs::directory_options::skip_permission_denied, ec), end;
  for (size_t n = 0; !ec && entry != end && n < kMaxEntries; entry.increment(ec), ++n) {
    if (entry.depth() >= kMaxDepth) entry.disable_recursion_pending();
    std::error_code unreadable;
    if (entry->is_regular_file(unreadable)) out.push_back(entry->path());
  }
  std::sort(out.begin(), out.end());
  return out;
}

uint64_t size_of(const fs::path& path) {
  std::error_code ec;
  const uint64_t n = fs::file_size(path, ec);
  return ec ? 0 : n;
}

std::vector<fs::path> parts_of(const fs::path& path) {
  const std::optional<SplitName> split = parse_split_name(path.stem().string());
  if (!split) return {path};
  std::vector<fs::path> out;
  for (uint32_t i = 1; i <= split->count; ++i)
    out.push_back(path.parent_path() / (split_name(split->stem, i, split->count) + path.extension().string()));
  return out;
}

// A file, or the first of a split set, as a model: size, and whether all parts are there.
std::optional<LocalModel> model_at(const fs::path& path, std::string name, Owner owner) {
  LocalModel out{std::move(name), path, 0, owner};
  bool complete = true;
  uint64_t done = 0, total = 0;
  for (const fs::path& part : parts_of(path)) {
    std::error_code ec;
    if (fs::is_regular_file(part, ec)) {
      done += size_of(part);
      total += size_of(part);
      continue;
    }
    complete = false;
    if (const std::optional<Partial> partial = partial_download(part)) {
      done += partial->done;
      total += partial->size;
    }
  }
  out.n_bytes = total;
  if (complete) return out;
  if (owner != Owner::duet) return std::nullopt;
  out.n_done = done;
  return out;
}

bool is_later_part(const fs::path& path) {
  const std::optional<SplitName> split = parse_split_name(path.stem().string());
  return split && split->number != 1;
}

// A tree of user/repo/.../file.gguf.
void add_tree(const fs::path& root, Owner owner, std::vector<LocalModel>& out) {
  std::vector<fs::path> seen;
  for (fs::path file : files_below(root)) {
    if (owner == Owner::duet && has_ending(file, ".part.json")) file = file.string().substr(0, file.string().size() - 10);
    if (!has_ending(file, ".gguf") || lower(file.filename().string()).starts_with("mmproj")) continue;
    const fs::path first = parts_of(file).front();
    if (std::find(seen.begin(), seen.end(), first) != seen.end()) continue;
    seen.push_back(first);
    if (std::optional<LocalModel> model = model_at(first, model_name(first.lexically_relative(root)), owner)) out.push_back(std::move(*model));
  }
}

// models--user--repo/snapshots/REVISION/...: the revision that refs/main names, else the last one.
void add_hugging_face(const fs::path& cache, std::vector<LocalModel>& out) {
  std::error_code ec;
  for (fs::directory_iterator entry(cache, ec), end; !ec && entry != end; entry.increment(ec)) {
    std::string repo = entry->path().filename().string();
    if (!repo.starts_with("models--")) continue;
    repo.erase(0, 8);
    if (const size_t at = repo.find("--"); at != std::string::npos) repo.replace(at, 2, "/");
    std::string revision;
    try {
      revision = read_file(entry->path() / "refs/main", 200);
    } catch (const Error&) {
      std::error_code none;
      for (const auto& each : fs::directory_iterator(entry->path() / "snapshots", none)) revision = std::max(revision, each.path().filename().string());
    }
    while (!revision.empty() && static_cast<unsigned char>(revision.back()) <= ' ') revision.pop_back();
    if (revision.empty() || revision.find('/') != std::string::npos) continue;
    const fs::path root = entry->path() / "snapshots" / revision;
    for (const fs::path& file : files_below(root)) {
      if (!has_ending(file, ".gguf") || is_later_part(file) || lower(file.filename().string()).starts_with("mmproj")) continue;
      const fs::path below = fs::path(repo) / file.parent_path().lexically_relative(root) / file.filename();
      if (std::optional<LocalModel> model = model_at(file, model_name(below.lexically_normal()), Owner::hugging_face)) out.push_back(std::move(*model));
    }
  }
}

// manifests/HOST/user/name/tag: a JSON text whose layers name the blobs.
std::optional<LocalModel> ollama_model(const fs::path& models, const fs::path& manifest) {
  const std::string source = manifest.string();
  const fs::path below = manifest.lexically_relative(models / "manifests");
  std::vector<std::string> names;
  for (const fs::path& part : below) names.push_back(part.string());
  if (names.size() != 4) return std::nullopt;
  const Json json = parse_json(read_file(manifest, kMaxManifest), source);
  const auto layers = json.is_object() ? json.find("layers") : json.end();
  if (!json.is_object() || layers == json.end() || !layers->is_array()) return std::nullopt;
  for (const Json& layer : *layers) {
    if (!layer.is_object() || json_get_or<std::string>(layer, "mediaType", "", source) != "application/vnd.ollama.image.model") continue;
    const std::string digest = json_get<std::string>(layer, "digest", source);
    if (!digest.starts_with("sha256:") || digest.size() != 71 || digest.find('/') != std::string::npos) return std::nullopt;
    std::string name = (names[1] == "library" ? "" : names[1] + "/") + names[2] + ":" + names[3];
    if (names[0] != "registry.ollama.ai") name = names[0] + "/" + name;
    const fs::path blob = models / "blobs" / ("sha256-" + digest.substr(7));
    std::optional<LocalModel> out = model_at(blob, std::move(name), Owner::ollama);
    if (out) out->digest = digest.substr(7);
    return out;
  }
  return std::nullopt;
}

void add_ollama(const fs::path& models, std::vector<LocalModel>& out) {
  for (const fs::path& manifest : files_below(models / "manifests")) {
    try {
      if (std::optional<LocalModel> model = ollama_model(models, manifest)) out.push_back(std::move(*model));
    } catch (const Error&) {
      continue;  // not a manifest
    }
  }
}

bool answers_to(const LocalModel& model, const std::string& name) {
  const std::string full = lower(model.name);
  const size_t slash = full.find('/');
  const std::string without_user = slash == std::string::npos ? full : full.substr(slash + 1);
  for (const std::string& form : {full, without_user})
    if (name == form || name == form.substr(0, form.rfind(':'))) return true;
  return model.owner != Owner::ollama && (name == lower(model.path.filename().string()) || name == lower(model.path.stem().string()));
}

}  // namespace

const char* owner_name(Owner owner) {
  switch (owner) {
    case Owner::duet:
      return "duet";
    case Owner::ollama:
      return "ollama";
    case Owner::lm_studio:
      return "lm-studio";
    case Owner::hugging_face:
      return "huggingface";
  }
  return "";
}

ModelFolders folders_of_environment() {
  ModelFolders out;
  const auto models = environment("DUET_MODELS");
  out.models = (models ? fs::absolute(expand_home(*models)) : data_folder() / "models").lexically_normal();
  if (!out.models.has_filename()) out.models = out.models.parent_path();  // a slash at the end
  if (const auto folder = environment("OLLAMA_MODELS"))
    out.ollama = {*folder};
  else
    out.ollama = {home_folder() / ".ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models"};
  if (const auto folder = environment("LMSTUDIO_HOME"))
    out.lm_studio = {fs::path(*folder) / "models"};
  else
    out.lm_studio = {home_folder() / ".lmstudio/models", cache_folder() / "lm-studio/models"};
  const auto cache = environment("HF_HUB_CACHE"), home = environment("HF_HOME");
  out.hugging_face = {cache ? fs::path(*cache) : home ? fs::path(*home) / "hub" : cache_folder() / "huggingface/hub"};
  return out;
}

std::string model_name(const fs::path& below) {
  std::vector<std::string> names;
  for (const fs::path& part : below) names.push_back(part.string());
  std::string stem = fs::path(names.back()).stem().string();
  if (const auto split = parse_split_name(stem)) stem = split->stem;
  std::string quant = quant_of_name(stem);
  if (quant.empty() && names.size() > 3) quant = quant_of_name(names[names.size() - 2]);
  if (names.size() < 3) return stem;  // not of a repository
  return names[0] + "/" + names[1] + ":" + (quant.empty() ? stem : quant);
}

std::vector<LocalModel> local_models(const ModelFolders& folders) {
  std::vector<LocalModel> out;
  const auto sorted_from = [&out](size_t begin) {
    std::stable_sort(out.begin() + static_cast<ptrdiff_t>(begin), out.end(), [](const auto& a, const auto& b) { return lower(a.name) < lower(b.name); });
  };
  add_tree(folders.models, Owner::duet, out);
  sorted_from(0);
  const size_t n_own = out.size();
  for (const fs::path& folder : folders.ollama) add_ollama(folder, out);
  for (const fs::path& folder : folders.lm_studio) add_tree(folder, Owner::lm_studio, out);
  for (const fs::path& folder : folders.hugging_face) add_hugging_face(folder, out);
  sorted_from(n_own);
  return out;
}

std::optional<LocalModel> find_model(const std::vector<LocalModel>& models, const std::string& name) {
  const std::string wanted = lower(name);
  std::vector<const LocalModel*> found;
  for (const LocalModel& model : models)
    if (!model.n_done && (lower(model.name) == wanted || lower(model.name) == wanted + ":latest")) return model;
  for (const LocalModel& model : models)
    if (!model.n_done && answers_to(model, wanted)) found.push_back(&model);
  if (found.empty()) return std::nullopt;
  std::string names;
  for (const LocalModel* model : found)
    if (lower(model->name) != lower(found.front()->name)) names += ", " + model->name;
  if (!names.empty()) fail(ErrorKind::usage, quote(name), ": several models answer to it: ", found.front()->name, names);
  return *found.front();
}

void remove_model(const ModelFolders& folders, const LocalModel& model) {
  if (model.owner != Owner::duet)
    fail(ErrorKind::usage, model.name, ": belongs to ", owner_name(model.owner), " (", model.path.string(), "); remove it there");
  for (const fs::path& part : parts_of(model.path))
    for (const char* ending : {"", ".part", ".part.json"}) {
      std::error_code ec;
      fs::remove(part.string() + ending, ec);
      if (ec) fail(ErrorKind::io, part.string(), ending, ": cannot be removed: ", ec.message());
    }
  std::error_code ec;
  for (fs::path folder = model.path.parent_path(); folder != folders.models && folder.has_relative_path(); folder = folder.parent_path())
    if (!fs::remove(folder, ec) || ec) return;  // not empty
}

}  // namespace duet::hub
