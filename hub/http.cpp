#include "hub/http.h"

#include <curl/curl.h>

#include <algorithm>
#include <charconv>
#include <exception>
#include <list>
#include <thread>

#include "base/error.h"

namespace duet::hub {
namespace {

constexpr size_t kMaxHeaderBytes = 64 << 10;  // of one response
constexpr uint64_t kMaxErrorBody = 64 << 10;

void check_cancel(const HttpOptions& options) {
  if (options.cancel != nullptr && *options.cancel) fail(ErrorKind::cancelled, "interrupted");
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && static_cast<unsigned char>(text.front()) <= ' ') text.remove_prefix(1);
  while (!text.empty() && static_cast<unsigned char>(text.back()) <= ' ') text.remove_suffix(1);
  return text;
}

std::optional<uint64_t> parse_u64(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "bytes 0-99/1234"; parts that cannot be read stay unknown.
void parse_content_range(std::string_view text, HttpHead& head) {
  if (!text.starts_with("bytes ")) return;
  text.remove_prefix(6);
  const size_t dash = text.find('-'), slash = text.find('/');
  if (dash == std::string_view::npos || slash == std::string_view::npos || dash > slash) return;
  const auto first = parse_u64(text.substr(0, dash)), last = parse_u64(text.substr(dash + 1, slash - dash - 1));
  if (first && last && *first <= *last) head.range = ByteRange{*first, *last};
  head.total = parse_u64(text.substr(slash + 1));
}

// <https://...>; rel="next"
std::string next_of_link(std::string_view text) {
  const size_t rel = text.find("rel=\"next\""), open = text.rfind('<', rel), close = text.find('>', open);
  if (rel == std::string_view::npos || open == std::string_view::npos || close == std::string_view::npos || close > rel) return "";
  return std::string(text.substr(open + 1, close - open - 1));
}

void parse_header(std::string_view line, HttpHead& head) {
  if (line.starts_with("HTTP/")) {  // of another response of the chain
    head = {};
    return;
  }
  const size_t colon = line.find(':');
  if (colon == std::string_view::npos) return;
  const std::string name = lower(line.substr(0, colon));
  const std::string_view value = trimmed(line.substr(colon + 1));
  if (name == "etag")
    head.etag = std::string(value);
  else if (name == "last-modified")
    head.modified = std::string(value);
  else if (name == "content-length")
    head.length = parse_u64(value);
  else if (name == "content-range")
    parse_content_range(value, head);
  else if (name == "link")
    head.next_page = next_of_link(value);
  else if (name == "retry-after")
    head.retry_after = std::chrono::seconds(std::min<uint64_t>(parse_u64(value).value_or(0), 3600));
}

bool status_may_pass(long status) {
  return status == 408 || status == 425 || status == 429 || status == 500 || (status >= 502 && status <= 504);
}

bool failure_may_pass(CURLcode code) {
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_PARTIAL_FILE:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM:
      return true;
    default:
      return false;
  }
}

struct Transfer {
  size_t id = 0;
  HttpSink sink;
  CURL* easy = nullptr;
  curl_slist* headers = nullptr;
  HttpHead head;
  size_t header_bytes = 0;
  uint64_t error_body = 0;
  std::exception_ptr thrown;
  char message[CURL_ERROR_SIZE] = "";

  ~Transfer() {
    curl_easy_cleanup(easy);
    curl_slist_free_all(headers);
  }
};

size_t on_header(char* data, size_t size, size_t n, void* self) {
  auto& transfer = *static_cast<Transfer*>(self);
  transfer.header_bytes += size * n;
  if (transfer.header_bytes > kMaxHeaderBytes) return 0;
  parse_header({data, size * n}, transfer.head);
  return size * n;
}

size_t on_body(char* data, size_t size, size_t n, void* self) {
  auto& transfer = *static_cast<Transfer*>(self);
  curl_easy_getinfo(transfer.easy, CURLINFO_RESPONSE_CODE, &transfer.head.status);
  if (transfer.head.status != 200 && transfer.head.status != 206)
    return (transfer.error_body += size * n) > kMaxErrorBody ? 0 : size * n;
  try {
    transfer.sink(transfer.head, std::as_bytes(std::span(data, size * n)));
    return size * n;
  } catch (...) {
    transfer.thrown = std::current_exception();
    return 0;
  }
}

void set_options(Transfer& transfer, const HttpRequest& request, const HttpOptions& options) {
  CURL* easy = transfer.easy;
  const bool secure = request.url.starts_with("https:");
  curl_easy_setopt(easy, CURLOPT_URL, request.url.c_str());
  curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(easy, CURLOPT_REDIR_PROTOCOLS_STR, secure ? "https" : "http,https");
  curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 1L);
  curl_easy_setopt(easy, CURLOPT_MAXREDIRS, 10L);
  curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT, 20L);
  curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
  curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, static_cast<long>(options.stall.count()));
  curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(easy, CURLOPT_USERAGENT, "duet");
  curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, transfer.message);
  curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, on_header);
  curl_easy_setopt(easy, CURLOPT_HEADERDATA, &transfer);
  curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
  curl_easy_setopt(easy, CURLOPT_WRITEDATA, &transfer);
  curl_easy_setopt(easy, CURLOPT_PRIVATE, &transfer);
  curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, 256L << 10);
  if (request.range)
    curl_easy_setopt(easy, CURLOPT_RANGE, concat(request.range->first, '-', request.range->last).c_str());
  if (!request.token.empty()) {  // libcurl keeps it from other hosts
    transfer.headers = curl_slist_append(nullptr, ("Authorization: Bearer " + request.token).c_str());
    curl_easy_setopt(easy, CURLOPT_HTTPHEADER, transfer.headers);
  }
}

TransferEnd end_of(const Transfer& transfer, CURLcode code) {
  TransferEnd end{transfer.id, transfer.head, "", false};
  curl_easy_getinfo(transfer.easy, CURLINFO_RESPONSE_CODE, &end.head.status);
  const long status = end.head.status;
  if (code != CURLE_OK && status < 400) {
    end.failure = transfer.message[0] != '\0' ? transfer.message : curl_easy_strerror(code);
    end.may_retry = failure_may_pass(code);
  } else if (status != 200 && status != 206) {
    end.failure = concat("status ", status);
    end.may_retry = status_may_pass(status);
  }
  return end;
}

struct Library {
  Library() { curl_global_init(CURL_GLOBAL_DEFAULT); }
};

const char* advice(long status, bool has_token) {
  switch (status) {
    case 401:
    case 403:
      return has_token ? "; the token in HF_TOKEN does not open it (accept the model's terms on its page, check the token)"
                       : "; it wants a token: set HF_TOKEN (and accept the model's terms on its page)";
    case 404:
      return "; there is nothing of that name (a private repository also answers so: set HF_TOKEN)";
    case 429:
      return "; the server wants fewer requests: try again later";
    default:
      return "";
  }
}

// One request after the other until one succeeds.
template <class Attempt>
void with_retries(const HttpRequest& request, const HttpOptions& options, Attempt&& attempt) {
  for (int failures = 0;;) {
    const TransferEnd end = attempt();
    if (end.failure.empty()) return;
    if (!end.may_retry || ++failures >= options.max_failures) fail_transfer(request, end);
    pause(retry_delay(options, failures, end.head), options);
  }
}

TransferEnd run_one(const HttpRequest& request, const HttpOptions& options, HttpSink sink) {
  Transfers transfers(options);
  transfers.start(0, request, std::move(sink));
  for (;;)
    for (TransferEnd& end : transfers.poll(std::chrono::milliseconds(100))) return std::move(end);
}

}  // namespace

struct Transfers::State {
  HttpOptions options;
  CURLM* multi = nullptr;
  std::list<Transfer> transfers;
};

Transfers::Transfers(const HttpOptions& options) : state_(std::make_unique<State>()) {
  static const Library library;
  state_->options = options;
  state_->multi = curl_multi_init();
  if (state_->multi == nullptr) fail(ErrorKind::internal, "libcurl cannot be used");
}

Transfers::~Transfers() {
  stop_all();
  curl_multi_cleanup(state_->multi);
}

void Transfers::stop_all() {
  for (Transfer& transfer : state_->transfers) curl_multi_remove_handle(state_->multi, transfer.easy);
  state_->transfers.clear();
}

size_t Transfers::active() const { return state_->transfers.size(); }

void Transfers::start(size_t id, const HttpRequest& request, HttpSink sink) {
  Transfer& transfer = state_->transfers.emplace_back();
  transfer.id = id;
  transfer.sink = std::move(sink);
  transfer.easy = curl_easy_init();
  if (transfer.easy == nullptr) fail(ErrorKind::internal, "libcurl cannot be used");
  set_options(transfer, request, state_->options);
  curl_multi_add_handle(state_->multi, transfer.easy);
}

std::vector<TransferEnd> Transfers::poll(std::chrono::milliseconds wait) {
  check_cancel(state_->options);
  int n_running = 0, n_left = 0;
  curl_multi_perform(state_->multi, &n_running);
  if (n_running == static_cast<int>(active())) {
    curl_multi_poll(state_->multi, nullptr, 0, static_cast<int>(wait.count()), nullptr);
    curl_multi_perform(state_->multi, &n_running);
  }
  check_cancel(state_->options);
  std::vector<TransferEnd> out;
  while (const CURLMsg* message = curl_multi_info_read(state_->multi, &n_left)) {
    if (message->msg != CURLMSG_DONE) continue;
    const CURLcode code = message->data.result;
    char* self = nullptr;
    curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &self);
    const auto* transfer = reinterpret_cast<Transfer*>(self);
    if (transfer->thrown) std::rethrow_exception(transfer->thrown);
    out.push_back(end_of(*transfer, code));
    curl_multi_remove_handle(state_->multi, transfer->easy);
    state_->transfers.remove_if([transfer](const Transfer& t) { return &t == transfer; });
  }
  return out;
}

HttpResponse http_get(const HttpRequest& request, uint64_t max_bytes, const HttpOptions& options) {
  HttpResponse out;
  with_retries(request, options, [&] {
    out.body.clear();
    TransferEnd end = run_one(request, options, [&](const HttpHead&, std::span<const std::byte> bytes) {
      if (bytes.size() > max_bytes - out.body.size()) fail(ErrorKind::format, request.url, ": answers with more than ", max_bytes, " bytes");
      out.body.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    });
    out.head = end.head;
    return end;
  });
  return out;
}

HttpHead http_probe(const HttpRequest& request, const HttpOptions& options) {
  struct Seen {};
  HttpHead out;
  HttpRequest first = request;
  first.range = ByteRange{0, 0};
  with_retries(request, options, [&] {
    try {  // a server without ranges would send the whole file
      TransferEnd end = run_one(first, options, [&](const HttpHead& head, std::span<const std::byte>) {
        out = head;
        throw Seen{};
      });
      out = end.head;
      return end;
    } catch (const Seen&) {
      return TransferEnd{};
    }
  });
  return out;
}

std::chrono::milliseconds retry_delay(const HttpOptions& options, int failures, const HttpHead& head) {
  std::chrono::milliseconds delay = options.first_delay;
  for (int i = 1; i < failures && delay < options.max_delay; ++i) delay *= 2;
  return std::min<std::chrono::milliseconds>(std::max<std::chrono::milliseconds>(delay, head.retry_after), options.max_delay);
}

void pause(std::chrono::milliseconds time, const HttpOptions& options) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    check_cancel(options);
    std::this_thread::sleep_for(std::min<std::chrono::milliseconds>(time, std::chrono::milliseconds(50)));
  }
}

void fail_transfer(const HttpRequest& request, const TransferEnd& end) {
  if (end.head.status >= 400) fail(ErrorKind::io, request.url, ": ", end.failure, advice(end.head.status, !request.token.empty()));
  fail(ErrorKind::io, request.url, ": ", quote(end.failure), end.may_retry ? "; check the network and run the same command again" : "");
}

std::string url_encode(std::string_view path) {
  constexpr const char* kDigits = "0123456789ABCDEF";
  std::string out;
  for (const char c : path) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z') || (byte >= '0' && byte <= '9') ||
                       std::string_view("-._~/").find(c) != std::string_view::npos;
    if (plain)
      out += c;
    else
      (out += '%') += std::string{kDigits[byte >> 4], kDigits[byte & 15]};
  }
  return out;
}

std::string url_host(std::string_view url) {
  for (const std::string_view scheme : {"https://", "http://"}) {
    if (!url.starts_with(scheme)) continue;
    url.remove_prefix(scheme.size());
    url = url.substr(0, url.find_first_of("/?#"));
    return std::string(url.substr(url.find('@') == std::string_view::npos ? 0 : url.find('@') + 1));
  }
  return "";
}

}  // namespace duet::hub
