// The one exception type of duet, and message building for it.
//
// Errors end an operation (open, convert, evaluate); the library never prints, aborts or exits.
// A message is one line: what failed, the values, what was expected, what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace duet {

// What went wrong, as far as a caller can act on it. The CLI maps each kind to an exit code
// (table in README.md): internal 1, usage 2, io 3, format 4, memory 5, unsupported 6,
// cancelled 130.
enum class ErrorKind { internal, usage, io, format, memory, unsupported, cancelled };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

// concat("row ", 3, " of ", n) -> "row 3 of 17"
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, concat(parts...));
}

// Text from a file or the network as a message may show it: in quotes, on one line, control bytes as
// \xNN, cut after 80 bytes.
std::string quote(std::string_view text);

// For programmer errors only, never for file or network data: stays active in release builds.
#define DUET_ASSERT(condition)                                                              \
  do {                                                                                      \
    if (!(condition))                                                                       \
      ::duet::fail(::duet::ErrorKind::internal, __FILE__, ":", __LINE__, ": " #condition); \
  } while (false)

}  // namespace duet
