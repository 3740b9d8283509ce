#include "tests/support/terminal.h"

#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <stdexcept>

#include "base/stopwatch.h"
#include "tests/support/process.h"

namespace duet::test {
namespace {

using Clock = std::chrono::steady_clock;

winsize size_of(int columns) {
  winsize size{};
  size.ws_row = 24;
  size.ws_col = static_cast<unsigned short>(columns);
  return size;
}

}  // namespace

Terminal::Terminal(std::vector<std::string> command, std::vector<std::pair<std::string, std::string>> environment, int columns) {
  winsize size = size_of(columns);
  environment.insert(environment.begin(), {"TERM", "xterm"});
  std::vector<std::string> variables = child_environment(environment);
  const std::vector<char*> argv = pointers(command), envp = pointers(variables);
  pid_ = ::forkpty(&fd_, nullptr, nullptr, &size);
  if (pid_ < 0) throw std::runtime_error("forkpty failed");
  if (pid_ > 0) return;
  ::execve(argv[0], argv.data(), envp.data());
  ::_exit(127);
}

Terminal::~Terminal() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  ::close(fd_);
}

void Terminal::type(const std::string& keys) {
  if (::write(fd_, keys.data(), keys.size()) != static_cast<ssize_t>(keys.size())) throw std::runtime_error("the terminal takes no keys");
}

void Terminal::resize(int columns) {
  winsize size = size_of(columns);
  ::ioctl(fd_, TIOCSWINSZ, &size);
}

void Terminal::signal(int number) { ::kill(pid_, number); }

bool Terminal::read_some(int timeout_ms) {
  struct pollfd input {fd_, POLLIN, 0};
  if (::poll(&input, 1, timeout_ms) <= 0) return true;
  std::array<char, 4096> buffer;
  const ssize_t n = ::read(fd_, buffer.data(), buffer.size());
  if (n <= 0) return false;
  output_.append(buffer.data(), static_cast<size_t>(n));
  return true;
}

bool Terminal::wait_for(const std::string& text, double timeout_s) {
  const Clock::time_point start = Clock::now();
  for (bool more = true;; more = read_some(50)) {
    const size_t at = output_.find(text, seen_);
    if (at != std::string::npos) {
      seen_ = at + text.size();
      return true;
    }
    if (!more || seconds_since(start) > timeout_s) return false;
  }
}

void Terminal::read_for(double seconds) {
  const Clock::time_point start = Clock::now();
  while (seconds_since(start) < seconds && read_some(20)) {
  }
}

int Terminal::wait_exit(double timeout_s) {
  const Clock::time_point start = Clock::now();
  int status = 0;
  while (::waitpid(pid_, &status, WNOHANG) == 0) {
    if (seconds_since(start) > timeout_s) return -1;
    read_some(20);
  }
  pid_ = -1;
  read_for(1);  // what it wrote last; ends at once when the terminal is closed
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace duet::test
