// pull, list, rm: models from the Hugging Face hub or a URL, and those that are here.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"
#include "cli/commands.h"
#include "cli/console.h"
#include "cli/options.h"
#include "formats/gguf.h"
#include "hub/download.h"
#include "hub/hub.h"
#include "hub/store.h"

namespace duet::cli {
namespace {

namespace fs = std::filesystem;

struct PullOptions {
  std::string model;
  size_t connections = 4;
  bool offline = false;
};

// One file of what is to be pulled.
struct Piece {
  hub::DownloadRequest request;
  uint64_t size = 0;  // 0: not known
};

hub::HttpOptions http_options() { return {.cancel = &interrupted()}; }

// ---- pull --------------------------------------------------------------------------------------

std::optional<hub::LocalModel> already_here(const hub::ModelRef& ref, const std::vector<hub::LocalModel>& models) {
  if (!ref.url.empty()) return std::nullopt;
  if (!ref.quant.empty()) return hub::find_model(models, ref.repo + ":" + ref.quant);
  return hub::find_model(models, ref.repo + ":Q4_K_M");
}

// The token is for the hub's own files only.
std::vector<Piece> pieces_of_url(const hub::HubAccess& access, const std::string& url, const fs::path& models) {
  const std::string path = url.substr(0, url.find_first_of("?#")), query = url.substr(path.size());
  const std::string folder = path.substr(0, path.rfind('/') + 1), name = path.substr(folder.size());
  std::string host = hub::url_host(url);
  std::replace(host.begin(), host.end(), ':', '_');
  const std::string token = url.starts_with(access.endpoint + "/") ? access.token : "";
  const auto piece = [&](const std::string& file) {
    return Piece{{folder + file + query, token, models / host / file, std::nullopt, ""}, 0};
  };
  const std::optional<hub::SplitName> split = hub::parse_split_name(fs::path(name).stem().string());
  if (!split) return {piece(name)};
  std::vector<Piece> out;
  for (uint32_t i = 1; i <= split->count; ++i) out.push_back(piece(hub::split_name(split->stem, i, split->count) + ".gguf"));
  return out;
}

std::vector<Piece> pieces_of_repo(const hub::HubAccess& access, const std::string& repo, const hub::Choice& choice, const fs::path& models) {
  std::vector<Piece> out;
  for (const hub::HubFile& file : choice.parts)
    out.push_back({{hub::hub_url(access, repo, file.path), access.token, models / repo / file.path, file.size, file.sha256}, file.size});
  return out;
}

// The same bytes in another program's folder.
std::optional<hub::LocalModel> same_file(const hub::Choice& choice, const std::vector<hub::LocalModel>& models) {
  if (choice.parts.size() != 1 || choice.parts[0].sha256.empty()) return std::nullopt;
  const auto found = std::find_if(models.begin(), models.end(), [&](const auto& m) { return m.digest == choice.parts[0].sha256; });
  return found == models.end() ? std::nullopt : std::optional(*found);
}

// Bytes of this download on a status line, without those of an earlier attempt, which took no time.
class PullProgress {
 public:
  explicit PullProgress(std::string detail) : detail_(std::move(detail)) {}
  void update(uint64_t done, uint64_t total, const std::string& what) {
    if (what != what_) {
      bar_ = std::make_unique<ProgressBar>(what, ProgressBar::Unit::bytes);
      before_ = what == "check" ? 0 : done;
      what_ = what;
    }
    bar_->update(done - std::min(done, before_), total - before_, format_size(done) + " of " + format_size(total) + detail_);
  }

 private:
  std::string detail_, what_;
  uint64_t before_ = 0;
  std::unique_ptr<ProgressBar> bar_;
};

void pull_piece(const Piece& piece, const PullOptions& options, const std::string& detail) {
  std::error_code ec;
  const fs::path& path = piece.request.destination;
  if (fs::is_regular_file(path, ec)) {
    if (piece.size == 0 || fs::file_size(path, ec) == piece.size) return;
    fail(ErrorKind::io, path.string(), ": is there with another size; remove it first with duet rm");
  }
  PullProgress progress(detail);
  hub::DownloadOptions download;
  download.http = http_options();
  download.connections = options.connections;
  download.notice = [](const std::string& text) { note(text); };
  download.progress = [&](uint64_t done, uint64_t total, const char* what) { progress.update(done, total, what); };
  hub::download(piece.request, download);
}

void pull_pieces(const std::vector<Piece>& pieces, const PullOptions& options) {
  try {
    for (size_t i = 0; i < pieces.size(); ++i)
      pull_piece(pieces[i], options, pieces.size() == 1 ? "" : concat(", part ", i + 1, " of ", pieces.size()));
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::cancelled) throw;
    fail(ErrorKind::cancelled, "interrupted; the same command goes on where it stopped");
  }
}

void run_pull(const PullOptions& options) {
  const hub::ModelFolders folders = hub::folders_of_environment();
  const hub::ModelRef ref = hub::parse_model_ref(options.model);
  const hub::HubAccess access = hub::hub_access_of_environment();
  const std::vector<hub::LocalModel> models = hub::local_models(folders);
  const auto use = [](const hub::LocalModel& model) {
    note(concat("here already, of ", hub::owner_name(model.owner), ": ", model.name));
    print(model.path.string() + "\n");
  };
  if (const auto here = already_here(ref, models)) return use(*here);
  if (options.offline || access.offline) {
    if (ref.url.empty() && ref.quant.empty())  // whichever quantization was pulled
      if (const auto here = hub::find_model(models, ref.repo)) return use(*here);
    fail(ErrorKind::io, options.model, ": is not on this machine, and nothing is fetched (", options.offline ? "--offline" : "HF_HUB_OFFLINE", ")");
  }
  std::vector<Piece> pieces;
  if (ref.url.empty()) {
    const std::vector<hub::Choice> choices = hub::choices_of(hub::hub_files(access, ref.repo, http_options()));
    const hub::Choice& choice = hub::choose(choices, ref.quant, ref.repo);
    if (const auto same = same_file(choice, models)) return use(*same);
    note(concat(ref.repo, ":", choice.quant, ", ", format_size(choice.size()), choice.parts.size() > 1 ? concat(" in ", choice.parts.size(), " parts") : ""));
    pieces = pieces_of_repo(access, ref.repo, choice, folders.models);
  } else {
    pieces = pieces_of_url(access, ref.url, folders.models);
  }
  pull_pieces(pieces, options);
  const fs::path first = pieces.front().request.destination;
  static_cast<void>(GgufFile::open(first));  // what is damaged is told now
  print(first.string() + "\n");
}

// ---- list and rm -------------------------------------------------------------------------------

Json to_json(const hub::LocalModel& model) {
  Json out{{"name", model.name}, {"bytes", model.n_bytes}, {"owner", hub::owner_name(model.owner)}, {"path", model.path.string()}};
  if (model.n_done) out["bytes_done"] = *model.n_done;
  return out;
}

void run_list(bool json) {
  const hub::ModelFolders folders = hub::folders_of_environment();
  const std::vector<hub::LocalModel> models = hub::local_models(folders);
  if (json) {
    Json out = Json::array();
    for (const hub::LocalModel& model : models) out.push_back(to_json(model));
    return print_json(out);
  }
  if (models.empty()) note("no models here; duet pull USER/REPO:QUANT gets one into " + folders.models.string());
  size_t width = 0;
  for (const hub::LocalModel& model : models) width = std::max(width, model.name.size());
  for (const hub::LocalModel& model : models) {
    std::string state = hub::owner_name(model.owner);
    if (model.n_done) state = model.n_bytes > 0 ? concat("partial ", 100 * *model.n_done / model.n_bytes, " %") : "partial";
    const std::string size = format_size(model.n_bytes);
    print(one_line(model.name + std::string(width - model.name.size() + 2, ' ') + std::string(10 - std::min<size_t>(10, size.size()), ' ') + size + "  " + state +
                   std::string(12 - std::min<size_t>(12, state.size()), ' ') + " " + model.path.string()) +
          "\n");
  }
}

void run_rm(const std::string& name) {
  const hub::ModelFolders folders = hub::folders_of_environment();
  std::vector<hub::LocalModel> models = hub::local_models(folders);
  for (hub::LocalModel& model : models) model.n_done.reset();  // what is not complete can be removed, too
  const std::optional<hub::LocalModel> model = hub::find_model(models, name);
  if (!model) fail(ErrorKind::io, name, ": no model of that name is here; duet list shows those that are");
  hub::remove_model(folders, *model);
  note("removed " + model->name);
}

}  // namespace

void add_pull(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("pull", "Get a model from the Hugging Face hub or a URL; prints the path of its file");
  command.description(command.get_description() +
                      "\nGoes on where an earlier attempt stopped. Files are kept in $DUET_MODELS [default: ~/.local/share/duet/models]; what Ollama,"
                      "\nLM Studio or the hub's own tools have already is used where it lies. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count.");
  auto options = std::make_shared<PullOptions>();
  command.add_option("MODEL", options->model, "USER/REPO, USER/REPO:QUANT [default: Q4_K_M] or the URL of a .gguf file")->required();
  command.add_option("--connections", options->connections, "Ranges fetched at the same time")
      ->check(whole_number(1, 16))
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--offline", options->offline, "Only look for it on this machine");
  add_environment(command);
  command.callback([options] { run_pull(*options); });
}

void add_list(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("list", "The models on this machine, of duet and of other programs; their names stand for MODEL everywhere");
  auto json = std::make_shared<bool>(false);
  command.add_flag("--json", *json, "One JSON document: [{name, bytes, owner, path}]");
  add_environment(command);
  command.callback([json] { run_list(*json); });
}

void add_rm(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("rm", "Remove a model that duet has pulled, or has begun to");
  auto name = std::make_shared<std::string>();
  command.add_option("MODEL", *name, "Its name")->required();
  add_environment(command);
  command.callback([name] { run_rm(*name); });
}

}  // namespace duet::cli
