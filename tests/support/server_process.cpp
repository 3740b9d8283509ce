#include "tests/support/server_process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <stdexcept>
#include <string_view>
#include <thread>

#include "tests/support/process.h"

namespace duet::test {
namespace {

using Clock = std::chrono::steady_clock;

bool readable(int fd, Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  struct pollfd p {fd, POLLIN, 0};
  return left > 0 && ::poll(&p, 1, static_cast<int>(left)) > 0;
}

std::string read_until(int fd, const std::string& until, double seconds) {
  const auto deadline = Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3));
  std::string out;
  std::array<char, 65536> buffer;
  while ((until.empty() || out.find(until) == std::string::npos) && readable(fd, deadline)) {
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n <= 0) break;
    out.append(buffer.data(), static_cast<size_t>(n));
  }
  return out;
}

}  // namespace

ServerProcess::ServerProcess(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {DUET_BINARY, "serve"});
  arguments.insert(arguments.end(), {"--port", "0"});
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw std::runtime_error("pipe failed");
  std::vector<std::string> variables = child_environment({});
  const std::vector<char*> argv = pointers(arguments), envp = pointers(variables);
  pid_ = ::fork();
  if (pid_ == 0) {
    ::dup2(ends[1], 1);
    ::execve(argv[0], argv.data(), envp.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  out_ = ends[0];
  const std::string text = read_until(out_, "Ollama clients", 60);
  constexpr std::string_view kHost = "://127.0.0.1:";
  const size_t at = text.find(kHost);
  if (at == std::string::npos) {
    kill();
    ::close(out_);
    throw std::runtime_error("duet serve did not start: " + text);
  }
  port_ = std::atoi(text.c_str() + at + kHost.size());
}

ServerProcess::~ServerProcess() {
  kill();
  ::close(out_);
}

void ServerProcess::kill() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void ServerProcess::signal(int number) const { ::kill(pid_, number); }

int ServerProcess::wait() {
  for (int i = 0; i < 600; ++i) {
    int status = 0;
    if (::waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  kill();
  return -1;
}

Socket::Socket(int port) : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  struct sockaddr_in address {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (fd_ < 0 || ::connect(fd_, reinterpret_cast<struct sockaddr*>(&address), sizeof address) != 0) throw std::runtime_error("cannot connect");
}

Socket::~Socket() { ::close(fd_); }

bool Socket::send(const std::string& bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t n = ::send(fd_, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (n <= 0) return false;
    at += static_cast<size_t>(n);
  }
  return true;
}

std::string Socket::receive(const std::string& until, double seconds) { return read_until(fd_, until, seconds); }

std::string http_request(const std::string& method, const std::string& path, const std::string& body, const std::string& headers) {
  return method + " " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

std::string http(int port, const std::string& method, const std::string& path, const std::string& body, const std::string& headers) {
  Socket socket(port);
  socket.send(http_request(method, path, body, headers));
  return socket.receive();
}

int status_of(const std::string& reply) { return reply.starts_with("HTTP/1.1 ") ? std::atoi(reply.c_str() + 9) : 0; }

std::string body_of(const std::string& reply) {
  const size_t at = reply.find("\r\n\r\n");
  if (at == std::string::npos) return {};
  const std::string head = reply.substr(0, at), raw = reply.substr(at + 4);
  if (head.find("Transfer-Encoding: chunked") == std::string::npos) return raw;
  std::string out;
  for (size_t i = 0; i < raw.size();) {
    const size_t n = std::strtoul(raw.c_str() + i, nullptr, 16), begin = raw.find("\r\n", i) + 2;
    if (n == 0 || begin < 2) break;
    out += raw.substr(begin, n);
    i = begin + n + 2;
  }
  return out;
}

}  // namespace duet::test
