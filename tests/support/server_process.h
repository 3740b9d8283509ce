// `duet serve` as a process of its own, and plain sockets to talk to it.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace duet::test {

class ServerProcess {
 public:
  // duet serve ARGUMENTS --port 0; ready when this returns.
  explicit ServerProcess(std::vector<std::string> arguments);
  ~ServerProcess();  // kills
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  int port() const { return port_; }
  pid_t pid() const { return pid_; }
  void signal(int number) const;
  int wait();  // exit code; of a death by signal N: 128 + N; after 60 s: killed, -1

 private:
  void kill();

  pid_t pid_ = -1;
  int out_ = -1, port_ = 0;
};

// A connection to a port of this machine.
class Socket {
 public:
  explicit Socket(int port);
  ~Socket();
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  bool send(const std::string& bytes);
  // What comes until `until` has been seen, the other side closes, or the time is up.
  std::string receive(const std::string& until = {}, double seconds = 30);

 private:
  int fd_;
};

// Method, path, body; the whole reply as received, on a connection of its own.
std::string http(int port, const std::string& method, const std::string& path, const std::string& body = {}, const std::string& headers = {});
std::string http_request(const std::string& method, const std::string& path, const std::string& body, const std::string& headers = {});
int status_of(const std::string& reply);        // 0: none
std::string body_of(const std::string& reply);  // chunks joined

}  // namespace duet::test
