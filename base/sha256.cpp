#include "base/sha256.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "base/mapped_file.h"

namespace duet {
namespace {

constexpr size_t kPiece = size_t{8} << 20;

void check(int result) {
  if (result != 1) fail(ErrorKind::internal, "libcrypto refuses to compute a SHA-256");
}

}  // namespace

struct Sha256::Context {
  std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> md{EVP_MD_CTX_new(), EVP_MD_CTX_free};
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  check(context_->md != nullptr);
  begin();
}

void Sha256::begin() { check(EVP_DigestInit_ex(context_->md.get(), EVP_sha256(), nullptr)); }

Sha256::~Sha256() = default;

Sha256& Sha256::add(std::span<const std::byte> bytes) {
  check(EVP_DigestUpdate(context_->md.get(), bytes.data(), bytes.size()));
  return *this;
}

Sha256Digest Sha256::finish() {
  Sha256Digest digest{};
  check(EVP_DigestFinal_ex(context_->md.get(), reinterpret_cast<unsigned char*>(digest.data()), nullptr));
  begin();
  return digest;
}

std::string hex(std::span<const std::byte> bytes) {
  std::string out;
  for (const std::byte b : bytes) {
    out += "0123456789abcdef"[std::to_integer<unsigned>(b) >> 4];
    out += "0123456789abcdef"[std::to_integer<unsigned>(b) & 15];
  }
  return out;
}

std::string sha256_of(std::span<const std::byte> bytes) { return hex(Sha256().add(bytes).finish()); }

// By reads and not by a mapping, where a failing disk would end the process.
std::string sha256_of(const std::filesystem::path& path, const std::function<void(uint64_t)>& progress, const std::atomic<bool>* cancel) {
  const FileDescriptor file = open_regular(path);
  static_cast<void>(::posix_fadvise(file.get(), 0, 0, POSIX_FADV_SEQUENTIAL));
  Sha256 hash;
  std::vector<std::byte> piece(kPiece);
  for (uint64_t done = 0;;) {
    if (cancel != nullptr && cancel->load()) fail(ErrorKind::cancelled, "interrupted");
    const ssize_t n = ::pread(file.get(), piece.data(), piece.size(), static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(ErrorKind::io, path.string(), ": cannot read at byte ", done, ": ", std::strerror(errno));
    if (n == 0) return hex(hash.finish());
    hash.add(std::span<const std::byte>(piece).first(static_cast<size_t>(n)));
    done += static_cast<uint64_t>(n);
    if (progress) progress(done);
  }
}

}  // namespace duet
