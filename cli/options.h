// Options that several commands share.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/topology.h"

namespace CLI {
class App;
}

namespace duet::cli {

// The check of an option that takes a number without a sign. CLI11's own makes other numbers fit.
std::function<std::string(const std::string&)> whole_number(uint64_t min, uint64_t max = UINT64_MAX);

// --threads. 0, when it is not given, means HostCores::usable().
void add_threads_option(CLI::App& command, int& n_threads);

// --split-max-size, and what it says in bytes (0: nothing). Error(usage).
void add_split_option(CLI::App& command, std::string& size);
uint64_t split_bytes(const std::string& size);

// --lora, which may be given several times.
void add_lora_option(CLI::App& command, std::vector<std::string>& loras, const std::string& description);

// --resume; `work` under it: says what remains when it fails.
void add_resume_option(CLI::App& command, bool& resume);
void with_resumption(const std::string& output, bool resume, const std::function<void()>& work);
// Which program this is, to go on only with what it has begun itself.
std::string program_name();

// --pin and --numa.
void add_placement_options(CLI::App& command, PinMode& pin, NumaMode& numa);

// Lets the variable DUET_<FLAG> (DUET_KV_TYPE for --kv-type), or a line of the configuration file
// (cli/config_file.h, --config) stand for every flag of the command that has a long name, help excepted:
// flag > environment > file > default. A value that does not fit is Error(usage) naming the variable or
// the line. What was set where more counts drops what it excludes; an option of the command line that needs
// another is Error(usage) where no source has set that. Call after the last option has been added.
void add_environment(CLI::App& command);

std::string joined(const std::vector<std::string>& words, const std::string& between);
// "1,2,3", "1 2 3" or "[1, 2, 3]". Error(usage).
std::vector<int32_t> parse_ids(const std::string& text);
// Whole text file; "-" is standard input. Error(io).
std::string read_text(const std::string& path);

}  // namespace duet::cli
