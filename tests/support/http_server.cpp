#include "tests/support/http_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <sstream>
#include <stdexcept>

namespace duet::test {
namespace {

WebRequest parse_request(const std::string& text) {
  WebRequest out;
  std::istringstream in(text);
  in >> out.method >> out.target;
  std::string line;
  std::getline(in, line);
  while (std::getline(in, line)) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    out.headers[name] = line.substr(colon + 2, line.find('\r') - colon - 2);
  }
  return out;
}

bool send_all(int fd, const char* data, size_t size) {
  for (size_t done = 0; done < size;) {
    const ssize_t n = ::send(fd, data + done, size - done, MSG_NOSIGNAL);
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

std::string head_of(const WebReply& reply) {
  std::string out = "HTTP/1.1 " + std::to_string(reply.status) + " X\r\nConnection: close\r\n";
  bool has_length = false;
  for (const auto& [name, value] : reply.headers) {
    out += name + ": " + value + "\r\n";
    has_length = has_length || name == "Content-Length";
  }
  if (!has_length) out += "Content-Length: " + std::to_string(reply.body.size()) + "\r\n";
  return out + "\r\n";
}

}  // namespace

WebServer::WebServer(Handler handler) : handler_(std::move(handler)) {
  listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(listener_, 64) != 0 ||
      ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0)
    throw std::runtime_error("no test server");
  port_ = ntohs(address.sin_port);
  acceptor_ = std::thread([this] { accept_all(); });
}

WebServer::~WebServer() {
  stopping_ = true;
  acceptor_.join();
  for (std::thread& connection : connections_) connection.join();
  ::close(listener_);
}

void WebServer::accept_all() {
  while (!stopping_) {
    pollfd input{listener_, POLLIN, 0};
    if (::poll(&input, 1, 20) <= 0) continue;
    const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) continue;
    connections_.emplace_back([this, fd] {
      serve(fd);
      ::close(fd);
    });
  }
}

void WebServer::serve(int fd) {
  std::string text;
  std::array<char, 4096> buffer;
  while (text.find("\r\n\r\n") == std::string::npos) {
    pollfd input{fd, POLLIN, 0};
    if (stopping_) return;
    if (::poll(&input, 1, 50) <= 0) continue;
    const ssize_t n = ::recv(fd, buffer.data(), buffer.size(), 0);
    if (n <= 0) return;
    text.append(buffer.data(), static_cast<size_t>(n));
  }
  WebRequest request = parse_request(text);
  request.number = n_requests_++;
  const WebReply reply = handler_(request);
  const std::string head = head_of(reply);
  if (!send_all(fd, head.data(), head.size())) return;
  const size_t size = std::min(reply.body.size(), reply.cut_after);
  const size_t step = reply.bytes_per_s > 0 ? std::max<size_t>(1, reply.bytes_per_s / 50) : size;
  for (size_t done = 0; done < size && !stopping_; done += step) {
    const size_t n = std::min(step, size - done);
    if (!send_all(fd, reply.body.data() + done, n)) return;
    n_bytes_ += n;
    if (reply.bytes_per_s > 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  ::shutdown(fd, SHUT_WR);
}

WebReply file_reply(const WebRequest& request, const std::string& content, const std::string& etag) {
  WebReply reply{200, {{"ETag", etag}, {"Accept-Ranges", "bytes"}}, content};
  const auto range = request.headers.find("range");
  size_t first = 0, last = 0;
  if (range == request.headers.end() || std::sscanf(range->second.c_str(), "bytes=%zu-%zu", &first, &last) != 2) return reply;
  if (first >= content.size()) return {416, {}, ""};
  last = std::min(last, content.size() - 1);
  reply.status = 206;
  reply.headers.emplace_back("Content-Range", "bytes " + std::to_string(first) + "-" + std::to_string(last) + "/" + std::to_string(content.size()));
  reply.body = content.substr(first, last - first + 1);
  return reply;
}

}  // namespace duet::test
