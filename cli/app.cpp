// The program around the commands: version, help, the one catch, exit codes.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <new>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/json.h"
#include "cli/commands.h"
#include "cli/console.h"

namespace duet::cli {
namespace {

constexpr const char* kExamples =
    "Examples:\n"
    "  duet convert ./Mixtral-8x7B-Instruct-v0.1 -q Q4_K_M -o mixtral.gguf\n"
    "  duet run mixtral.gguf -p \"Why is the sky blue?\"\n"
    "  duet pull USER/REPO-GGUF:Q4_K_M && duet chat REPO-GGUF\n"
    "\n"
    "Exit codes: 0 ok, 1 internal, 2 usage, 3 not found or I/O, 4 bad file, 5 does not fit,\n"
    "6 unsupported, 130 interrupted, 141 the reader of stdout went away.\n"
    "`duet VERB --help` describes a verb.";

int exit_code(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::internal:
      return 1;
    case ErrorKind::usage:
      return 2;
    case ErrorKind::io:
      return 3;
    case ErrorKind::format:
      return 4;
    case ErrorKind::memory:
      return 5;
    case ErrorKind::unsupported:
      return 6;
    case ErrorKind::cancelled:
      return kExitInterrupted;
  }
  return 1;
}

int report(ErrorKind kind, const std::string& text) {
  print_error(text);
  return exit_code(kind);
}

// CLI11 reports help as an exception too.
int report_parse(const CLI::App& app, const CLI::ParseError& e, const std::string& first_word) {
  if (e.get_exit_code() == 0) {
    const int code = app.exit(e);
    flush_stdout();
    return code;
  }
  const auto chosen = app.get_subcommands();
  if (chosen.empty() && !first_word.empty() && first_word[0] != '-')
    return report(ErrorKind::usage, concat("unknown command '", first_word, "'; `duet` lists them"));
  const std::string verb = chosen.empty() ? "" : " " + chosen.front()->get_name();
  return report(ErrorKind::usage, concat(e.what(), "; see: duet", verb, " --help"));
}

void print_version(bool json) {
  const std::string features = cpu_feature_names(detect_cpu_features());
  if (!json) return print("duet " DUET_VERSION "\n");
  print_json({{"version", DUET_VERSION}, {"compiler", __VERSION__}, {"cpu_features", features}});
}

// What follows the value of a flag that may be repeated is the next argument, not one more value.
void take_one_value_each(CLI::App& app) {
  for (CLI::App* command : app.get_subcommands([](CLI::App*) { return true; }))
    for (CLI::Option* option : command->get_options())
      if (option->nonpositional()) option->allow_extra_args(false);
}

int run_command(CLI::App& app, int argc, char** argv) {
  bool version = false, json = false;
  CLI::Option* version_flag = app.add_flag("--version", version, "Print the version");
  app.add_flag("--json", json, "With --version: as JSON")->needs(version_flag);
  add_commands(app);
  take_one_value_each(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return report_parse(app, e, argc > 1 ? argv[1] : "");
  }
  if (version) {
    print_version(json);
  } else if (app.get_subcommands().empty()) {
    std::fputs(app.help().c_str(), stderr);
    return exit_code(ErrorKind::usage);
  }
  flush_stdout();
  return 0;
}

}  // namespace

int run_main(int argc, char** argv) {
  install_signal_handlers();
  try {
    CLI::App app("duet: quantized Mixtral on the CPU", "duet");
    app.footer(kExamples);
    return run_command(app, argc, argv);
  } catch (const Quit& quit) {
    return quit.code;
  } catch (const Error& e) {
    return report(e.kind(), e.what());
  } catch (const std::filesystem::filesystem_error& e) {
    return report(ErrorKind::io, concat(e.path1().string(), ": ", e.code().message()));
  } catch (const std::bad_alloc&) {
    return report(ErrorKind::memory,
                  "out of memory; try a smaller --ctx or --batch, or a smaller model");
  } catch (const std::exception& e) {
    return report(ErrorKind::internal, e.what());
  }
}

}  // namespace duet::cli
