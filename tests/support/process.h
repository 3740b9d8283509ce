// Runs a program the way a shell would: arguments, standard input, environment in; both output
// streams and the exit code out.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace duet::test {

using Environment = std::vector<std::pair<std::string, std::string>>;
// The caller's without DUET_*, with these added or put in place of its own.
std::vector<std::string> child_environment(const Environment& added);
// For exec; null-terminated. `texts` must live on.
std::vector<char*> pointers(std::vector<std::string>& texts);

struct ProcessOptions {
  std::optional<std::string> input = {};  // through a pipe; without it standard input is /dev/null
  Environment environment = {};                         // added; DUET_* of the caller is dropped
  std::string folder = {};                              // working folder; "": the caller's
  std::string stdout_path = {};                         // a file or device instead of a pipe
  std::optional<uint64_t> file_size_limit = {};         // RLIMIT_FSIZE
  std::optional<size_t> signal_after_bytes = {};        // of stdout: then `signal` is sent once
  std::optional<double> signal_after_s = {};            // the same by the clock
  int signal = 2;                                       // SIGINT
  std::optional<size_t> close_stdout_after_bytes = {};  // as `| head -c N` does
  double timeout_s = 120;                               // then killed
};

struct ProcessResult {
  int exit_code = -1;  // of a death by signal N: 128 + N
  bool timed_out = false;
  std::string out, err;
};

ProcessResult run_process(const std::vector<std::string>& command,
                          const ProcessOptions& options = {});
// The duet binary under test.
ProcessResult run_duet(std::vector<std::string> arguments, const ProcessOptions& options = {});

// "" when the program failed as programs here must: this exit code, nothing on stdout, and on
// stderr exactly one line "error: ..." that contains `words` (after any lines "note: ...").
// Otherwise what is wrong, for CHECK(refusal(...) == "").
std::string refusal(const ProcessResult& result, int exit_code, const std::string& words);

}  // namespace duet::test
