#include "cli/commands.h"

namespace duet::cli {

void add_commands(CLI::App& app) {
  static_cast<void>(app);
}

}  // namespace duet::cli
