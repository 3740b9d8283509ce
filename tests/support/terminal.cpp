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

namespace duet::test {
namespace {

using Clock = std::chrono::steady_clock;

winsize size_of(int columns) {
  winsize size{};
  size.ws_row = 24;
  size.ws_col = static_cast<unsigned short>(columns);
  return size;
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

Terminal::Terminal(std::vector<std::string> command, std::vector<std::pair<std::string, std::string>> environment, int columns) {
  winsize size = size_of(columns);
  std::vector<char*> argv;
  for (std::string& argument : command) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_ = ::forkpty(&fd_, nullptr, nullptr, &size);
  if (pid_ < 0) throw std::runtime_error("forkpty failed");
  if (pid_ > 0) return;
  ::setenv("TERM", "xterm", 1);
  for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
  ::execv(argv[0], argv.data());
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
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace duet::test
