// All commands with their flags, as CLI11 knows them: what completions and man pages are made from.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace duet::cli {

struct Flag {
  std::vector<std::string> names;    // "-p", "--port"; of an argument: "MODEL"
  std::string description;
  std::string value;                 // "N"; "": takes none
  std::vector<std::string> choices;  // all the values it may have; empty: others
  std::string default_value;
  bool is_argument = false, required = false, repeated = false;
};

struct Verb {
  std::string name, description;
  std::vector<Flag> flags;
};

// Commands that help lists, in its order; first the program itself, without a name.
std::vector<Verb> flag_table(const CLI::App& app);

// Commands that print these; no help lists them.
void add_completions(CLI::App& app);  // duet completions bash|zsh|fish
void add_man(CLI::App& app);          // duet man [PAGE]

std::string bash_completion(const std::vector<Verb>& verbs);
std::string zsh_completion(const std::vector<Verb>& verbs);
std::string fish_completion(const std::vector<Verb>& verbs);

}  // namespace duet::cli
