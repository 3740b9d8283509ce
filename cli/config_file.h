// The configuration file: what flags are where neither the command line nor the environment says.
//
//   # of all commands that have the flag
//   threads = 8
//   [serve]
//   port = 9000
//   api-key = ["one", "two"]
//
// A part of TOML: sections, keys, strings, numbers, true and false, arrays of those on one line, comments.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace duet::cli {

struct ConfigEntry {
  std::string section;  // a command; "": all that have the flag
  std::string key;      // the flag's long name without dashes
  std::vector<std::string> values;
  size_t line = 0;
};

// Error(usage) naming file and line.
std::vector<ConfigEntry> parse_config(const std::string& text, const std::string& name);
// Error(io) when it cannot be read.
std::vector<ConfigEntry> read_config(const std::filesystem::path& path);
// $XDG_CONFIG_HOME/duet/config.toml, else that of ~/.config; "" without a home.
std::filesystem::path default_config_path();

}  // namespace duet::cli
