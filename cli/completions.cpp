// duet completions: for bash, zsh and fish.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "base/error.h"
#include "cli/console.h"
#include "cli/flag_table.h"
#include "cli/options.h"

namespace duet::cli {
namespace {

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size()) text.replace(at, what.size(), by);
  return text;
}

// In single quotes, for any of the shells.
std::string quoted(const std::string& text) { return "'" + replaced(text, "'", "'\\''") + "'"; }

// ---- bash --------------------------------------------------------------------------------------

// Of flags and arguments whose values are not files; a case of "verb flag".
std::string bash_values(const Verb& verb) {
  std::string out;
  for (const Flag& flag : verb.flags) {
    if (flag.is_argument || flag.value.empty()) continue;
    std::vector<std::string> patterns;
    for (const std::string& name : flag.names) patterns.push_back("'" + verb.name + " " + name + "'");
    const std::string action = !flag.choices.empty() ? "COMPREPLY=($(compgen -W " + quoted(joined(flag.choices, " ")) + " -- \"$cur\"))" : "_duet_files";
    out += "    " + joined(patterns, "|") + ") " + action + "; return ;;\n";
  }
  return out;
}

// ---- zsh ---------------------------------------------------------------------------------------

// _arguments takes [ ] : for itself.
std::string zsh_text(const std::string& text) {
  std::string out = replaced(replaced(text, "\\", "\\\\"), ":", "\\:");
  return replaced(replaced(out, "[", "\\["), "]", "\\]");
}

std::string zsh_action(const Flag& flag) {
  if (flag.choices.empty()) return "_files";
  return "(" + joined(flag.choices, " ") + ")";
}

std::string zsh_specification(const Flag& flag) {
  const std::string value = flag.value.empty() ? "" : ":" + zsh_text(flag.value) + ":" + zsh_action(flag);
  if (flag.is_argument) return "    " + quoted((flag.repeated ? "*:" : ":") + zsh_text(flag.names[0]) + ":" + zsh_action(flag)) + "\n";
  std::string out;
  for (const std::string& name : flag.names) {
    const std::string others = flag.repeated ? "*" : flag.names.size() > 1 ? "(" + joined(flag.names, " ") + ")" : "";
    out += "    " + quoted(others + name + "[" + zsh_text(flag.description) + "]" + value) + "\n";
  }
  return out;
}

// ---- fish --------------------------------------------------------------------------------------

std::string fish_text(const std::string& text) { return "'" + replaced(replaced(text, "\\", "\\\\"), "'", "\\'") + "'"; }

std::string fish_line(const Verb& verb, const Flag& flag) {
  std::string out = "complete -c duet -n " + (verb.name.empty() ? std::string("__fish_use_subcommand") : "'__fish_seen_subcommand_from " + verb.name + "'");
  for (const std::string& name : flag.names) out += name.starts_with("--") ? " -l " + name.substr(2) : " -s " + name.substr(1);
  if (!flag.value.empty()) out += flag.choices.empty() ? " -r -F" : " -x -a " + fish_text(joined(flag.choices, " "));
  return out + " -d " + fish_text(flag.description) + "\n";
}

struct Completions {
  std::string shell;
};

void run_completions(const Completions& options, const CLI::App& app) {
  const std::vector<Verb> verbs = flag_table(app);
  print(options.shell == "bash" ? bash_completion(verbs) : options.shell == "zsh" ? zsh_completion(verbs) : fish_completion(verbs));
}

}  // namespace

std::string bash_completion(const std::vector<Verb>& verbs) {
  std::string names, flags, values;
  for (const Verb& verb : verbs) {
    if (!verb.name.empty()) names += (names.empty() ? "" : " ") + verb.name;
    std::vector<std::string> all;
    for (const Flag& flag : verb.flags)
      if (!flag.is_argument) all.insert(all.end(), flag.names.begin(), flag.names.end());
    flags += "    '" + verb.name + "') flags=" + quoted(joined(all, " ")) + " ;;\n";
    values += bash_values(verb);
  }
  return concat("# bash completion for duet, made by `duet completions bash`\n"
                "_duet_files() { compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- \"$cur\")); }\n"
                "_duet() {\n"
                "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb= flags= i\n"
                "  COMPREPLY=()\n"
                "  for ((i = 1; i < COMP_CWORD; ++i)); do\n"
                "    if [[ ${COMP_WORDS[i]} != -* ]]; then verb=${COMP_WORDS[i]}; break; fi\n"
                "  done\n"
                "  case \"$verb $prev\" in\n",
                values,
                "  esac\n"
                "  case \"$verb\" in\n",
                flags,
                "  esac\n"
                "  if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W \"$flags\" -- \"$cur\"))\n"
                "  elif [[ -z $verb ]]; then COMPREPLY=($(compgen -W ", quoted(names), " -- \"$cur\"))\n"
                "  else _duet_files\n"
                "  fi\n"
                "}\n"
                "complete -F _duet duet\n");
}

std::string zsh_completion(const std::vector<Verb>& verbs) {
  std::string names, cases;
  for (const Verb& verb : verbs) {
    std::string flags;
    for (const Flag& flag : verb.flags) flags += zsh_specification(flag);
    if (!verb.name.empty()) names += "    " + quoted(verb.name + ":" + replaced(verb.description, ":", "\\:")) + "\n";
    cases += "  '" + verb.name + "') specifications=(\n" + flags + "  ) ;;\n";
  }
  return concat("#compdef duet\n"
                "# zsh completion for duet, made by `duet completions zsh`\n"
                "_duet() {\n"
                "  local -a specifications verbs\n"
                "  local verb=''\n"
                "  if (( CURRENT > 2 )) && [[ ${words[2]} != -* ]]; then verb=${words[2]}; fi\n"
                "  verbs=(\n", names, "  )\n"
                "  case $verb in\n", cases, "  esac\n"
                "  if [[ -z $verb ]]; then\n"
                "    _arguments $specifications && return\n"
                "    _describe command verbs\n"
                "  else\n"
                "    shift words\n"
                "    (( CURRENT-- ))\n"
                "    _arguments $specifications\n"
                "  fi\n"
                "}\n"
                "if [[ $funcstack[1] == _duet ]]; then _duet \"$@\"; else compdef _duet duet; fi\n");
}

std::string fish_completion(const std::vector<Verb>& verbs) {
  std::string out = "# fish completion for duet, made by `duet completions fish`\n";
  for (const Verb& verb : verbs) {
    if (!verb.name.empty()) out += "complete -c duet -f -n __fish_use_subcommand -a " + verb.name + " -d " + fish_text(verb.description) + "\n";
    for (const Flag& flag : verb.flags)
      if (!flag.is_argument) out += fish_line(verb, flag);
  }
  return out;
}

void add_completions(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("completions", "Print a shell's completion script")->group("");
  auto options = std::make_shared<Completions>();
  command.add_option("SHELL", options->shell, "bash, zsh or fish")->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command.callback([options, &app] { run_completions(*options, app); });
}

}  // namespace duet::cli
