// TLS 1.2 and later on accepted connections, over OpenSSL.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <memory>
#include <string>

namespace duet::server {

struct TlsFiles {
  std::string certificate, key;  // PEM; the certificate with those that lead to its root
};

// A server's certificate and key.
class TlsContext {
 public:
  // Error: io, format when a file is not what it should be, has a passphrase, or they do not belong together.
  explicit TlsContext(const TlsFiles& files);
  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;

 private:
  friend class TlsSocket;
  struct State;
  std::unique_ptr<State> state_;
};

// An accepted connection, whose descriptor stays the caller's. One thread.
class TlsSocket {
 public:
  using Deadline = std::chrono::steady_clock::time_point;
  TlsSocket(const TlsContext& context, int fd);
  ~TlsSocket();
  TlsSocket(const TlsSocket&) = delete;
  TlsSocket& operator=(const TlsSocket&) = delete;

  // False when there will be none; a client that speaks plain HTTP is told so.
  bool handshake(Deadline deadline);
  // As recv and send, but for the deadline: 0 at the end, -1 for failures of any kind.
  ssize_t read(char* to, size_t n, Deadline deadline);
  ssize_t write(const char* from, size_t n, Deadline deadline);
  bool has_buffered() const;
  void close();  // says goodbye, without waiting for an answer

 private:
  template <class Call>
  int until_done(const Call& call, Deadline deadline);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace duet::server
