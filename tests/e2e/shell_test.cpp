// Completions and manual pages, made from the table of flags.
#include <doctest/doctest.h>

#include <sstream>

#include "tests/support/process.h"
#include "tests/support/skip.h"
#include "tests/support/tiny_model.h"

using namespace duet::test;

namespace {

std::string output(const std::vector<std::string>& arguments) {
  const ProcessResult result = run_duet(arguments);
  CAPTURE(result.err);
  REQUIRE(result.exit_code == 0);
  return result.out;
}

// Words of a text that begin with what looks like a long flag, or all commands of `duet` alone.
std::vector<std::string> long_flags(const std::string& help) {
  std::vector<std::string> out;
  std::istringstream lines(help);
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.find("--");
    if (!line.starts_with("  ") || at == std::string::npos || at > 6) continue;
    out.push_back(line.substr(at, line.find_first_of(" \n", at) - at));
  }
  return out;
}

std::vector<std::string> commands() {
  std::vector<std::string> out;
  std::istringstream lines(run_duet({}).err);
  bool listed = false;
  for (std::string line; std::getline(lines, line);) {
    if (listed && line.starts_with("  ") && line[2] != ' ') out.push_back(line.substr(2, line.find(' ', 2) - 2));
    else if (listed && line.empty()) break;
    listed |= line == "Subcommands:";
  }
  return out;
}

bool is_there(const std::string& program) { return run_process({"/bin/sh", "-c", "command -v " + program}).exit_code == 0; }

// What bash would offer for these words.
std::string bash_offers(const std::string& script, const std::string& words) {
  const ProcessResult result = run_process({"/usr/bin/env", "bash", "-c", "source '" + script + "'; COMP_WORDS=(" + words + "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _duet; echo \"${COMPREPLY[*]}\""});
  CAPTURE(result.err);
  CHECK(result.exit_code == 0);
  return result.out;
}

}  // namespace

TEST_CASE("completions name every command and every flag, and the shells take them") {
  const TempFolder folder;
  const auto verbs = commands();
  REQUIRE(verbs.size() > 20);
  for (const std::string shell : {"bash", "zsh", "fish"}) {
    CAPTURE(shell);
    const std::string script = output({"completions", shell}), path = (folder / shell).string();
    for (const std::string& verb : verbs) {
      CHECK_MESSAGE(script.find(verb) != std::string::npos, verb);
      const auto flags = long_flags(output({verb, "--help"}));
      CHECK(flags.size() >= 1);
      for (const std::string& flag : flags) {
        const std::string written = shell == "fish" ? "'__fish_seen_subcommand_from " + verb + "'" : flag;
        CHECK_MESSAGE(script.find(written) != std::string::npos, verb, " ", flag);
        if (shell == "fish") CHECK_MESSAGE(script.find(" -l " + flag.substr(2) + " ") != std::string::npos, flag);
      }
    }
    write_text(path, script);
    if (!is_there(shell)) continue;
    const ProcessResult parsed = run_process({"/usr/bin/env", shell, "-n", path});
    CHECK_MESSAGE(parsed.exit_code == 0, parsed.err);
    CHECK(parsed.err == "");
  }
}

TEST_CASE("bash is offered commands, flags and values") {
  if (!is_there("bash")) DUET_SKIP("no bash");
  const TempFolder folder;
  const std::string script = (folder / "duet").string();
  write_text(script, output({"completions", "bash"}));
  CHECK(bash_offers(script, "duet ser") == "serve\n");
  CHECK(bash_offers(script, "duet serve --kv-ty") == "--kv-type\n");
  CHECK(bash_offers(script, "duet serve model.gguf --kv-type ''") == "f16 f32 q8_0\n");
  CHECK(bash_offers(script, "duet serve model.gguf --numa i") == "interleave\n");
  CHECK(bash_offers(script, "duet run --por") == "\n");
}

TEST_CASE("a command's manual page has all its flags") {
  for (const std::string& verb : commands()) {
    const std::string page = output({"man", "duet-" + verb});
    CHECK(page.starts_with(".TH "));
    for (std::string flag : long_flags(output({verb, "--help"}))) {
      for (size_t at = 0; (at = flag.find('-', at)) != std::string::npos; at += 2) flag.insert(at, "\\");
      CHECK_MESSAGE(page.find(flag) != std::string::npos, verb, " ", flag);
    }
  }
  CHECK(refusal(run_duet({"man", "nonsense"}), 2, "nonsense") == "");
}

TEST_CASE("manual pages render without complaint") {
  if (!is_there("groff")) DUET_SKIP("no groff to render manual pages");
  std::vector<std::string> pages{"duet"};
  for (const std::string& verb : commands()) pages.push_back("duet-" + verb);
  for (const std::string& name : pages) {
    const std::string page = output({"man", name});
    const ProcessResult shown = run_process({"/usr/bin/env", "groff", "-man", "-ww", "-Tutf8", "-P-cbou"}, {.input = page});
    CHECK_MESSAGE(shown.err == "", name);
    CHECK(shown.exit_code == 0);
    CHECK(shown.out.find("EXIT STATUS") != std::string::npos);
  }
}
