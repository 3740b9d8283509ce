// Bounds-checked reading of little-endian bytes, and arithmetic that cannot wrap.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/error.h"

namespace duet {

static_assert(std::endian::native == std::endian::little, "duet reads files in place: little-endian hosts only");

// False when the exact result does not fit; `out` is then unspecified.
[[nodiscard]] inline bool checked_add(uint64_t a, uint64_t b, uint64_t& out) { return !__builtin_add_overflow(a, b, &out); }
[[nodiscard]] inline bool checked_mul(uint64_t a, uint64_t b, uint64_t& out) { return !__builtin_mul_overflow(a, b, &out); }

// Smallest multiple of `alignment` (a power of two) that is >= value; false when it does not fit.
[[nodiscard]] inline bool checked_align_up(uint64_t value, uint64_t alignment, uint64_t& out) {
  if (!checked_add(value, alignment - 1, out)) return false;
  out &= ~(alignment - 1);
  return true;
}

// A cursor over bytes that it does not own. Every read is checked; a short read throws
// Error(format) that names the source, what was being read and the byte offset.
class ByteReader {
 public:
  ByteReader(std::span<const std::byte> bytes, std::string source) : bytes_(bytes), source_(std::move(source)) {}

  uint64_t offset() const { return offset_; }
  uint64_t remaining() const { return bytes_.size() - offset_; }

  std::span<const std::byte> take(uint64_t n, std::string_view what) {
    if (n > remaining()) short_read(n, what);
    auto out = bytes_.subspan(offset_, n);
    offset_ += n;
    return out;
  }

  template <class T>
  T read(std::string_view what) {
    static_assert(std::is_arithmetic_v<T>);
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  std::string_view text(uint64_t n, std::string_view what) {
    auto raw = take(n, what);
    return {reinterpret_cast<const char*>(raw.data()), raw.size()};
  }

  // Throws Error(format) "source: message (byte N)".
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(ErrorKind::format, source_, ": ", parts..., " (byte ", offset_, ")");
  }

 private:
  [[noreturn]] void short_read(uint64_t n, std::string_view what) const {
    bad("file ends inside ", what, ": need ", n, " bytes, ", remaining(), " left; the file is truncated or damaged");
  }

  std::span<const std::byte> bytes_;
  uint64_t offset_ = 0;
  std::string source_;
};

}  // namespace duet
