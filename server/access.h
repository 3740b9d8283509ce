// Who may ask: keys, and browsers that other sites send (DNS rebinding, cross-site requests).
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/http.h"

namespace duet::server {

struct AccessOptions {
  std::string host = "127.0.0.1";          // listened on
  std::vector<std::string> keys;           // any of them, when there are any
  std::vector<std::string> allowed_hosts;  // names that requests may be made to, besides addresses and localhost
  std::vector<std::string> cors_origins;   // whose pages may ask; "*": any
};

// What is wrong with a request, as a reply's status and message; nothing when it may pass.
//   401  no or a wrong key, except for the page and /health ("Authorization: Bearer KEY" or "x-api-key: KEY")
//   403  without keys: a Host that is no address of this machine, a page of another site
struct Denial {
  int status;
  std::string message;
};
std::optional<Denial> denial(const AccessOptions& options, const HttpRequest& request);

// Headers that let a page read the reply, where its origin is allowed.
std::vector<std::pair<std::string, std::string>> cors_headers(const AccessOptions& options, const HttpRequest& request);

bool is_loopback(const std::string& host);

}  // namespace duet::server
