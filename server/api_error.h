// A request that is answered by an HTTP error.
#pragma once

#include <stdexcept>
#include <string>

#include "base/error.h"

namespace duet::server {

struct ApiError : std::runtime_error {
  // param: the field of the request that is to blame, "" for none.
  ApiError(int status_code, const std::string& message, std::string field = {})
      : std::runtime_error(message), status(status_code), param(std::move(field)) {}
  int status;
  std::string param;
};

template <class... Parts>
[[noreturn]] void bad_request(const std::string& param, const Parts&... parts) {
  throw ApiError(400, concat(parts...), param);
}

}  // namespace duet::server
