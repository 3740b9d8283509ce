#include "base/zstd_frame.h"

#include <zstd.h>

#include <array>
#include <memory>

#include "base/error.h"

namespace duet {

std::string zstd_compress(std::string_view text, int level) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  const size_t n = ZSTD_compress(out.data(), out.size(), text.data(), text.size(), level);
  DUET_ASSERT(!ZSTD_isError(n));
  out.resize(n);
  return out;
}

std::string zstd_decompress(std::string_view frame, uint64_t max_bytes, const std::string& source) {
  // Streaming, so that the size a header claims is never trusted.
  const std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream(ZSTD_createDStream(),
                                                                        ZSTD_freeDStream);
  DUET_ASSERT(stream != nullptr);
  ZSTD_inBuffer in{frame.data(), frame.size(), 0};
  std::string out;
  std::array<char, 1 << 16> chunk;
  for (size_t left = 1; left != 0;) {
    ZSTD_outBuffer part{chunk.data(), chunk.size(), 0};
    left = ZSTD_decompressStream(stream.get(), &part, &in);
    if (ZSTD_isError(left))
      fail(ErrorKind::format, source, ": damaged zstd frame: ", ZSTD_getErrorName(left));
    if (left != 0 && part.pos == 0 && in.pos == in.size)
      fail(ErrorKind::format, source, ": zstd frame ends early");
    if (out.size() + part.pos > max_bytes)
      fail(ErrorKind::format, source, ": zstd frame unpacks to more than ", max_bytes, " bytes");
    out.append(chunk.data(), part.pos);
  }
  return out;
}

}  // namespace duet
