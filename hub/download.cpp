#include "hub/download.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/sha256.h"
#include "base/units.h"
#include "hub/part_file.h"

namespace duet::hub {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kMaxFileBytes = uint64_t{1} << 44;

// What the server says of the file.
struct Remote {
  uint64_t size = 0;
  bool has_ranges = false;
  std::string identity;  // etag, else date of the last change
};

// `head` answers a request for the first byte.
Remote describe(const DownloadRequest& request, const HttpHead& head) {
  Remote out;
  out.has_ranges = head.status == 206 && head.range && head.range->first == 0 && head.range->last == 0 && head.total.has_value();
  out.identity = head.etag.empty() ? head.modified : head.etag;
  if (head.status == 206 && !out.has_ranges) fail(ErrorKind::io, request.url, ": the server was asked for the first byte and sends another range");
  const std::optional<uint64_t> told = out.has_ranges ? head.total : head.length;
  if (told && request.size && *told != *request.size)
    fail(ErrorKind::format, request.url, ": the server has ", *told, " bytes, ", *request.size, " were announced");
  if (!told && !request.size) fail(ErrorKind::io, request.url, ": the server does not say how large the file is");
  out.size = told ? *told : *request.size;
  if (out.size == 0 || out.size > kMaxFileBytes) fail(ErrorKind::format, request.url, ": a file of ", out.size, " bytes is no model");
  return out;
}

class Download {
 public:
  Download(const DownloadRequest& request, const DownloadOptions& options)
      : request_(request), options_(options), part_(request.destination) {}

  void run(const Remote& remote) {
    if (is_here()) return part_.discard();
    prepare(remote);
    try {
      remote.has_ranges ? fetch_ranges() : fetch_whole();
    } catch (...) {
      remote.has_ranges ? part_.save(journal_) : part_.discard();
      throw;
    }
    verify();
    part_.finish();
  }

 private:
  // Another process has completed it between the caller's look and our lock.
  bool is_here() const {
    std::error_code ec;
    return std::filesystem::is_regular_file(request_.destination, ec);
  }

  // Goes on with what an earlier attempt has left if it is of the same file.
  void prepare(const Remote& remote) {
    const uint64_t size = remote.size;
    const bool has_ranges = remote.has_ranges;
    identity_ = remote.identity;
    journal_ = new_journal(size, has_ranges ? options_.chunk_bytes : size);
    const std::optional<Journal> old = part_.journal();
    const bool same = old && old->size == size &&
                      (request_.sha256.empty() ? old->url == request_.url && !identity_.empty() && old->etag == identity_
                                               : old->sha256 == request_.sha256);
    if (same && has_ranges) {
      journal_ = *old;
      if (journal_.total_done() > 0)
        options_.notice(concat("going on after ", format_size(journal_.total_done()), " of ", format_size(size)));
    } else {
      if (old && old->total_done() > 0)
        options_.notice(same ? "the server sends no ranges: the download begins again" : "the file on the server is another one now: the download begins again");
      part_.restart();
    }
    journal_.url = request_.url;
    journal_.etag = identity_;
    journal_.sha256 = request_.sha256;
    reserve(size);
    if (has_ranges) part_.save(journal_);
  }

  // Where there is no room, only what had arrived before is kept: of disk space that was had no journal would tell.
  void reserve(uint64_t size) {
    try {
      part_.reserve(size);
    } catch (...) {
      if (journal_.total_done() == 0) part_.discard();
      throw;
    }
  }

  void fetch_ranges() {
    busy_.assign(journal_.done.size(), false);
    Transfers transfers(options_.http);
    while (!journal_.complete() || transfers.active() > 0) {
      start_chunks(transfers);
      for (const TransferEnd& end : transfers.poll(std::chrono::milliseconds(transfers.active() > 0 ? 100 : 5))) {
        busy_[end.id] = false;
        if (end.failure.empty() && journal_.done[end.id] < journal_.chunk_size(end.id)) fail_range(end.id);
        if (!end.failure.empty()) failed(end);
      }
      report();
    }
  }

  void start_chunks(Transfers& transfers) {
    // After a failure one connection tries alone.
    const size_t most = failures_ > 0 ? 1 : options_.connections;
    if (Clock::now() < not_before_) return;
    for (size_t i = 0; i < busy_.size() && transfers.active() < most; ++i) {
      if (busy_[i] || journal_.done[i] == journal_.chunk_size(i)) continue;
      busy_[i] = true;
      const uint64_t begin = i * journal_.chunk_bytes;
      const ByteRange range{begin + journal_.done[i], begin + journal_.chunk_size(i) - 1};
      transfers.start(i, {request_.url, request_.token, range},
                      [this, i, range](const HttpHead& head, std::span<const std::byte> bytes) { received(i, range, head, bytes); });
    }
  }

  [[noreturn]] void fail_range(size_t chunk) {
    fail(ErrorKind::io, request_.url, ": the server sends other bytes than it was asked for (chunk ", chunk, ")");
  }

  void received(size_t chunk, const ByteRange& asked, const HttpHead& head, std::span<const std::byte> bytes) {
    if (head.status != 206 || !head.range || head.range->first != asked.first || head.range->last > asked.last) fail_range(chunk);
    if (head.total && *head.total != journal_.size) fail_changed();
    if (request_.sha256.empty() && !head.etag.empty() && head.etag != identity_) fail_changed();
    if (bytes.size() > journal_.chunk_size(chunk) - journal_.done[chunk]) fail_range(chunk);
    part_.write(chunk * journal_.chunk_bytes + journal_.done[chunk], bytes);
    journal_.done[chunk] += bytes.size();
    failures_ = 0;
  }

  [[noreturn]] void fail_changed() {
    fail(ErrorKind::io, request_.url, ": the file on the server has changed meanwhile; run the same command again");
  }

  void failed(const TransferEnd& end) {
    if (Clock::now() >= not_before_) ++failures_;  // connections that fail together count once
    if (!end.may_retry || failures_ >= options_.http.max_failures) fail_transfer({request_.url, request_.token}, end);
    not_before_ = std::max(not_before_, Clock::now() + retry_delay(options_.http, failures_, end.head));
  }

  void report() {
    options_.progress(journal_.total_done(), journal_.size, "download");
    if (Clock::now() - saved_ < options_.save_interval) return;
    part_.save(journal_);
    saved_ = Clock::now();
  }

  // From a server without ranges: in one piece, from the beginning after each failure.
  void fetch_whole() {
    uint64_t& done = journal_.done[0];
    for (;;) {
      done = 0;
      Transfers transfers(options_.http);
      transfers.start(0, {request_.url, request_.token}, [&](const HttpHead&, std::span<const std::byte> bytes) {
        if (bytes.size() > journal_.size - done) fail(ErrorKind::format, request_.url, ": the server sends more than the ", journal_.size, " bytes it has announced");
        part_.write(done, bytes);
        done += bytes.size();
      });
      std::vector<TransferEnd> ends;
      while (ends.empty()) {
        ends = transfers.poll(std::chrono::milliseconds(100));
        options_.progress(done, journal_.size, "download");
      }
      if (ends[0].failure.empty() && journal_.complete()) return;
      if (ends[0].failure.empty()) fail(ErrorKind::format, request_.url, ": the server sends ", done, " bytes, ", journal_.size, " were announced");
      failed(ends[0]);
      pause(std::chrono::duration_cast<std::chrono::milliseconds>(not_before_ - Clock::now()), options_.http);
    }
  }

  void verify() {
    if (request_.sha256.empty()) return check_kind();
    part_.save(journal_);
    const std::string found =
        sha256_of(part_.path(), [this](uint64_t done) { options_.progress(done, journal_.size, "check"); }, options_.http.cancel);
    if (found == request_.sha256) return;
    part_.discard();
    fail(ErrorKind::format, request_.url, ": SHA-256 is ", found, ", ", request_.sha256, " was announced; the file is thrown away, pull it again");
  }

  // A page of a portal or of an error that comes with status 200 would stay as a model and be taken for one ever after.
  void check_kind() {
    constexpr size_t kShown = 16;
    const std::string head = part_.head(kShown);
    if (head.starts_with("GGUF")) return;
    part_.discard();
    fail(ErrorKind::format, request_.url, ": is no GGUF file, it begins with ", quote(head), "; nothing of it is kept; look at the address in a browser");
  }

  const DownloadRequest& request_;
  const DownloadOptions& options_;
  PartFile part_;
  std::string identity_;  // etag, else date of the last change
  Journal journal_;
  std::vector<bool> busy_;
  int failures_ = 0;  // in a row
  Clock::time_point not_before_{}, saved_ = Clock::now();
};

}  // namespace

void download(const DownloadRequest& request, const DownloadOptions& options) {
  // Before anything appears on disk.
  const Remote remote = describe(request, http_probe({request.url, request.token}, options.http));
  Download(request, options).run(remote);
}

}  // namespace duet::hub
