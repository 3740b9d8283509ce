#include "cli/options.h"

#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/resumable_file.h"
#include "base/units.h"
#include "cli/build_info.h"
#include "cli/config_file.h"
#include "cli/console.h"

namespace duet::cli {
namespace {

constexpr uint64_t kMaxTextBytes = uint64_t{1} << 30;

// The long name of a flag that may be set elsewhere than on the command line.
std::string settable_name(const CLI::Option& option) {
  if (option.get_lnames().empty()) return {};
  const std::string& name = option.get_lnames().front();
  return name == "help" || name == "version" ? std::string() : name;
}

// Its variable, where it is set and not empty.
const char* environment_of(const CLI::Option& option, std::string& variable) {
  variable = settable_name(option);
  if (variable.empty()) return nullptr;
  std::transform(variable.begin(), variable.end(), variable.begin(), [](unsigned char c) { return c == '-' ? '_' : static_cast<char>(std::toupper(c)); });
  variable = "DUET_" + variable;
  const char* value = std::getenv(variable.c_str());
  return value == nullptr || *value == '\0' ? nullptr : value;
}

// What has been set so far, beginning with the command line: of less weight comes neither again nor what excludes it.
using Settled = std::set<const CLI::Option*>;

bool is_open(const CLI::Option& option, const Settled& settled) {
  const auto excluded = option.get_excludes();
  return !settled.contains(&option) && std::none_of(excluded.begin(), excluded.end(), [&](const CLI::Option* other) { return settled.contains(other); });
}

// As a flag of the command line would, but not counted as one.
void set_option(CLI::Option& option, const std::vector<std::string>& values, Settled& settled) {
  for (const std::string& value : values) option.add_result(value);
  option.run_callback();
  option.clear();
  settled.insert(&option);
}

void take_from_environment(CLI::App& command, Settled& settled) {
  for (CLI::Option* option : command.get_options()) {
    std::string variable;
    const char* value = environment_of(*option, variable);
    if (value == nullptr || !is_open(*option, settled)) continue;
    try {
      set_option(*option, {value}, settled);
    } catch (const CLI::Error& e) {
      fail(ErrorKind::usage, "environment variable ", variable, "=", value, ": ", e.what());
    }
  }
}

CLI::Option* flag_of(CLI::App& command, const std::string& name) {
  for (CLI::Option* option : command.get_options())
    if (settable_name(*option) == name && name != "config") return option;
  return nullptr;
}

// A line that no command knows is a mistake, whichever command runs.
void check_config(CLI::App& app, const std::vector<ConfigEntry>& entries, const std::string& path) {
  const auto commands = app.get_subcommands([](CLI::App*) { return true; });
  for (const ConfigEntry& entry : entries) {
    bool is_command = entry.section.empty(), known = false;
    for (CLI::App* command : commands) {
      if (!entry.section.empty() && command->get_name() != entry.section) continue;
      is_command = true;
      known |= flag_of(*command, entry.key) != nullptr;
    }
    if (!is_command) fail(ErrorKind::usage, path, ":", entry.line, ": there is no command ", quote(entry.section), " for [", entry.section, "]");
    if (!known) fail(ErrorKind::usage, path, ":", entry.line, ": ", entry.section.empty() ? "no command has" : concat("duet ", entry.section, " has no"), " flag --", entry.key);
  }
}

void take_from_config(CLI::App& command, const std::string& given, Settled& settled) {
  const std::filesystem::path path = given.empty() ? default_config_path() : std::filesystem::path(given);
  std::error_code ec;
  if (path.empty() || (given.empty() && !std::filesystem::exists(path, ec))) return;
  const std::vector<ConfigEntry> entries = read_config(path);
  check_config(*command.get_parent(), entries, path.string());
  // Those of the command's own section first: they beat the general ones.
  for (const bool own : {true, false})
    for (const ConfigEntry& entry : entries) {
      CLI::Option* option = entry.section == (own ? command.get_name() : "") ? flag_of(command, entry.key) : nullptr;
      if (option == nullptr || !is_open(*option, settled)) continue;
      try {
        set_option(*option, entry.values, settled);
      } catch (const CLI::Error& e) {
        fail(ErrorKind::usage, path.string(), ":", entry.line, ": ", e.what());
      }
    }
}

// An option and one that it needs.
using Needs = std::vector<std::pair<CLI::Option*, CLI::Option*>>;

// Taken from CLI11, which knows only what is on the command line.
Needs take_needs(CLI::App& command) {
  Needs needs;
  for (CLI::Option* option : command.get_options())
    for (CLI::Option* other : option->get_needs()) {
      needs.emplace_back(option, other);
      option->remove_needs(other);
    }
  return needs;
}

// Of the command line only: a setting that does not apply changes nothing.
void check_needs(const Needs& needs, const Settled& settled) {
  for (const auto& [option, other] : needs)
    if (option->count() > 0 && !settled.contains(other)) fail(ErrorKind::usage, option->get_name(), " belongs to ", other->get_name(), ", which is not given");
}

// A named pipe is waited for.
int open_to_read(const std::string& path) {
  for (;;) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd >= 0) return fd;
    if (errno != EINTR) fail(ErrorKind::io, path, ": cannot open: ", std::strerror(errno));
    if (interrupted()) fail(ErrorKind::cancelled, "interrupted while waiting for ", path);
  }
}

// To the end, from anything that can be read: files, pipes, terminals.
std::string read_all(int fd, const std::string& name) {
  std::string text;
  std::vector<char> buffer(1 << 16);
  for (;;) {
    if (interrupted()) fail(ErrorKind::cancelled, "interrupted while reading ", name);
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(ErrorKind::io, name, ": cannot read: ", std::strerror(errno));
    if (n == 0) return text;
    text.append(buffer.data(), static_cast<size_t>(n));
    if (text.size() > kMaxTextBytes) fail(ErrorKind::usage, name, ": more than 1 GiB of text");
  }
}

}  // namespace

std::function<std::string(const std::string&)> whole_number(uint64_t min, uint64_t max) {
  return [=](const std::string& text) -> std::string {
    char* end = nullptr;
    errno = 0;
    const uint64_t n = std::strtoull(text.c_str(), &end, 0);  // as CLI11, which does not look at errno and takes -1 for 2^64 - 1
    const bool is_number = !text.empty() && std::isdigit(static_cast<unsigned char>(text[0])) != 0 && *end == '\0' && errno == 0;
    return is_number && n >= min && n <= max ? "" : concat(quote(text), " is not a whole number from ", min, " to ", max);
  };
}

void add_split_option(CLI::App& command, std::string& size) {
  command.add_option("--split-max-size", size,
                     "Write files of at most about so many bytes (4G, 900MB), OUT-00001-of-0000N.gguf, if more are needed")
      ->type_name("SIZE");
}

uint64_t split_bytes(const std::string& size) {
  if (size.empty()) return 0;
  const uint64_t n = parse_size(size);
  if (n == 0) fail(ErrorKind::usage, "--split-max-size: files of 0 bytes hold nothing");
  return n;
}

void add_lora_option(CLI::App& command, std::vector<std::string>& loras, const std::string& description) {
  command.add_option("--lora", loras, description + ", DIR=0.5: at that strength; may be given several times")->type_name("DIR[=SCALE]");
}

void add_resume_option(CLI::App& command, bool& resume) {
  command.add_flag("--resume", resume,
                   "Go on with what a run that was cut off has left (OUT.part), checking it; keep what is done when this one is cut off");
}

void with_resumption(const std::string& output, bool resume, const std::function<void()>& work) {
  try {
    work();
  } catch (const Error&) {
    std::error_code ec;
    if (resume && std::filesystem::exists(part_file_of(output), ec)) note(concat(part_file_of(output).string(), " is kept; the same command with --resume goes on"));
    throw;
  }
}

std::string program_name() { return concat("duet " DUET_VERSION " ", build_commit()); }

void add_threads_option(CLI::App& command, int& n_threads) {
  command
      .add_option("-t,--threads", n_threads,
                  "Compute threads [default: performance cores allowed by cpuset and cgroup]")
      ->check(whole_number(1, 1024))
      ->type_name("N");
}

void add_placement_options(CLI::App& command, PinMode& pin, NumaMode& numa) {
  const auto set_pin = [&pin](const std::string& name) {
    pin = name == "on" ? PinMode::on : name == "off" ? PinMode::off : PinMode::automatic;
  };
  command
      .add_option_function<std::string>(
          "--pin", set_pin, "Bind threads: on: one CPU each; auto: to performance cores, and to memory nodes, where kinds differ")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->type_name("MODE")
      ->default_str("auto");
  const auto set_numa = [&numa](const std::string& name) {
    numa = name == "interleave" ? NumaMode::interleave : name == "off" ? NumaMode::off : NumaMode::automatic;
  };
  command
      .add_option_function<std::string>("--numa", set_numa, "Spread memory over nodes; auto: where there are several")
      ->check(CLI::IsMember({"auto", "interleave", "off"}))
      ->type_name("MODE")
      ->default_str("auto");
}

void add_environment(CLI::App& command) {
  auto config = std::make_shared<std::string>();
  command.add_option("--config", *config, "File of settings [default: ~/.config/duet/config.toml, if there is one]")->type_name("FILE");
  command.footer("Every --flag-name can also be set by the environment variable DUET_FLAG_NAME,\nor by flag-name = value in the configuration file.");
  command.preparse_callback([&command](size_t) {
    std::string variable;
    for (CLI::Option* option : command.get_options())
      if (environment_of(*option, variable) != nullptr) option->required(false);
  });
  command.parse_complete_callback([&command, config, needs = take_needs(command)] {
    Settled settled;
    for (const CLI::Option* option : command.get_options())
      if (option->count() > 0) settled.insert(option);
    take_from_environment(command, settled);
    take_from_config(command, *config, settled);
    check_needs(needs, settled);
  });
}

std::string joined(const std::vector<std::string>& words, const std::string& between) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : between) + word;
  return out;
}

std::vector<int32_t> parse_ids(const std::string& text) {
  std::string spaced = text;
  for (char& c : spaced)
    if (c == ',' || c == '[' || c == ']' || c == '\n' || c == '\t' || c == '\r') c = ' ';
  std::vector<int32_t> ids;
  const char* p = spaced.data();
  const char* end = p + spaced.size();
  for (;;) {
    while (p < end && *p == ' ') ++p;
    if (p == end) return ids;
    int32_t id = 0;
    const auto [next, code] = std::from_chars(p, end, id);
    if (code != std::errc{} || (next < end && *next != ' '))
      fail(ErrorKind::usage, "--ids: '", std::string(p, std::find(p, end, ' ')),
           "' is not a token id; write them like 1,2,3");
    ids.push_back(id);
    p = next;
  }
}

std::string read_text(const std::string& path) {
  if (path == "-") return read_all(STDIN_FILENO, "standard input");
  const int fd = open_to_read(path);
  try {
    std::string text = read_all(fd, path);
    ::close(fd);
    return text;
  } catch (...) {
    ::close(fd);
    throw;
  }
}

}  // namespace duet::cli
