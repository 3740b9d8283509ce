#include "server/http.h"

#include <httplib.h>
#include <poll.h>
#include <strings.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#include "base/error.h"
#include "server/wait.h"

namespace duet::server {
namespace {

using Clock = std::chrono::steady_clock;

// The other side has closed, or will send nothing more and be gone soon.
bool is_closed(int fd) {
  struct pollfd p {fd, POLLRDHUP, 0};
  return ::poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

// What httplib reads a request from: bounds its bytes and the time they may take.
class Connection : public httplib::Stream {
 public:
  // tls: null for plain HTTP. bodies: bytes that all connections hold.
  Connection(int fd, const HttpLimits& limits, const TlsContext* tls, std::atomic<size_t>& bodies) : fd_(fd), limits_(limits), bodies_(bodies) {
    if (tls != nullptr) tls_.emplace(*tls, fd);
  }
  ~Connection() override { end_request(); }

  bool handshake() { return !tls_ || tls_->handshake(Clock::now() + limits_.header_time); }
  void close() {
    if (tls_) tls_->close();
    ::shutdown(fd_, SHUT_RDWR);
    ::close(fd_);
  }
  bool has_buffered() const { return at_ < end_ || (tls_ && tls_->has_buffered()); }
  void begin_request() { begin_phase(limits_.max_header_bytes, limits_.header_time); }
  // A little more than the body may have: chunked framing.
  void begin_body() {
    begin_phase(limits_.max_body_bytes + limits_.max_body_bytes / 8, limits_.body_time);
    in_body_ = true;
  }
  void end_request() {
    bodies_ -= std::exchange(body_bytes_, 0);
    in_body_ = false;
  }
  bool closed() const { return is_closed(fd_); }

  bool is_readable() const override { return has_buffered() || wait_for(fd_, POLLIN, deadline_); }
  bool is_writable() const override { return wait_for(fd_, POLLOUT, Clock::now() + limits_.write_time); }

  ssize_t read(char* to, size_t n) override {
    if (at_ == end_ && !fill()) return -1;
    if (bytes_left_ == 0) {
      overrun_ = true;
      return -1;
    }
    n = std::min({n, end_ - at_, bytes_left_});
    if (in_body_ && !hold(n)) return -1;
    std::memcpy(to, buffer_.data() + at_, n);
    at_ += n;
    bytes_left_ -= n;
    return static_cast<ssize_t>(n);
  }

  ssize_t write(const char* from, size_t n) override {
    if (tls_) return tls_->write(from, n, Clock::now() + limits_.write_time);
    if (!is_writable()) return -1;
    return ::send(fd_, from, n, MSG_NOSIGNAL | MSG_DONTWAIT);
  }

  void get_remote_ip_and_port(std::string& ip, int& port) const override { address(::getpeername, ip, port); }
  void get_local_ip_and_port(std::string& ip, int& port) const override { address(::getsockname, ip, port); }
  socket_t socket() const override { return fd_; }
  bool overrun() const { return overrun_; }  // what follows is the rest of a body, not a request

 private:
  // Counts bytes of a body among those of all connections; false: they would be too many.
  bool hold(size_t n) {
    body_bytes_ += n;
    overrun_ = (bodies_ += n) > limits_.max_bodies_bytes;
    return !overrun_;
  }

  void begin_phase(size_t n_bytes, std::chrono::seconds time) {
    bytes_left_ = n_bytes;
    deadline_ = Clock::now() + time;
  }

  bool fill() {
    const ssize_t n = tls_                                    ? tls_->read(buffer_.data(), buffer_.size(), deadline_)
                      : wait_for(fd_, POLLIN, deadline_) ? ::recv(fd_, buffer_.data(), buffer_.size(), MSG_DONTWAIT)
                                                              : -1;
    if (n <= 0) return false;
    at_ = 0;
    end_ = static_cast<size_t>(n);
    return true;
  }

  template <class Get>
  void address(const Get& get, std::string& ip, int& port) const {
    struct sockaddr_storage storage {};
    socklen_t size = sizeof storage;
    std::array<char, NI_MAXHOST> host{};
    std::array<char, NI_MAXSERV> service{};
    if (get(fd_, reinterpret_cast<struct sockaddr*>(&storage), &size) != 0) return;
    if (::getnameinfo(reinterpret_cast<struct sockaddr*>(&storage), size, host.data(), host.size(), service.data(), service.size(),
                      NI_NUMERICHOST | NI_NUMERICSERV) != 0)
      return;
    ip = host.data();
    port = std::atoi(service.data());
  }

  int fd_;
  const HttpLimits& limits_;
  std::optional<TlsSocket> tls_;
  std::array<char, 16384> buffer_;
  size_t at_ = 0, end_ = 0, bytes_left_ = 0, body_bytes_ = 0;
  bool in_body_ = false, overrun_ = false;
  std::atomic<size_t>& bodies_;
  Clock::time_point deadline_{};
};

// A thread per connection, at most so many.
class ConnectionThreads : public httplib::TaskQueue {
 public:
  explicit ConnectionThreads(size_t most) : most_(most) {}

  void enqueue(std::function<void()> task) override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return n_ < most_; });
    ++n_;
    lock.unlock();
    for (;;) {
      try {
        std::thread([this, task] {
          task();
          const std::lock_guard done(mutex_);
          --n_;
          changed_.notify_all();
        }).detach();
        return;
      } catch (const std::system_error&) {  // no more threads now
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    }
  }

  void shutdown() override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return n_ == 0; });
  }

 private:
  size_t most_, n_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A status of this file's own, and its text.
const char* text_of(int status) {
  switch (status) {
    case 413: return "the request body is too large";
    case 414: return "the path is too long";
    case 415: return "Content-Encoding is not supported";
    case 503: return "too many large requests at once; try again later";
    default: return "the request could not be read";
  }
}

std::string refusal(const char* text) { return concat("{\"error\":{\"message\":\"", text, "\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":null}}"); }

}  // namespace

std::string HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers)
    if (key.size() == name.size() && ::strncasecmp(key.data(), name.data(), name.size()) == 0) return value;
  return {};
}

class HttpServer::Impl : public httplib::Server {
 public:
  Impl(const HttpLimits& limits, HttpGate gate, HttpHandler handler, const TlsFiles& tls) : limits_(limits), gate_(std::move(gate)), handler_(std::move(handler)) {
    if (!tls.certificate.empty()) tls_.emplace(tls);
    const auto serve = [this](const httplib::Request& req, httplib::Response& res) { answer(req, res); };
    Get(".*", serve);
    Post(".*", serve);
    Put(".*", serve);
    Patch(".*", serve);
    Delete(".*", serve);
    Options(".*", serve);
    set_payload_max_length(limits_.max_body_bytes);
    set_tcp_nodelay(true);
    set_keep_alive_max_count(kRequestsPerConnection);
    set_keep_alive_timeout(limits_.idle_time.count());
    // Not SO_REUSEPORT, httplib's default: a second server on the same port must fail.
    set_socket_options([](socket_t fd) {
      const int yes = 1;
      ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    set_error_handler([](const httplib::Request&, httplib::Response& res) {
      if (res.body.empty()) res.set_content(refusal(text_of(res.status)), "application/json");
    });
    set_pre_routing_handler([this](const httplib::Request& req, httplib::Response& res) { return refuse_early(req, res); });
    new_task_queue = [this] { return new ConnectionThreads(limits_.max_connections); };
  }

  int bind_address(const std::string& host, int port) {
    errno = 0;
    const int bound = port == 0 ? bind_to_any_port(host) : bind_to_port(host, port) ? port : -1;
    if (bound < 0)
      fail(ErrorKind::io, "cannot listen on ", host, " port ", port, ": ", errno != 0 ? std::strerror(errno) : "no such address", "; use another --host or --port");
    ::listen(svr_sock_, 512);  // httplib's queue of 5 would make clients wait a second each
    return bound;
  }

  void end() {
    stopping_ = true;
    if (is_running() && svr_sock_ != INVALID_SOCKET) stop();  // httplib allows neither before nor twice
  }

 private:
  static constexpr size_t kRequestsPerConnection = 100000;

  static uint64_t body_length(const httplib::Request& req) { return std::strtoull(req.get_header_value("Content-Length").c_str(), nullptr, 10); }
  static bool has_body(const httplib::Request& req) { return req.has_header("Transfer-Encoding") || body_length(req) > 0; }

  // What is decided by the headers alone, before a body is read.
  static constexpr int kReadOn = 0, kDenied = -1;  // or a status. kDenied: the handler refuses it
  struct Verdict {
    const Connection* connection;
    int what;
    bool operator()(uint64_t, uint64_t) const { return !connection->closed(); }  // as httplib's progress: goes on
  };

  // Compressed bodies could be any size.
  int verdict(const httplib::Request& req) const {
    if (req.path.size() > 2048) return 414;
    if (has_body(req) && !gate_(headers_of(req))) return kDenied;
    if (req.has_header("Content-Encoding")) return 415;
    const uint64_t length = body_length(req);
    if (length > limits_.max_body_bytes) return 413;
    return length > 0 && bodies_ + length > limits_.max_bodies_bytes ? 503 : kReadOn;
  }

  // httplib reads no body of other methods: it would be taken for the next request.
  static bool leaves_body(const httplib::Request& req) {
    return req.method != "POST" && req.method != "PUT" && req.method != "PATCH" && req.method != "DELETE" && has_body(req);
  }

  HandlerResponse refuse_early(const httplib::Request& req, httplib::Response& res) const {
    const int what = req.progress.target<Verdict>()->what;
    if (what == kReadOn) return HandlerResponse::Unhandled;
    if (what == kDenied) {
      answer(req, res);
      return HandlerResponse::Handled;
    }
    res.status = what;
    if (what == 503) res.set_header("Retry-After", "2");
    res.set_content(refusal(text_of(what)), "application/json");
    return HandlerResponse::Handled;
  }

  // Requests of one connection, one after the other.
  bool process_and_close_socket(socket_t fd) override {
    Connection connection(fd, limits_, tls_ ? &*tls_ : nullptr, bodies_);
    bool closed = !connection.handshake();
    bool readable = true;  // what follows is the next request
    for (size_t n = 1; !closed && readable && !connection.overrun() && !stopping_ && next_request(connection, fd); ++n) {
      connection.begin_request();
      readable = false;  // httplib answers some damaged requests by itself, without prepare()
      const auto prepare = [&](httplib::Request& req) {
        connection.begin_body();
        const int what = verdict(req);
        readable = what == kReadOn && !leaves_body(req) && req.version != "HTTP/1.0";
        if (!readable) {
          req.headers.erase("Connection");
          req.headers.emplace("Connection", "close");  // which the reply repeats
        }
        if (!has_body(req)) req.headers.emplace("Content-Length", "0");  // httplib would read to the end of the connection
        req.progress = Verdict{&connection, what};
        req.ranges.clear();
        req.headers.erase("Content-Type");     // forms are JSON to `curl -d`
        req.headers.erase("Accept-Encoding");  // compressing what streams costs more than it saves
      };
      const bool good = process_request(connection, n == kRequestsPerConnection, closed, prepare);
      connection.end_request();
      if (!good) break;
    }
    connection.close();
    return true;
  }

  bool next_request(const Connection& connection, int fd) const {
    const auto deadline = Clock::now() + limits_.idle_time;
    while (!connection.has_buffered() && !stopping_ && Clock::now() < deadline)
      if (wait_for(fd, POLLIN, Clock::now() + std::chrono::milliseconds(250))) return true;
    return connection.has_buffered();
  }

  static HttpRequest headers_of(const httplib::Request& req) {
    HttpRequest request{.method = req.method, .path = req.path, .body = {}, .remote = req.remote_addr, .headers = {}, .client_gone = {}};
    request.headers.assign(req.headers.begin(), req.headers.end());
    return request;
  }

  void answer(const httplib::Request& req, httplib::Response& res) const {
    HttpRequest request = headers_of(req);
    request.body = req.body;
    request.client_gone = [alive = req.progress] { return !alive(0, 0); };
    HttpReply reply;
    try {
      reply = handler_(request);
    } catch (const std::exception&) {
      reply = {.status = 500, .body = refusal("internal error")};
    }
    res.status = reply.status;
    for (const auto& [key, value] : reply.headers) res.set_header(key, value);
    if (!reply.stream) return res.set_content(reply.body, reply.content_type);
    ReplyStream* stream = reply.stream.release();  // std::function cannot own it
    const auto provide = [stream](size_t, httplib::DataSink& sink) {
      bool open = true;
      stream->run([&](std::string_view text) { return open = open && sink.write(text.data(), text.size()); });
      if (open) sink.done();
      return open;
    };
    const auto release = [stream](bool) { delete stream; };
    // HTTP/1.0 knows no chunks: the end of the connection ends the text.
    if (req.version == "HTTP/1.0") res.set_content_provider(reply.content_type, provide, release);
    else res.set_chunked_content_provider(reply.content_type, provide, release);
  }

  HttpLimits limits_;
  HttpGate gate_;
  HttpHandler handler_;
  std::optional<TlsContext> tls_;
  std::atomic<size_t> bodies_{0};  // bytes of all that are being read or answered
  std::atomic<bool> stopping_{false};
};

HttpServer::HttpServer(const HttpLimits& limits, HttpGate gate, HttpHandler handler, const TlsFiles& tls)
    : impl_(std::make_unique<Impl>(limits, std::move(gate), std::move(handler), tls)) {}
HttpServer::~HttpServer() = default;
int HttpServer::bind(const std::string& host, int port) { return impl_->bind_address(host, port); }
void HttpServer::run() {
  if (!impl_->listen_after_bind()) fail(ErrorKind::io, "the system gives no more connections (sockets or memory are used up); start the server again");
}
void HttpServer::stop() { impl_->end(); }

}  // namespace duet::server
