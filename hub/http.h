// HTTP(S) GET, several at once on one thread (libcurl). What servers send is hostile: bodies are bounded by their
// receivers, and a redirect never takes a token to another host or from https to http.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace duet::hub {

struct HttpOptions {
  const std::atomic<bool>* cancel = nullptr;  // true -> Error(cancelled)
  int max_failures = 5;                       // in a row and without a byte of progress, then Error(io)
  std::chrono::milliseconds first_delay{500}, max_delay{60000};  // between attempts, doubled each time
  std::chrono::seconds stall{30};             // without a byte: counts as a broken connection
};

struct ByteRange {
  uint64_t first = 0, last = 0;  // inclusive
};

struct HttpRequest {
  std::string url, token;  // token: sent as a bearer, to the url's host alone; may be empty
  std::optional<ByteRange> range = {};
};

// The last response of a chain of redirects.
struct HttpHead {
  long status = 0;
  std::string etag, modified, next_page;  // next_page: of a Link header
  std::optional<uint64_t> length;
  std::optional<ByteRange> range;  // of Content-Range
  std::optional<uint64_t> total;   // of Content-Range
  std::chrono::seconds retry_after{0};
};

// Gets the body of a 200 or 206. What it throws ends the transfer and comes out of Transfers::poll.
using HttpSink = std::function<void(const HttpHead& head, std::span<const std::byte> bytes)>;

struct TransferEnd {
  size_t id = 0;
  HttpHead head;
  std::string failure;     // "" when complete with 200 or 206
  bool may_retry = false;  // the failure may pass
};

class Transfers {
 public:
  explicit Transfers(const HttpOptions& options);
  ~Transfers();
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;

  void start(size_t id, const HttpRequest& request, HttpSink sink);
  size_t active() const;
  void stop_all();
  // Moves data for at most so long; those that have ended. Error(cancelled); what a sink has thrown.
  std::vector<TransferEnd> poll(std::chrono::milliseconds wait);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct HttpResponse {
  HttpHead head;
  std::string body;
};

// A small document, with retries. Error(io) for any status but 200 and 206, in words that say what to do; for more
// than max_bytes Error(format).
HttpResponse http_get(const HttpRequest& request, uint64_t max_bytes, const HttpOptions& options);
// The head alone of what a request for the first byte is answered with.
HttpHead http_probe(const HttpRequest& request, const HttpOptions& options);

// The pause before attempt number `failures` + 1; what the server asked for counts up to options.max_delay.
std::chrono::milliseconds retry_delay(const HttpOptions& options, int failures, const HttpHead& head);
// Sleeps; Error(cancelled).
void pause(std::chrono::milliseconds time, const HttpOptions& options);
// Error(io): what a transfer failed with, and what to do about it.
[[noreturn]] void fail_transfer(const HttpRequest& request, const TransferEnd& end);
// A component or a path (slashes stay) for a URL: everything unusual as %XX.
std::string url_encode(std::string_view path);
// "example.org:8080" of "https://example.org:8080/x"; "" when it is no http(s) URL.
std::string url_host(std::string_view url);

}  // namespace duet::hub
