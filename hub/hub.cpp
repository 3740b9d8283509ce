#include "hub/hub.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <filesystem>
#include <map>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/user_folders.h"

namespace duet::hub {
namespace {

constexpr uint64_t kMaxListing = 32 << 20;
constexpr int kMaxPages = 100;
constexpr size_t kMaxSplits = 1000;

std::string upper(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return out;
}

bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= 96 && text.front() != '.' && text.front() != '-' &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.'; });
}

// Nothing that leads out of a folder, hides a file or confuses a terminal.
bool is_safe_path(std::string_view path) {
  if (path.empty() || path.size() > 1024) return false;
  for (size_t at = 0; at <= path.size();) {
    const size_t slash = std::min(path.find('/', at), path.size());
    const std::string_view part = path.substr(at, slash - at);
    if (part.empty() || part.front() == '.' || part.size() > 240) return false;
    at = slash + 1;
  }
  return std::all_of(path.begin(), path.end(), [](unsigned char c) { return c >= 0x20 && c != 0x7f && c != '\\'; });
}

bool ends_with_gguf(std::string_view path) { return upper(path).ends_with(".GGUF"); }

bool is_sha256(std::string_view text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

// One entry of a listing; nothing for what is no GGUF file.
std::optional<HubFile> parse_entry(const Json& entry, const std::string& source) {
  if (!entry.is_object()) fail(ErrorKind::format, source, ": not a listing of files");
  HubFile file;
  file.path = json_get<std::string>(entry, "path", source);
  if (json_get_or<std::string>(entry, "type", "file", source) != "file" || !ends_with_gguf(file.path)) return std::nullopt;
  if (!is_safe_path(file.path)) fail(ErrorKind::format, source, ": will not make a file named ", quote(file.path));
  file.size = json_get<uint64_t>(entry, "size", source);
  if (const auto lfs = entry.find("lfs"); lfs != entry.end() && lfs->is_object()) {
    file.sha256 = json_get_or<std::string>(*lfs, "oid", "", source);
    file.size = json_get_or<uint64_t>(*lfs, "size", file.size, source);
    if (!file.sha256.empty() && !is_sha256(file.sha256)) fail(ErrorKind::format, source, ": ", quote(file.sha256), " is no SHA-256");
  }
  return file;
}

std::string stem_of(const std::string& path) { return std::filesystem::path(path).stem().string(); }

bool is_quant(std::string_view word) {
  if (word.starts_with("IQ") || word.starts_with("TQ")) word.remove_prefix(1);
  if (word.size() >= 2 && word[0] == 'Q' && std::isdigit(static_cast<unsigned char>(word[1])) != 0) return true;
  return word == "F16" || word == "F32" || word == "BF16" || word == "FP16" || word == "MXFP4";
}

std::string quants_of(const std::vector<Choice>& choices) {
  std::string out;
  for (const Choice& choice : choices) out += (out.empty() ? "" : ", ") + choice.quant;
  return out;
}

// "1" of "1", "true" or "yes".
bool is_on(const char* variable) {
  const std::string value = upper(environment(variable).value_or("0"));
  return value == "1" || value == "TRUE" || value == "YES" || value == "ON";
}

std::string read_token() {
  const std::optional<std::string> given = environment("HF_TOKEN");
  std::string token = given.value_or("");
  if (!given) {
    const auto home = environment("HF_HOME");
    const std::filesystem::path folder = home ? std::filesystem::path(*home) : cache_folder() / "huggingface";
    const std::filesystem::path file = environment("HF_TOKEN_PATH").value_or((folder / "token").string());
    std::error_code ec;
    if (std::filesystem::is_regular_file(file, ec)) token = read_file(file, 4096);
  }
  while (!token.empty() && static_cast<unsigned char>(token.back()) <= ' ') token.pop_back();
  for (const char c : token)
    if (static_cast<unsigned char>(c) <= ' ' || static_cast<unsigned char>(c) >= 0x7f) fail(ErrorKind::usage, "HF_TOKEN: holds characters that no token has");
  return token;
}

}  // namespace

ModelRef parse_model_ref(const std::string& text) {
  std::string rest = text;
  for (const char* prefix : {"https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf:"})
    if (rest.starts_with(prefix) && std::count(rest.begin() + static_cast<ptrdiff_t>(std::string_view(prefix).size()), rest.end(), '/') == 1) rest.erase(0, std::string_view(prefix).size());
  if (!url_host(rest).empty()) {
    const std::string path = rest.substr(0, rest.find_first_of("?#"));
    const std::string name = path.substr(path.rfind('/') + 1);
    if (!ends_with_gguf(name) || !is_safe_path(name) || name.find('%') != std::string::npos)
      fail(ErrorKind::usage, quote(text), ": a URL must end with the name of a .gguf file");
    return {rest, "", ""};
  }
  ModelRef out;
  const size_t colon = rest.find(':'), slash = rest.find('/');
  out.repo = rest.substr(0, colon);
  if (colon != std::string::npos) out.quant = rest.substr(colon + 1);
  const bool two = slash != std::string::npos && slash < out.repo.size() && out.repo.find('/', slash + 1) == std::string::npos;
  if (!two || !is_name(out.repo.substr(0, slash)) || !is_name(out.repo.substr(slash + 1)) || (colon != std::string::npos && !is_safe_path(out.quant)))
    fail(ErrorKind::usage, quote(text), ": is neither USER/REPOSITORY, USER/REPOSITORY:QUANT nor the URL of a .gguf file");
  return out;
}

HubAccess hub_access_of_environment() {
  HubAccess out;
  if (const auto endpoint = environment("HF_ENDPOINT")) out.endpoint = *endpoint;
  while (out.endpoint.ends_with('/')) out.endpoint.pop_back();
  if (url_host(out.endpoint).empty()) fail(ErrorKind::usage, "HF_ENDPOINT: ", quote(out.endpoint), " is no http(s) URL");
  out.token = read_token();
  out.offline = is_on("HF_HUB_OFFLINE");
  return out;
}

std::string hub_url(const HubAccess& access, const std::string& repo, const std::string& path) {
  return access.endpoint + "/" + url_encode(repo) + "/resolve/main/" + url_encode(path);
}

std::vector<HubFile> parse_listing(const std::string& page, const std::string& source) {
  const Json listing = parse_json(page, source);
  if (!listing.is_array()) fail(ErrorKind::format, source, ": not a listing of files");
  std::vector<HubFile> out;
  for (const Json& entry : listing)
    if (std::optional<HubFile> file = parse_entry(entry, source)) out.push_back(std::move(*file));
  return out;
}

std::vector<HubFile> hub_files(const HubAccess& access, const std::string& repo, const HttpOptions& options) {
  std::vector<HubFile> out;
  std::string url = access.endpoint + "/api/models/" + url_encode(repo) + "/tree/main?recursive=true";
  for (int page = 0; !url.empty(); ++page) {
    if (page == kMaxPages) fail(ErrorKind::format, url, ": the listing has no end");
    const HttpResponse response = http_get({url, access.token}, kMaxListing, options);
    for (HubFile& file : parse_listing(response.body, url)) out.push_back(std::move(file));
    url = response.head.next_page;
    if (!url.empty() && !url.starts_with(access.endpoint + "/")) fail(ErrorKind::format, quote(url), ": the listing goes on at another server");
  }
  return out;
}

uint64_t Choice::size() const {
  uint64_t out = 0;
  for (const HubFile& part : parts) out += part.size;
  return out;
}

std::optional<SplitName> parse_split_name(std::string_view stem) {
  constexpr size_t kTail = 15;  // -00001-of-00005
  if (stem.size() <= kTail) return std::nullopt;
  const std::string_view tail = stem.substr(stem.size() - kTail);
  SplitName out{std::string(stem.substr(0, stem.size() - kTail)), 0, 0};
  const auto number = [&](size_t at, uint32_t& value) {
    const std::string_view digits = tail.substr(at, 5);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + 5, value);
    return error == std::errc() && end == digits.data() + 5;
  };
  if (tail[0] != '-' || tail.substr(6, 4) != "-of-" || !number(1, out.number) || !number(10, out.count)) return std::nullopt;
  if (out.number == 0 || out.number > out.count || out.count > kMaxSplits) return std::nullopt;
  return out;
}

std::string split_name(const std::string& stem, uint32_t number, uint32_t count) {
  const auto digits = [](uint32_t n) {
    const std::string text = std::to_string(n);
    return std::string(5 - std::min<size_t>(5, text.size()), '0') + text;
  };
  return stem + "-" + digits(number) + "-of-" + digits(count);
}

std::string quant_of_name(std::string_view stem) {
  size_t end = stem.size();
  for (;;) {
    const size_t dot = stem.find_last_of("-.", end == 0 ? 0 : end - 1);
    const size_t begin = dot == std::string_view::npos ? 0 : dot + 1;
    const std::string word = upper(stem.substr(begin, end - begin));
    if (is_quant(word)) {
      const std::string_view before = stem.substr(0, dot == std::string_view::npos ? 0 : dot);
      return (upper(before).ends_with("I1") ? "i1-" : upper(before).ends_with("-UD") ? "UD-" : "") + word;
    }
    if (dot == std::string_view::npos || dot == 0) return "";
    end = dot;
  }
}

std::vector<Choice> choices_of(const std::vector<HubFile>& files) {
  struct Group {
    std::map<uint32_t, HubFile> parts;
    uint32_t count = 1;
  };
  std::map<std::string, Group> groups;  // by path without part number and ending
  for (const HubFile& file : files) {
    const std::filesystem::path path(file.path);
    const std::string folder = path.has_parent_path() ? path.parent_path().string() + "/" : "";
    const std::optional<SplitName> split = parse_split_name(stem_of(file.path));
    if (upper(stem_of(file.path)).starts_with("MMPROJ")) continue;  // of pictures; no model
    Group& group = groups[folder + (split ? concat(split->stem, '*', split->count) : stem_of(file.path))];
    group.count = split ? split->count : 1;
    group.parts[split ? split->number : 1] = file;
  }
  std::vector<Choice> out;
  for (auto& [name, group] : groups) {
    Choice choice;
    for (auto& [number, file] : group.parts) choice.parts.push_back(std::move(file));
    choice.n_missing = group.count - choice.parts.size();
    const std::filesystem::path path(name.substr(0, name.find('*')));
    choice.quant = quant_of_name(path.filename().string());
    if (choice.quant.empty()) choice.quant = quant_of_name(path.parent_path().filename().string());
    if (choice.quant.empty()) choice.quant = path.filename().string();
    out.push_back(std::move(choice));
  }
  return out;
}

const Choice& choose(const std::vector<Choice>& choices, const std::string& quant, const std::string& repo) {
  if (choices.empty()) fail(ErrorKind::io, repo, ": has no GGUF files; convert its safetensors with duet convert, or look for a repository whose name ends with -GGUF");
  const std::string wanted = upper(quant.empty() ? "Q4_K_M" : quant);
  std::vector<const Choice*> found;
  for (const Choice& choice : choices) {
    const std::string file = upper(choice.parts.front().path);
    if (upper(choice.quant) == wanted || file == wanted || file == wanted + ".GGUF") found.push_back(&choice);
  }
  if (found.empty() && quant.empty() && choices.size() == 1) found.push_back(&choices.front());
  if (found.empty())
    fail(ErrorKind::usage, repo, ": has no ", quant.empty() ? "Q4_K_M" : quant, "; choose one: ", repo, ":QUANT with ", quants_of(choices));
  if (found.size() > 1) {
    std::string names;
    for (const Choice* choice : found) names += (names.empty() ? "" : ", ") + choice->parts.front().path;
    fail(ErrorKind::usage, repo, ": several files are ", found.front()->quant, "; choose one: ", repo, ":FILE with ", names);
  }
  if (found.front()->n_missing > 0)
    fail(ErrorKind::io, repo, ": ", found.front()->n_missing, " parts of ", found.front()->quant, " are missing in the repository");
  return *found.front();
}

}  // namespace duet::hub
