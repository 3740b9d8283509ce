#include "cli/commands.h"

namespace duet::cli {

void add_commands(CLI::App& app) {
  add_doctor(app);
  add_convert(app);
  add_quantize(app);
  add_make_synthetic(app);
}

}  // namespace duet::cli
