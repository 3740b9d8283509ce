// What a call throws, as a value that tests can compare.
#pragma once

#include <doctest/doctest.h>

#include <optional>
#include <string>

#include "base/error.h"

namespace duet::test {

struct Thrown {
  std::optional<ErrorKind> kind;  // empty: nothing was thrown
  std::string message;
};

// Other exceptions than Error pass through and fail the test.
template <class Body>
Thrown thrown_by(Body&& body) {
  try {
    body();
  } catch (const Error& e) {
    return {e.kind(), e.what()};
  }
  return {};
}

// Checks kind, a part of the message, and that the message is one line.
inline void check_thrown(const Thrown& thrown, ErrorKind kind, const std::string& substring) {
  CAPTURE(thrown.message);
  REQUIRE(thrown.kind.has_value());
  CHECK(*thrown.kind == kind);
  CHECK(thrown.message.find(substring) != std::string::npos);
  CHECK(thrown.message.find('\n') == std::string::npos);
}

}  // namespace duet::test
