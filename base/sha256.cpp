#include "base/sha256.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <memory>

#include "base/error.h"
#include "base/mapped_file.h"

namespace duet {
namespace {

constexpr size_t kPiece = size_t{8} << 20;

void check(int result) {
  if (result != 1) fail(ErrorKind::internal, "libcrypto refuses to compute a SHA-256");
}

}  // namespace

std::string sha256_of(const std::filesystem::path& path, const std::function<void(uint64_t)>& progress, const std::atomic<bool>* cancel) {
  const MappedFile file = MappedFile::open(path);
  const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  check(context != nullptr && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1);
  const auto bytes = file.bytes();
  for (size_t at = 0; at < bytes.size(); at += kPiece) {
    if (cancel != nullptr && cancel->load()) fail(ErrorKind::cancelled, "interrupted");
    const auto piece = bytes.subspan(at, std::min(kPiece, bytes.size() - at));
    check(EVP_DigestUpdate(context.get(), piece.data(), piece.size()));
    file.drop(piece);
    if (progress) progress(at + piece.size());
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned n = 0;
  check(EVP_DigestFinal_ex(context.get(), digest.data(), &n));
  std::string out;
  for (unsigned i = 0; i < n; ++i) {
    out += "0123456789abcdef"[digest[i] >> 4];
    out += "0123456789abcdef"[digest[i] & 15];
  }
  return out;
}

}  // namespace duet
