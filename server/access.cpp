#include "server/access.h"

#include <arpa/inet.h>

#include <algorithm>
#include <array>

#include "base/error.h"

namespace duet::server {
namespace {

// In time that does not depend on how much of it is right.
bool same_secret(const std::string& a, const std::string& b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < b.size(); ++i) difference |= static_cast<unsigned>((a.empty() ? '\0' : a[i % a.size()]) != b[i]);
  return difference == 0;
}

std::string key_of(const HttpRequest& request) {
  const std::string authorization = request.header("Authorization");
  if (authorization.starts_with("Bearer ") || authorization.starts_with("bearer ")) return authorization.substr(7);
  return request.header("x-api-key");
}

// Names of hosts have no case.
std::string lower(std::string text) {
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

// "[::1]:8080" -> "::1", "LocalHost:8080" -> "localhost"
std::string without_port(const std::string& host) {
  if (host.starts_with('[')) return lower(host.substr(1, host.find(']') - 1));
  return lower(host.substr(0, host.find(':')));
}

bool is_address(const std::string& host) {
  std::array<unsigned char, sizeof(struct in6_addr)> storage{};
  return ::inet_pton(AF_INET, host.c_str(), storage.data()) == 1 || ::inet_pton(AF_INET6, host.c_str(), storage.data()) == 1;
}

bool contains(const std::vector<std::string>& list, const std::string& value) {
  return std::any_of(list.begin(), list.end(), [&](const std::string& entry) { return lower(entry) == lower(value); });
}

// A name that a foreign site could have made to point here is none of these.
bool host_allowed(const AccessOptions& options, const std::string& host) {
  if (host == "localhost" || host.ends_with(".localhost") || host == lower(options.host) || contains(options.allowed_hosts, host) || contains(options.allowed_hosts, "*")) return true;
  return is_loopback(options.host) ? is_loopback(host) : is_address(host);
}

bool origin_allowed(const AccessOptions& options, const HttpRequest& request, const std::string& origin) {
  if (contains(options.cors_origins, origin) || contains(options.cors_origins, "*") || !options.keys.empty()) return true;
  const size_t scheme = origin.find("://");
  if (scheme == std::string::npos) return false;  // "null": a sandboxed page, a file
  const std::string host = origin.substr(scheme + 3);
  return lower(host) == lower(request.header("Host")) || is_loopback(without_port(host)) || without_port(host) == "localhost";
}

}  // namespace

bool is_loopback(const std::string& host) { return host == "localhost" || host == "::1" || (host.starts_with("127.") && is_address(host)); }

std::optional<Denial> denial(const AccessOptions& options, const HttpRequest& request) {
  const std::string origin = request.header("Origin");
  if (!origin.empty() && !origin_allowed(options, request, origin))
    return Denial{403, concat("requests by pages of ", quote(origin), " are not allowed; start the server with --cors ORIGIN")};
  if (options.keys.empty()) {
    const std::string host = without_port(request.header("Host"));
    if (host.empty() || host_allowed(options, host)) return std::nullopt;
    return Denial{403, concat("this server does not answer to the host name ", quote(host), "; start it with --allow-host NAME")};
  }
  // The page holds nothing secret; it asks for the key.
  const bool is_page = request.method == "GET" && (request.path == "/" || request.path.starts_with("/page/"));
  if (request.method == "OPTIONS" || request.path == "/health" || is_page) return std::nullopt;
  const std::string given = key_of(request);
  bool known = false;
  for (const std::string& key : options.keys) known |= same_secret(given, key);
  if (known) return std::nullopt;
  return Denial{401, given.empty() ? "no API key: send 'Authorization: Bearer KEY'" : "wrong API key"};
}

std::vector<std::pair<std::string, std::string>> cors_headers(const AccessOptions& options, const HttpRequest& request) {
  const std::string origin = request.header("Origin");
  if (origin.empty() || !origin_allowed(options, request, origin)) return {};
  std::vector<std::pair<std::string, std::string>> out{{"Access-Control-Allow-Origin", origin}, {"Vary", "Origin"}};
  if (request.method != "OPTIONS") return out;
  out.emplace_back("Access-Control-Allow-Methods", "GET, POST, DELETE, HEAD, OPTIONS");
  const std::string asked = request.header("Access-Control-Request-Headers");
  out.emplace_back("Access-Control-Allow-Headers", !asked.empty() ? asked : "Authorization, Content-Type, User-Agent, Accept, X-Requested-With, OpenAI-Beta");
  out.emplace_back("Access-Control-Max-Age", "600");
  return out;
}

}  // namespace duet::server
