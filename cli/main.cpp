#include "cli/commands.h"

int main(int argc, char** argv) { return duet::cli::run_main(argc, argv); }
