#include "cli/commands.h"

namespace duet::cli {

void add_commands(CLI::App& app) {
  add_convert(app);
  add_quantize(app);
}

}  // namespace duet::cli
