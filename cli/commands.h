// The verbs of the `duet` binary. A verb is one file cli/<verb>.cpp with one add_<verb> function
// that declares its options on the CLI11 app, fills its own options struct and sets a callback; it
// gets a declaration here and a line in add_commands (cli/commands.cpp).
//
//   void add_thing(CLI::App& app) {
//     CLI::App& command = *app.add_subcommand("thing", "Does a thing");
//     auto options = std::make_shared<ThingOptions>();   // lives as long as the callback
//     command.add_option("MODEL", options->model, "...")->required();
//     add_environment(command);                          // last: DUET_* for every flag
//     command.callback([options] { run_thing(*options); });
//   }
//
// A callback reports failure by duet::Error, ends early with another exit code by throwing Quit,
// writes results with print() and remarks with note() (cli/console.h).
#pragma once

namespace CLI {
class App;
}

namespace duet::cli {

void add_convert(CLI::App& app);
void add_quantize(CLI::App& app);
void add_make_synthetic(CLI::App& app);
void add_run(CLI::App& app);
void add_chat(CLI::App& app);
void add_serve(CLI::App& app);
void add_pull(CLI::App& app);
void add_list(CLI::App& app);
void add_rm(CLI::App& app);
void add_inspect(CLI::App& app);
void add_plan(CLI::App& app);
void add_doctor(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_detokenize(CLI::App& app);
void add_template(CLI::App& app);
void add_logits(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_imatrix(CLI::App& app);
void add_compare(CLI::App& app);
void add_verify(CLI::App& app);
void add_repack(CLI::App& app);
void add_merge(CLI::App& app);
void add_bench(CLI::App& app);

// Adds them all, in the order in which help lists them (cli/commands.cpp).
void add_commands(CLI::App& app);

// The whole program: parses, runs the command, reports its failure, gives the exit code.
int run_main(int argc, char** argv);

}  // namespace duet::cli
