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

#include "base/error.h"
#include "base/units.h"
#include "cli/console.h"

namespace duet::cli {
namespace {

constexpr uint64_t kMaxTextBytes = uint64_t{1} << 30;

std::string variable_of(const CLI::Option& option) {
  if (option.get_lnames().empty()) return {};
  std::string name = option.get_lnames().front();
  if (name == "help" || name == "version") return {};
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) {
    return c == '-' ? '_' : static_cast<char>(std::toupper(c));
  });
  return "DUET_" + name;
}

// Applied before the command line is read, so that a flag given there overrides it.
void take_from_environment(CLI::Option& option) {
  const std::string variable = variable_of(option);
  const char* value = variable.empty() ? nullptr : std::getenv(variable.c_str());
  if (value == nullptr || *value == '\0') return;
  try {
    option.add_result(std::string(value));
    option.run_callback();
  } catch (const CLI::Error& e) {
    fail(ErrorKind::usage, "environment variable ", variable, "=", value, ": ", e.what());
  }
  option.clear();
  option.required(false);
}

// To the end, from anything that can be read: files, pipes, terminals.
std::string read_all(int fd, const std::string& name) {
  std::string text;
  std::vector<char> buffer(1 << 16);
  for (;;) {
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR && !interrupted()) continue;
    if (n < 0 && errno == EINTR) fail(ErrorKind::cancelled, "interrupted while reading ", name);
    if (n < 0) fail(ErrorKind::io, name, ": cannot read: ", std::strerror(errno));
    if (n == 0) return text;
    text.append(buffer.data(), static_cast<size_t>(n));
    if (text.size() > kMaxTextBytes) fail(ErrorKind::usage, name, ": more than 1 GiB of text");
  }
}

}  // namespace

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

void add_threads_option(CLI::App& command, int& n_threads) {
  command
      .add_option("-t,--threads", n_threads,
                  "Compute threads [default: performance cores allowed by cpuset and cgroup]")
      ->check(CLI::Range(1, 1024).description(""))
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
  command.footer("Every --flag-name can also be set by the environment variable DUET_FLAG_NAME.");
  command.preparse_callback([&command](size_t) {
    for (CLI::Option* option : command.get_options()) take_from_environment(*option);
  });
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
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(ErrorKind::io, path, ": cannot open: ", std::strerror(errno));
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
