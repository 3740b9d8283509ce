#include "base/user_folders.h"

#include <pwd.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

#include "base/error.h"

namespace duet {
namespace {

namespace fs = std::filesystem;

fs::path xdg(const char* variable, const char* below_home) {
  const std::optional<std::string> value = environment(variable);
  return value && value->starts_with('/') ? fs::path(*value) : home_folder() / below_home;
}

}  // namespace

std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
}

fs::path home_folder() {
  const std::optional<std::string> home = environment("HOME");
  if (home && home->starts_with('/')) return *home;
  struct passwd entry {};
  struct passwd* found = nullptr;
  std::array<char, 4096> text{};
  if (::getpwuid_r(::getuid(), &entry, text.data(), text.size(), &found) == 0 && found != nullptr && entry.pw_dir != nullptr)
    return entry.pw_dir;
  fail(ErrorKind::io, "no home folder is known; set HOME");
}

fs::path state_folder() { return xdg("XDG_STATE_HOME", ".local/state") / "duet"; }
fs::path data_folder() { return xdg("XDG_DATA_HOME", ".local/share") / "duet"; }
fs::path cache_folder() { return xdg("XDG_CACHE_HOME", ".cache"); }

fs::path expand_home(const std::string& path) {
  if (path == "~") return home_folder();
  return path.starts_with("~/") ? home_folder() / path.substr(2) : fs::path(path);
}

}  // namespace duet
