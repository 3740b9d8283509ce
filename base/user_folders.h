// Where a user's files belong (XDG base directories). A variable that is unset, empty or not an absolute path
// counts as not set. Nothing is created.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace duet {

// $HOME, else what the system says of the user. Error(io) when neither tells.
std::filesystem::path home_folder();
std::filesystem::path state_folder();  // $XDG_STATE_HOME or ~/.local/state, and there duet/
std::filesystem::path data_folder();   // $XDG_DATA_HOME or ~/.local/share, and there duet/
std::filesystem::path cache_folder();  // $XDG_CACHE_HOME or ~/.cache, which programs share

// The value of an environment variable; nothing when it is unset or empty.
std::optional<std::string> environment(const char* name);
// "~" and "~/..." become paths below home_folder().
std::filesystem::path expand_home(const std::string& path);

}  // namespace duet
