#include "tests/support/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string_view>

extern char** environ;

namespace duet::test {
std::vector<std::string> child_environment(const Environment& added_ones) {
  std::vector<std::string> out;
  const auto is_added = [&](std::string_view entry) {
    for (const auto& added : added_ones)
      if (entry.starts_with(added.first + "=")) return true;
    return false;
  };
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (std::strncmp(*entry, "DUET_", 5) != 0 && !is_added(*entry)) out.emplace_back(*entry);
  for (const auto& [name, value] : added_ones) out.push_back(name + "=" + value);
  return out;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

namespace {

using Clock = std::chrono::steady_clock;

struct Pipe {
  int read_end = -1, write_end = -1;
  Pipe() {
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw std::runtime_error("pipe failed");
    read_end = ends[0];
    write_end = ends[1];
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  ~Pipe() {
    shut(read_end);
    shut(write_end);
  }
  static void shut(int& fd) {
    if (fd >= 0) ::close(fd);
    fd = -1;
  }
};

struct Child {
  const ProcessOptions& options;
  Pipe in, out, err;
  pid_t pid = -1;

  // Between fork and exec: only calls that are safe there.
  [[noreturn]] void become(char* const* argv, char* const* envp) {
    const int input = options.input ? in.read_end : ::open("/dev/null", O_RDONLY);
    const int output =
        options.stdout_path.empty() ? out.write_end : ::open(options.stdout_path.c_str(), O_WRONLY);
    if (::dup2(input, 0) < 0 || ::dup2(output, 1) < 0 || ::dup2(err.write_end, 2) < 0) ::_exit(126);
    if (!options.folder.empty() && ::chdir(options.folder.c_str()) != 0) ::_exit(126);
    if (options.file_size_limit) {
      const rlimit limit{*options.file_size_limit, *options.file_size_limit};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    ::execve(argv[0], argv, envp);
    ::_exit(127);
  }

  void start(std::vector<std::string> command) {
    std::vector<std::string> environment = child_environment(options.environment);
    const std::vector<char*> argv = pointers(command), envp = pointers(environment);
    pid = ::fork();
    if (pid < 0) throw std::runtime_error("fork failed");
    if (pid == 0) become(argv.data(), envp.data());
    Pipe::shut(in.read_end);
    Pipe::shut(out.write_end);
    Pipe::shut(err.write_end);
    if (options.input)
      ::fcntl(in.write_end, F_SETFL, O_NONBLOCK);
    else
      Pipe::shut(in.write_end);
  }
};

// Reads what is there; closes at the end.
void drain(int& fd, std::string& text) {
  std::array<char, 1 << 16> buffer;
  const ssize_t n = ::read(fd, buffer.data(), buffer.size());
  if (n > 0)
    text.append(buffer.data(), static_cast<size_t>(n));
  else
    Pipe::shut(fd);
}

void feed(int& fd, const std::string& input, size_t& done) {
  const ssize_t n = ::write(fd, input.data() + done, input.size() - done);
  if (n > 0) done += static_cast<size_t>(n);
  if (n < 0 || done == input.size()) Pipe::shut(fd);
}

// Moves data until both output streams end; false when the time is over.
bool pump(Child& child, ProcessResult& result) {
  const ProcessOptions& options = child.options;
  const Clock::time_point start = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  size_t fed = 0;
  bool signalled = false;
  while (child.out.read_end >= 0 || child.err.read_end >= 0) {
    std::array<pollfd, 3> fds{{{child.out.read_end, POLLIN, 0},
                               {child.err.read_end, POLLIN, 0},
                               {child.in.write_end, POLLOUT, 0}}};
    if (elapsed() > options.timeout_s) return false;
    if (::poll(fds.data(), fds.size(), 20) < 0) continue;
    if (fds[0].revents != 0) drain(child.out.read_end, result.out);
    if (fds[1].revents != 0) drain(child.err.read_end, result.err);
    if (fds[2].revents != 0) feed(child.in.write_end, *options.input, fed);
    if (!signalled &&
        ((options.signal_after_bytes && result.out.size() >= *options.signal_after_bytes) ||
         (options.signal_after_s && elapsed() >= *options.signal_after_s))) {
      ::kill(child.pid, options.signal);
      signalled = true;
    }
    if (options.close_stdout_after_bytes && result.out.size() >= *options.close_stdout_after_bytes)
      Pipe::shut(child.out.read_end);
  }
  return true;
}

}  // namespace

ProcessResult run_process(const std::vector<std::string>& command, const ProcessOptions& options) {
  std::signal(SIGPIPE, SIG_IGN);  // a child may die before it has read its input
  Child child{options, {}, {}, {}};
  child.start(command);
  ProcessResult result;
  if (!pump(child, result)) {
    result.timed_out = true;
    ::kill(child.pid, SIGKILL);
  }
  int status = 0;
  ::waitpid(child.pid, &status, 0);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

ProcessResult run_duet(std::vector<std::string> arguments, const ProcessOptions& options) {
  arguments.insert(arguments.begin(), DUET_BINARY);
  return run_process(arguments, options);
}

std::string refusal(const ProcessResult& result, int exit_code, const std::string& words) {
  std::ostringstream wrong;
  if (result.timed_out) wrong << "timed out; ";
  if (result.exit_code != exit_code)
    wrong << "exit code " << result.exit_code << ", expected " << exit_code << "; ";
  if (!result.out.empty()) wrong << "stdout: " << result.out.substr(0, 200) << "; ";
  std::istringstream lines(result.err);
  std::string line, error;
  while (std::getline(lines, line)) {
    if (line.starts_with("note: ")) continue;
    if (!error.empty() || !line.starts_with("error: "))
      wrong << "unexpected line: " << line << "; ";
    error = line;
  }
  if (error.find(words) == std::string::npos || error.empty())
    wrong << "no '" << words << "' in: " << result.err;
  return wrong.str();
}

}  // namespace duet::test
