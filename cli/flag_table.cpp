#include "cli/flag_table.h"

#include <CLI/CLI.hpp>
#include <sstream>

namespace duet::cli {
namespace {

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, at);) out.push_back(part);
  return out;
}

// CLI11 describes a value as "MODE:{auto,on,off}"; where no name was given "TEXT" and the like.
void take_value(Flag& flag, const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const size_t brace = type.find('{'), colon = type.find(':');
  flag.value = type.substr(0, colon);
  if (flag.value.empty() || brace == 0) flag.value = "VALUE";
  if (brace != std::string::npos && type.ends_with('}')) flag.choices = split(type.substr(brace + 1, type.size() - brace - 2), ',');
}

Flag flag_of(const CLI::Option& option) {
  Flag flag{.names = {}, .description = option.get_description(), .value = {}, .choices = {}, .default_value = option.get_default_str()};
  flag.is_argument = option.nonpositional() == false;
  flag.required = option.get_required();
  flag.repeated = option.get_items_expected_max() > 1;
  if (flag.is_argument) flag.names = {option.get_name()};
  for (const std::string& name : option.get_snames()) flag.names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) flag.names.push_back("--" + name);
  if (option.get_items_expected_max() > 0) take_value(flag, option);
  return flag;
}

Verb verb_of(const CLI::App& app, const std::string& name) {
  Verb verb{.name = name, .description = app.get_description(), .flags = {}};
  for (const CLI::Option* option : app.get_options())
    if (!option->get_group().empty()) verb.flags.push_back(flag_of(*option));
  return verb;
}

}  // namespace

std::vector<Verb> flag_table(const CLI::App& app) {
  std::vector<Verb> out{verb_of(app, "")};
  for (const CLI::App* command : app.get_subcommands([](const CLI::App* c) { return !c->get_group().empty(); })) out.push_back(verb_of(*command, command->get_name()));
  return out;
}

}  // namespace duet::cli
