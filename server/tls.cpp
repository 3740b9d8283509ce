#include "server/tls.h"

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>

#include <array>
#include <cstring>
#include <fstream>
#include <string_view>

#include "base/error.h"
#include "server/wait.h"

namespace duet::server {
namespace {

void check_readable(const std::string& path) {
  errno = 0;
  if (const std::ifstream file(path); !file) fail(ErrorKind::io, path, ": cannot open: ", std::strerror(errno));
}

// The server has nobody to ask for a passphrase.
int no_passphrase(char*, int, int, void*) { return 0; }

}  // namespace

struct TlsContext::State {
  SSL_CTX* context = ::SSL_CTX_new(::TLS_server_method());
  ~State() { ::SSL_CTX_free(context); }
};

TlsContext::TlsContext(const TlsFiles& files) : state_(std::make_unique<State>()) {
  SSL_CTX* context = state_->context;
  if (context == nullptr) fail(ErrorKind::internal, "TLS: no context");
  check_readable(files.certificate);
  check_readable(files.key);
  ::SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
  ::SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  ::SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
  ::SSL_CTX_set_default_passwd_cb(context, no_passphrase);
  ::ERR_clear_error();
  if (::SSL_CTX_use_certificate_chain_file(context, files.certificate.c_str()) != 1)
    fail(ErrorKind::format, files.certificate, ": is no certificate in PEM form, which --tls-cert takes");
  if (::SSL_CTX_use_PrivateKey_file(context, files.key.c_str(), SSL_FILETYPE_PEM) == 1 && ::SSL_CTX_check_private_key(context) == 1) return;
  const bool mismatch = ERR_GET_REASON(::ERR_peek_last_error()) == X509_R_KEY_VALUES_MISMATCH || ERR_GET_REASON(::ERR_peek_last_error()) == X509_R_KEY_TYPE_MISMATCH;
  ::ERR_clear_error();
  if (mismatch) fail(ErrorKind::format, files.key, ": is not the key of the certificate ", files.certificate);
  fail(ErrorKind::format, files.key, ": is no private key in PEM form without a passphrase, which --tls-key takes");
}

TlsContext::~TlsContext() = default;

struct TlsSocket::State {
  State(SSL_CTX* context, int descriptor) : ssl(::SSL_new(context)), fd(descriptor) {}
  ~State() { ::SSL_free(ssl); }
  SSL* ssl;
  int fd;
  bool established = false;
};

TlsSocket::TlsSocket(const TlsContext& context, int fd) : state_(std::make_unique<State>(context.state_->context, fd)) {
  ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  if (state_->ssl != nullptr) ::SSL_set_fd(state_->ssl, fd);
}

TlsSocket::~TlsSocket() = default;

// > 0: done; 0: the other side has ended; < 0: failed.
template <class Call>
int TlsSocket::until_done(const Call& call, Deadline deadline) {
  for (;;) {
    ::ERR_clear_error();
    const int n = call();
    if (n > 0) return n;
    const int error = ::SSL_get_error(state_->ssl, n);
    if (error == SSL_ERROR_ZERO_RETURN) return 0;
    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE) {
      state_->established = false;  // nothing may follow, a goodbye neither
      return -1;
    }
    if (!wait_for(state_->fd, error == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT, deadline)) return -1;
  }
}

bool TlsSocket::handshake(Deadline deadline) {
  constexpr std::string_view kPlain = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 38\r\n\r\nthis server speaks https:// only here\n";
  constexpr char kHandshake = 0x16;
  char first = 0;
  if (state_->ssl == nullptr || !wait_for(state_->fd, POLLIN, deadline)) return false;
  if (::recv(state_->fd, &first, 1, MSG_PEEK) == 1 && first != kHandshake) {
    std::array<char, 4096> request;  // unread, it would make the kernel drop the reply
    static_cast<void>(::recv(state_->fd, request.data(), request.size(), MSG_DONTWAIT));
    ::send(state_->fd, kPlain.data(), kPlain.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    return false;
  }
  state_->established = until_done([&] { return ::SSL_accept(state_->ssl); }, deadline) > 0;
  return state_->established;
}

ssize_t TlsSocket::read(char* to, size_t n, Deadline deadline) {
  return until_done([&] { return ::SSL_read(state_->ssl, to, static_cast<int>(std::min<size_t>(n, 1 << 30))); }, deadline);
}

ssize_t TlsSocket::write(const char* from, size_t n, Deadline deadline) {
  return until_done([&] { return ::SSL_write(state_->ssl, from, static_cast<int>(std::min<size_t>(n, 1 << 30))); }, deadline);
}

bool TlsSocket::has_buffered() const { return state_->established && ::SSL_pending(state_->ssl) > 0; }

void TlsSocket::close() {
  if (state_->established) ::SSL_shutdown(state_->ssl);
  state_->established = false;
}

}  // namespace duet::server
