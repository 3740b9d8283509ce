// HTTP/1.1, or HTTPS, over cpp-httplib, the only file that knows it. A thread per connection; what a connection may
// send, and for how long, is bounded before any of it is looked at.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/tls.h"

namespace duet::server {

struct HttpLimits {
  size_t max_connections = 512;           // more wait to be accepted
  size_t max_header_bytes = 64 << 10;     // request line and all headers
  size_t max_body_bytes = size_t{32} << 20;
  size_t max_bodies_bytes = size_t{256} << 20;  // of all requests at once
  std::chrono::seconds header_time{10};   // from the first byte to the end of the headers
  std::chrono::seconds body_time{60};
  std::chrono::seconds idle_time{30};     // between requests of a connection
  std::chrono::seconds write_time{30};    // for a client that reads nothing
};

struct HttpRequest {
  std::string method, path;               // path: decoded, without the query
  std::string body, remote;
  std::vector<std::pair<std::string, std::string>> headers;
  std::function<bool()> client_gone;      // whether nobody waits for the reply any more

  std::string header(std::string_view name) const;  // any case; "" when absent
};

// What a reply took that a model has written, for the log.
struct ReplyUsage {
  size_t n_choices = 0;  // 0: none was generated
  size_t n_prompt = 0, n_cached = 0, n_generated = 0;
  double queue_s = 0, prompt_s = 0;  // the longest of its choices
  bool complete = true;              // the client stayed to the end
};

// A reply that is written while it is made.
class ReplyStream {
 public:
  using Write = std::function<bool(std::string_view)>;  // false: the client is gone
  virtual ~ReplyStream() = default;
  virtual void run(const Write& write) = 0;  // on the connection's thread
  virtual ReplyUsage usage() const { return {}; }  // afterwards
};

struct HttpReply {
  int status = 200;
  std::string content_type = "application/json", body = {};
  std::vector<std::pair<std::string, std::string>> headers = {};
  std::unique_ptr<ReplyStream> stream = {};  // instead of body: chunks
  ReplyUsage usage = {};                     // of one that is no stream
};

// Called by many threads at once. What it throws becomes status 500 with no details.
using HttpHandler = std::function<HttpReply(const HttpRequest&)>;
// Whether a request whose headers are these may send its body: else the handler, which refuses it, gets none.
using HttpGate = std::function<bool(const HttpRequest&)>;

class HttpServer {
 public:
  // Error: io, format where the files of TLS are not what they should be.
  HttpServer(const HttpLimits& limits, HttpGate gate, HttpHandler handler, const TlsFiles& tls = {});
  ~HttpServer();

  // Binds and listens; port 0 picks one. Returns the port. Error(io) when the address cannot be had.
  int bind(const std::string& host, int port);
  void run();   // serves until stop(); returns when all connections have ended. Error(io): it can accept no more
  // From any thread: no new connections or requests. Has no effect before run() has begun to listen: to be
  // repeated until it has returned.
  void stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace duet::server
