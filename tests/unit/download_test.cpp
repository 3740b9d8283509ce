// Downloads from a server that does not always do as it should.
#include "hub/download.h"

#include <doctest/doctest.h>
#include <fcntl.h>

#include "base/locked_file.h"
#include "base/mapped_file.h"
#include "base/sha256.h"
#include "hub/part_file.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/http_server.h"

using namespace duet;
using namespace duet::hub;
using namespace duet::test;

namespace {

namespace fs = std::filesystem;

const std::string& content() {
  static const std::string text = [] {
    std::string out = "GGUF";
    for (int i = 4; i < 10000; ++i) out += static_cast<char>('a' + i * i % 26);
    return out;
  }();
  return text;
}

std::string sha_of(const std::string& text) {
  const TempFolder folder;
  write_text(folder / "x", text);
  return duet::sha256_of(folder / "x");
}

DownloadOptions quick() {
  DownloadOptions options;
  options.http.first_delay = std::chrono::milliseconds(1);
  options.http.max_delay = std::chrono::milliseconds(20);
  options.http.stall = std::chrono::seconds(2);
  options.chunk_bytes = 1000;
  options.connections = 3;
  options.save_interval = std::chrono::milliseconds(0);
  return options;
}

struct Bench {
  explicit Bench(WebServer::Handler handler) : server(std::move(handler)) {}
  Thrown get(bool with_sha = true, const DownloadOptions& options = quick()) {
    return thrown_by([&] { download({server.url() + "/m.gguf", token, file, std::nullopt, with_sha ? sha_of(content()) : ""}, options); });
  }
  std::string got() const { return read_file(file, 1 << 20); }
  size_t n_files() const { return static_cast<size_t>(std::distance(fs::directory_iterator(folder.path()), {})); }
  bool is_right() const { return n_files() == 1 && got() == content(); }

  TempFolder folder;
  fs::path file = folder / "m.gguf";
  std::string token = {};
  WebServer server;
};

WebReply good(const WebRequest& request) { return file_reply(request, content()); }

bool is_probe(const WebRequest& request) {
  const auto range = request.headers.find("range");
  return range != request.headers.end() && range->second == "bytes=0-0";
}

}  // namespace

TEST_CASE("download: a file comes in ranges and is checked") {
  Bench bench(good);
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
  CHECK(bench.server.n_requests() == 11);  // the probe and ten chunks
}

TEST_CASE("download: connections that break are taken up where they broke") {
  Bench bench([](const WebRequest& request) {
    WebReply reply = good(request);
    if (!is_probe(request)) reply.cut_after = 300;
    return reply;
  });
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
  CHECK(bench.server.n_bytes() == 10001);  // nothing was sent twice
}

TEST_CASE("download: a server that dies is an error, and the next attempt goes on") {
  std::atomic<bool> dead{false};
  Bench bench([&dead](const WebRequest& request) {
    WebReply reply = good(request);
    if (request.number >= 5) dead = true;
    if (dead) reply.cut_after = 0;
    return reply;
  });
  check_thrown(bench.get(), ErrorKind::io, "run the same command again");
  CHECK(!fs::exists(bench.file));
  const std::optional<Partial> partial = partial_download(bench.file);
  REQUIRE(partial);
  CHECK(partial->done >= 1000);
  CHECK(partial->size == 10000);
  WebServer alive(good);
  std::string remark;
  DownloadOptions options = quick();
  options.notice = [&](const std::string& text) { remark = text; };
  download({alive.url() + "/other-name.gguf", "", bench.file, 10000, sha_of(content())}, options);  // the SHA-256 says that it is the same
  CHECK(bench.is_right());
  CHECK(alive.n_bytes() == 10001 - partial->done);
  CHECK(remark.find("going on after") != std::string::npos);
}

TEST_CASE("download: ranges that are not those asked for are refused") {
  const auto lying = [](auto change) {
    return [change](const WebRequest& request) {
      WebReply reply = good(request);
      if (!is_probe(request)) change(reply);
      return reply;
    };
  };
  Bench shifted(lying([](WebReply& reply) { reply.headers.back().second = "bytes 17-1016/10000"; }));
  check_thrown(shifted.get(), ErrorKind::io, "other bytes than it was asked for");
  Bench longer(lying([](WebReply& reply) { reply.body += "more"; }));
  check_thrown(longer.get(), ErrorKind::io, "other bytes than it was asked for");
  Bench shorter(lying([](WebReply& reply) { reply.body.resize(500); }));
  check_thrown(shorter.get(), ErrorKind::io, "other bytes than it was asked for");
  Bench whole(lying([](WebReply& reply) { reply.status = 200; }));
  check_thrown(whole.get(), ErrorKind::io, "other bytes than it was asked for");
  Bench none(lying([](WebReply& reply) { reply.headers.pop_back(); }));
  check_thrown(none.get(), ErrorKind::io, "other bytes than it was asked for");
  Bench other_size(lying([](WebReply& reply) { reply.headers.back().second = reply.headers.back().second.substr(0, reply.headers.back().second.find('/')) + "/99"; }));
  check_thrown(other_size.get(), ErrorKind::io, "has changed meanwhile");
  Bench probe([](const WebRequest& request) {
    WebReply reply = good(request);
    reply.headers.back().second = "bytes 5-5/10000";
    return reply;
  });
  check_thrown(probe.get(), ErrorKind::io, "asked for the first byte and sends another range");
  CHECK(!fs::exists(probe.file));
}

TEST_CASE("download: wrong bytes are thrown away") {
  Bench bench([](const WebRequest& request) {
    WebReply reply = good(request);
    if (request.number == 4) reply.body[10] = '#';
    return reply;
  });
  check_thrown(bench.get(), ErrorKind::format, "SHA-256 is");
  CHECK(bench.n_files() == 0);
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
}

TEST_CASE("download: a server without ranges sends the whole, again after a break") {
  Bench bench([](const WebRequest& request) {
    WebReply reply{200, {}, content()};
    if (request.number == 1) reply.cut_after = 5000;
    return reply;
  });
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
  CHECK(bench.server.n_requests() == 3);
}

TEST_CASE("download: more than was announced is refused") {
  Bench bench([](const WebRequest&) { return WebReply{200, {}, content()}; });
  check_thrown(thrown_by([&] { download({bench.server.url() + "/m.gguf", "", bench.file, 9000, ""}, quick()); }), ErrorKind::format, "9000 were announced");
  CHECK(bench.n_files() == 0);
  Bench endless([](const WebRequest& request) {
    return request.number == 0 ? WebReply{200, {{"Content-Length", "100"}}, content()} : WebReply{200, {}, content()};
  });
  check_thrown(endless.get(), ErrorKind::format, "more than the 100 bytes");
}

TEST_CASE("download: refusals say what to do and leave nothing") {
  const auto refused = [](int status, const std::string& words, const std::string& token = "") {
    Bench bench([status](const WebRequest&) { return WebReply{status, {}, "<html>no</html>"}; });
    bench.token = token;
    CAPTURE(status);
    check_thrown(bench.get(), ErrorKind::io, words);
    CHECK(bench.n_files() == 0);
    return bench.server.n_requests();
  };
  CHECK(refused(401, "set HF_TOKEN") == 1);
  CHECK(refused(403, "does not open it", "secret") == 1);
  CHECK(refused(404, "nothing of that name") == 1);
  CHECK(refused(429, "try again later") == 5);
  CHECK(refused(503, "status 503") == 5);
  CHECK(thrown_by([] { download({"http://127.0.0.1:1/m.gguf", "", TempFolder() / "m.gguf", std::nullopt, ""}, quick()); }).kind == ErrorKind::io);
}

TEST_CASE("download: a server that is busy for a while is asked again, as late as it says") {
  Bench bench([](const WebRequest& request) {
    return request.number % 2 == 0 ? WebReply{request.number % 4 == 0 ? 429 : 503, {{"Retry-After", "1"}}, ""} : good(request);
  });
  DownloadOptions options = quick();
  options.connections = 1;
  CHECK(bench.get(true, options).message == "");
  CHECK(bench.is_right());
  HttpHead head;
  head.retry_after = std::chrono::seconds(7);
  HttpOptions http;
  CHECK(retry_delay(http, 1, head) == std::chrono::seconds(7));
  head.retry_after = std::chrono::seconds(3000);
  CHECK(retry_delay(http, 1, head) == http.max_delay);
  CHECK(retry_delay(http, 3, {}) == 4 * http.first_delay);
}

TEST_CASE("download: a redirect is followed, without the token to another host") {
  std::atomic<bool> leaked{false}, sent{false};
  WebServer other([&](const WebRequest& request) {
    if (request.headers.count("authorization") > 0) leaked = true;
    return good(request);
  });
  Bench bench([&](const WebRequest& request) {
    const auto token = request.headers.find("authorization");
    if (token != request.headers.end() && token->second == "Bearer secret") sent = true;
    return WebReply{302, {{"Location", other.url() + "/blob?signed=1"}}, ""};
  });
  bench.token = "secret";
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
  CHECK(sent);
  CHECK(!leaked);
  Bench loop([](const WebRequest& request) { return WebReply{302, {{"Location", request.target}}, ""}; });
  check_thrown(loop.get(), ErrorKind::io, "redirects");
  Bench elsewhere([](const WebRequest&) { return WebReply{302, {{"Location", "file:///etc/passwd"}}, ""}; });
  CHECK(elsewhere.get().kind == ErrorKind::io);
  CHECK(elsewhere.n_files() == 0);
}

TEST_CASE("download: without a SHA-256 the server's tag tells whether it is the same file") {
  std::atomic<int> mode{0};
  Bench bench([&mode](const WebRequest& request) {
    WebReply reply = file_reply(request, content(), mode == 2 ? "\"two\"" : "\"one\"");
    if (mode == 0 && request.number > 4) reply.cut_after = 0;
    return reply;
  });
  check_thrown(bench.get(false), ErrorKind::io, "run the same command again");
  const std::optional<Partial> partial = partial_download(bench.file);
  REQUIRE(partial);
  mode = 1;
  const size_t before = bench.server.n_bytes();
  CHECK(bench.get(false).message == "");
  CHECK(bench.server.n_bytes() - before == 10001 - partial->done);
  CHECK(bench.is_right());
}

TEST_CASE("download: a file that changed on the server is fetched anew, and refused while it changes") {
  std::atomic<size_t> changes{5};
  Bench bench([&changes](const WebRequest& request) { return file_reply(request, content(), request.number < changes ? "\"one\"" : "\"two\""); });
  check_thrown(bench.get(false), ErrorKind::io, "has changed meanwhile");
  CHECK(partial_download(bench.file));
  std::string remark;
  DownloadOptions options = quick();
  options.notice = [&](const std::string& text) { remark = text; };
  CHECK(bench.get(false, options).message == "");
  CHECK(remark.find("is another one now") != std::string::npos);
  CHECK(bench.is_right());
}

TEST_CASE("download: an interruption keeps what has arrived") {
  std::atomic<bool> cancel{false};
  Bench bench([](const WebRequest& request) {
    WebReply reply = good(request);
    reply.bytes_per_s = is_probe(request) ? 0 : 2000;
    return reply;
  });
  DownloadOptions options = quick();
  options.http.cancel = &cancel;
  options.progress = [&](uint64_t done, uint64_t, const char*) { cancel = done > 500; };
  CHECK(bench.get(true, options).kind == ErrorKind::cancelled);
  const std::optional<Partial> partial = partial_download(bench.file);
  REQUIRE(partial);
  CHECK(partial->done > 500);
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
}

TEST_CASE("download: a journal that cannot be trusted counts for nothing") {
  for (const char* journal : {"", "{", "[]", R"({"format":"duet-download","version":1})",
                              R"({"format":"duet-download","version":1,"url":"","etag":"","sha256":"","size":10000,"chunk_bytes":0,"done":[]})",
                              R"({"format":"duet-download","version":1,"url":"","etag":"","sha256":"","size":18446744073709551615,"chunk_bytes":1,"done":[1]})",
                              R"({"format":"duet-download","version":1,"url":"","etag":"","sha256":"","size":10000,"chunk_bytes":10000,"done":[10001]})",
                              R"({"format":"duet-download","version":1,"url":"","etag":"","sha256":"","size":10000,"chunk_bytes":10000,"done":[-1]})"}) {
    CAPTURE(journal);
    Bench bench(good);
    write_text(bench.file.string() + ".part.json", journal);
    write_text(bench.file.string() + ".part", std::string(10000, 'x'));
    CHECK(!partial_download(bench.file));
    CHECK(bench.get().message == "");
    CHECK(bench.is_right());
  }
}

TEST_CASE("download: one at a time, and only where there is room") {
  Bench bench(good);
  {
    const PartFile held(bench.file);
    check_thrown(bench.get(), ErrorKind::io, "another duet pull is at work");
  }
  CHECK(bench.get().message == "");
  Bench huge([](const WebRequest&) { return WebReply{206, {{"Content-Range", "bytes 0-0/8796093022208"}}, "x"}; });
  check_thrown(huge.get(false), ErrorKind::io, "the disk has");
  CHECK(huge.n_files() == 0);
  Bench absurd([](const WebRequest&) { return WebReply{206, {{"Content-Range", "bytes 0-0/18446744073709551615"}}, "x"}; });
  check_thrown(absurd.get(false), ErrorKind::format, "is no model");
}

TEST_CASE("download: no room for the rest keeps what had arrived") {
  std::atomic<bool> dead{true};
  Bench bench([&dead](const WebRequest& request) {
    WebReply reply = file_reply(request, content());
    if (dead && request.number > 4) reply.cut_after = 0;
    if (!dead) reply.headers.back().second = "bytes 0-0/8796093022208";
    return reply;
  });
  check_thrown(bench.get(), ErrorKind::io, "run the same command again");
  dead = false;
  Journal journal = *PartFile(bench.file).journal();
  journal.size = uint64_t{8} << 40;
  journal.chunk_bytes = journal.size;
  journal.done = {1000};
  {
    PartFile part(bench.file);
    fs::resize_file(part.path(), journal.size);  // of holes
    part.save(journal);
  }
  check_thrown(bench.get(), ErrorKind::io, "the disk has");
  CHECK(partial_download(bench.file)->done == 1000);
}

TEST_CASE("download: another one that ends just now leaves nothing to do") {
  fs::path file;
  Bench bench([&file](const WebRequest& request) {
    if (is_probe(request)) write_text(file, content());  // after the caller's look
    return good(request);
  });
  file = bench.file;
  CHECK(bench.get().message == "");
  CHECK(bench.is_right());
  CHECK(bench.server.n_requests() == 1);
}

TEST_CASE("download: what is no GGUF file is not kept when no SHA-256 tells") {
  const std::string page = "<html>Sign in to this network</html>";
  for (const bool has_ranges : {true, false}) {
    Bench bench([&](const WebRequest& request) { return has_ranges ? file_reply(request, page) : WebReply{200, {}, page}; });
    check_thrown(bench.get(false), ErrorKind::format, "is no GGUF file, it begins with '<html>Sign in to");
    CHECK(bench.n_files() == 0);
  }
}

TEST_CASE("a file is locked under the name that it has then") {
  const TempFolder folder;
  const fs::path part = folder / "m.part";
  int n_opened = 0;
  {
    const FileDescriptor file = open_locked(part, [&] {
      if (n_opened++ > 0) return;
      write_text(part, "complete");  // by the process that has it, and is done
      fs::rename(part, folder / "m");
    });
    REQUIRE(file.is_open());
    CHECK(n_opened == 2);
    CHECK(identify(file.get())->inode != identify(FileDescriptor(::open((folder / "m").c_str(), O_RDONLY)).get())->inode);
    CHECK(fs::file_size(part) == 0);
    CHECK(!open_locked(part).is_open());
  }
  CHECK(open_locked(part).is_open());
  CHECK(read_file(folder / "m", 100) == "complete");
  fs::create_symlink(folder / "m", folder / "link");
  CHECK(thrown_by([&] { open_locked(folder / "link"); }).kind == ErrorKind::io);
}
