#include "cli/commands.h"

#include "cli/flag_table.h"

namespace duet::cli {

void add_commands(CLI::App& app) {
  add_chat(app);
  add_run(app);
  add_serve(app);
  add_pull(app);
  add_list(app);
  add_rm(app);
  add_inspect(app);
  add_plan(app);
  add_doctor(app);
  add_convert(app);
  add_quantize(app);
  add_repack(app);
  add_merge(app);
  add_make_synthetic(app);
  add_bench(app);
  add_perplexity(app);
  add_imatrix(app);
  add_compare(app);
  add_verify(app);
  add_logits(app);
  add_tokenize(app);
  add_detokenize(app);
  add_template(app);
  add_completions(app);
  add_man(app);
}

}  // namespace duet::cli
