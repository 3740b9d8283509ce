// duet man [PAGE]: manual pages in roff, from the same table as help.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <memory>

#include "base/error.h"
#include "cli/console.h"
#include "cli/flag_table.h"

namespace duet::cli {
namespace {

// Text as roff wants it: no line begins with a dot or an apostrophe.
std::string roff(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\') out += "\\e";
    else if (c == '-') out += "\\-";
    else if ((c == '.' || c == '\'') && (out.empty() || out.back() == '\n')) out += std::string("\\&") + c;
    else out += c;
  }
  return out;
}

std::string bold(const std::string& text) { return "\\fB" + roff(text) + "\\fR"; }
std::string italic(const std::string& text) { return "\\fI" + roff(text) + "\\fR"; }

std::string upper(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return text;
}

std::string title(const std::string& name, const std::string& description) {
  return ".TH " + upper(name) + " 1 \"\" \"duet " DUET_VERSION "\" \"User Commands\"\n.SH NAME\n" + roff(name) + " \\- " + roff(description) + "\n";
}

std::string synopsis(const Verb& verb) {
  std::string out = ".SH SYNOPSIS\n" + bold("duet " + verb.name) + " [" + italic("OPTION") + "]...";
  for (const Flag& flag : verb.flags)
    if (flag.is_argument) out += (flag.required ? " " : " [") + italic(flag.names[0]) + (flag.repeated ? "..." : "") + (flag.required ? "" : "]");
  return out + "\n";
}

std::string flag_text(const Flag& flag) {
  std::string out = ".TP\n";
  for (size_t i = 0; i < flag.names.size(); ++i) out += (i > 0 ? ", " : "") + (flag.is_argument ? italic(flag.names[i]) : bold(flag.names[i]));
  if (!flag.is_argument && !flag.value.empty()) out += " " + italic(flag.value);
  out += "\n" + roff(flag.description);
  if (!flag.choices.empty() && !flag.is_argument) {
    out += "\n(one of";
    for (const std::string& choice : flag.choices) out += (&choice == &flag.choices.front() ? " " : ", ") + bold(choice);
    out += ")";
  }
  if (!flag.default_value.empty() && flag.description.find("[default") == std::string::npos) out += "\n[default: " + roff(flag.default_value) + "]";
  return out + "\n";
}

std::string flags_text(const Verb& verb, bool arguments) {
  std::string out;
  for (const Flag& flag : verb.flags)
    if (flag.is_argument == arguments) out += flag_text(flag);
  return out.empty() ? out : concat(".SH ", arguments ? "ARGUMENTS" : "OPTIONS", "\n", out);
}

std::string exit_status() {
  std::string out = ".SH EXIT STATUS\n";
  constexpr std::pair<const char*, const char*> kCodes[] = {
      {"0", "Success."}, {"1", "Internal error."}, {"2", "Wrong usage."}, {"3", "Not found, or input or output failed."}, {"4", "A damaged or inconsistent file."},
      {"5", "It does not fit in memory."}, {"6", "Unsupported by this program."}, {"130", "Interrupted."}, {"141", "The reader of standard output went away."}};
  for (const auto& [code, meaning] : kCodes) out += concat(".TP\n.B ", code, "\n", meaning, "\n");
  return out;
}

std::string settings_text() {
  return concat(".SH ENVIRONMENT\n.TP\n", bold("DUET_FLAG_NAME"), "\nstands for ", bold("--flag-name"), " of any command. A flag overrides it; it overrides the configuration file.\n",
                ".SH FILES\n.TP\n", italic("$XDG_CONFIG_HOME/duet/config.toml"), " or ", italic("~/.config/duet/config.toml"),
                "\nSettings, or those of ", bold("--config"), " ", italic("FILE"), ". Lines ", bold("flag-name = value"),
                " count for all commands that have the flag, those after ", bold("[command]"),
                " for that command, which then override the others. Values are strings in quotes, numbers, ", bold("true"), " and ", bold("false"),
                ", or arrays of those in brackets, for flags that may be repeated. ", bold("#"), " begins a comment.\n");
}

std::string overview(const std::vector<Verb>& verbs) {
  std::string out = title("duet", "quantized Mixtral on the CPU");
  out += ".SH SYNOPSIS\n" + bold("duet") + " " + italic("COMMAND") + " [" + italic("OPTION") + "]...\n.SH DESCRIPTION\nRuns, serves, converts and measures Mixtral models in GGUF files.\n.SH COMMANDS\n";
  for (const Verb& verb : verbs)
    if (!verb.name.empty()) out += ".TP\n" + bold("duet-" + verb.name) + "(1)\n" + roff(verb.description) + "\n";
  return out + flags_text(verbs.front(), false) + settings_text() + exit_status();
}

std::string page_of(const Verb& verb) {
  return title("duet-" + verb.name, verb.description) + synopsis(verb) + ".SH DESCRIPTION\n" + roff(verb.description) + ".\n" + flags_text(verb, true) + flags_text(verb, false) +
         settings_text() + exit_status() + ".SH SEE ALSO\n" + bold("duet") + "(1)\n";
}

void run_man(const std::string& name, const CLI::App& app) {
  const std::vector<Verb> verbs = flag_table(app);
  if (name == "duet") return print(overview(verbs));
  for (const Verb& verb : verbs)
    if (!verb.name.empty() && "duet-" + verb.name == name) return print(page_of(verb));
  fail(ErrorKind::usage, "there is no page ", quote(name), "; pages are called duet and duet-COMMAND");
}

}  // namespace

void add_man(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("man", "Print a manual page in roff")->group("");
  auto name = std::make_shared<std::string>("duet");
  command.add_option("PAGE", *name, "duet or duet-COMMAND")->capture_default_str();
  command.callback([name, &app] { run_man(*name, app); });
}

}  // namespace duet::cli
