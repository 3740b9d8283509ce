// A web server on this machine that tests can have misbehave. One reply a connection.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace duet::test {

struct WebRequest {
  std::string method, target;
  std::map<std::string, std::string> headers;  // names in lower case
  size_t number = 0;                           // of requests before this one
};

struct WebReply {
  int status = 200;
  std::vector<std::pair<std::string, std::string>> headers = {};
  std::string body = {};
  size_t cut_after = std::string::npos;  // bytes of the body, then the connection breaks
  size_t bytes_per_s = 0;                // 0: as fast as can be
};

class WebServer {
 public:
  using Handler = std::function<WebReply(const WebRequest&)>;  // called by several threads
  explicit WebServer(Handler handler);
  ~WebServer();
  WebServer(const WebServer&) = delete;
  WebServer& operator=(const WebServer&) = delete;

  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  size_t n_requests() const { return n_requests_; }
  size_t n_bytes() const { return n_bytes_; }  // of bodies sent

 private:
  void accept_all();
  void serve(int fd);
  Handler handler_;
  int listener_ = -1, port_ = 0;
  std::atomic<bool> stopping_{false};
  std::atomic<size_t> n_requests_{0}, n_bytes_{0};
  std::vector<std::thread> connections_;
  std::thread acceptor_;
};

// What a good server answers: 200, or 206 with the range that was asked for.
WebReply file_reply(const WebRequest& request, const std::string& content, const std::string& etag = "\"one\"");

}  // namespace duet::test
