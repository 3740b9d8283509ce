// What can go wrong with the file and the kernel while experts stream: a clear error or a slower way,
// never another output.
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "runtime/engine.h"
#include "tests/support/errors.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"
#include "tests/support/skip.h"

using namespace duet;
using namespace duet::test;
namespace fs = std::filesystem;

namespace {

constexpr uint32_t kTokens = 40;

RandomModel random_model(uint64_t seed = 1) {
  return {.hparams = small_mixtral_hparams(3, 256), .seed = seed, .type = [](const std::string&) { return DType::Q4_K; }};
}

// A model file of this test, the same bytes each time.
fs::path model_file(uint64_t seed = 1) { return write_model(random_model(seed), concat("faults-", seed, ".gguf")); }
std::vector<Token> tokens() { return some_tokens(kTokens, random_model().hparams.n_vocab); }

Engine open(const fs::path& path, const StreamOptions& stream = {}) {
  MemoryOptions memory{.n_ctx = kTokens, .n_batch = kTokens};
  memory.slots = 2;
  return Engine::open(path, {.n_threads = 2, .isa = {}, .notice = {}, .memory = memory, .stream = stream});
}

std::vector<float> logits_of(const Engine& engine) {
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 4});
  return all_logits(session, tokens());
}
std::vector<float> resident_logits(const fs::path& path) { return logits_of(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}})); }

bool contains(const std::string& text, const char* words) { return text.find(words) != text.npos; }

// Evaluates tokens until one fails; how many did not.
struct Broken {
  size_t n_evaluated = 0;
  Thrown thrown;
};
Broken run_until_error(Session& session) {
  const auto all = tokens();
  Broken out;
  out.thrown = thrown_by([&] {
    for (size_t i = session.tokens().size(); i < all.size(); ++i) session.append({&all[i], 1});
  });
  out.n_evaluated = session.tokens().size();
  return out;
}

// io_uring_setup fails for this thread and those it starts, as in a container. False: not possible here.
bool deny_io_uring() {
  std::array<sock_filter, 4> code{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),  // the number of the call
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  sock_fprog program{static_cast<unsigned short>(code.size()), code.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace

TEST_CASE("stream faults: short reads everywhere") {
  const fs::path path = model_file();
  for (const ReadBackend backend : {ReadBackend::automatic, ReadBackend::pread, ReadBackend::buffered}) {
    std::atomic<uint64_t> n_short{0};
    StreamOptions stream{.backend = backend};
    stream.fault = [&](uint64_t attempt, size_t n_bytes) {
      if (attempt == 0 || n_bytes < 2) return 0;
      ++n_short;
      return attempt % 3 == 0 ? -static_cast<int>(n_bytes / 2) : attempt % 3 == 1 ? -4096 : 0;
    };
    const Engine engine = open(path, stream);
    CHECK(same_bits(logits_of(engine), resident_logits(path)));
    CHECK(n_short > 0);
  }
}

TEST_CASE("stream faults: io_uring denied by the system, read with pread") {
  const fs::path path = model_file();
  bool denied = false;
  std::string backend;
  std::vector<float> got;
  Thrown asked;
  std::thread([&] {  // a filter cannot be taken off again
    if (!(denied = deny_io_uring())) return;
    const Engine engine = open(path);
    backend = engine.stream_stats()->backend;
    got = logits_of(engine);
    asked = thrown_by([&] { open(path, {.backend = ReadBackend::io_uring}); });
  }).join();
  if (!denied) DUET_SKIP("no system call filters here");
  CHECK(backend.starts_with("pread, "));
  CHECK(same_bits(got, resident_logits(path)));
  check_thrown(asked, ErrorKind::unsupported, "io_uring");
}

TEST_CASE("stream faults: direct reads refused when opening, or at the first read, go through the page cache and say so") {
  const fs::path path = model_file();
  const auto want = resident_logits(path);
  StreamOptions stream;
  stream.fault = [](uint64_t attempt, size_t n_bytes) { return attempt == 0 && n_bytes > 0 ? EINVAL : 0; };
  const Engine buffered = open(path, stream);
  CHECK(buffered.stream_stats()->backend == "pread, buffered");
  CHECK(same_bits(logits_of(buffered), want));

  if (!contains(open(path).stream_stats()->backend, "direct")) DUET_SKIP("no direct reads here");
  for (const ReadBackend backend : {ReadBackend::automatic, ReadBackend::pread}) {
    std::atomic<bool> refused{false};
    stream = {.backend = backend};
    stream.fault = [&](uint64_t attempt, size_t) { return attempt > 0 && !refused.exchange(true) ? EINVAL : 0; };
    const Engine engine = open(path, stream);
    refused = false;  // once for the dense weights, once for the experts
    CHECK(same_bits(logits_of(engine), want));
    CHECK(contains(engine.stream_stats()->backend, ", 1 reads refused"));
  }
}

TEST_CASE("stream faults: a file cut short while running is an error, and the session stays where it stood") {
  const fs::path path = model_file(2);
  const Engine engine = open(path);
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1});
  const auto all = tokens();
  session.append({all.data(), 5});
  fs::resize_file(path, fs::file_size(path) / 2);
  for (int again = 0; again < 2; ++again) {
    const Broken broken = run_until_error(session);
    REQUIRE(broken.thrown.kind == ErrorKind::io);
    CHECK((contains(broken.thrown.message, "has become shorter") || contains(broken.thrown.message, "was changed")));
    CHECK(broken.n_evaluated >= 5);
    CHECK(broken.n_evaluated < kTokens);
  }
  check_thrown(thrown_by([&] { open(path); }), ErrorKind::format, "");
}

TEST_CASE("stream faults: a file replaced while running is read on as it was") {
  const fs::path path = model_file(3);
  const auto want = resident_logits(path);
  const Engine engine = open(path);
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 4});
  const auto all = tokens();
  const fs::path other = model_file(4);
  const auto other_logits = resident_logits(other);
  fs::rename(other, path);
  CHECK(same_bits(all_logits(session, all), want));
  CHECK(same_bits(logits_of(open(path)), other_logits));
  CHECK_FALSE(same_bits(want, other_logits));
}

TEST_CASE("stream faults: a file written to while running is an error at the next token") {
  const fs::path path = model_file(5), other = model_file(6);
  REQUIRE(fs::file_size(path) == fs::file_size(other));
  const Engine engine = open(path);
  Session session = engine.new_session({.n_ctx = kTokens, .n_batch = 1});
  const auto all = tokens();
  session.append({all.data(), 5});
  fs::copy_file(other, path, fs::copy_options::overwrite_existing);
  const Broken broken = run_until_error(session);
  check_thrown(broken.thrown, ErrorKind::io, "was changed while it was being read");
  CHECK(broken.n_evaluated == 5);
  CHECK(same_bits(logits_of(open(path)), resident_logits(other)));
}

TEST_CASE("stream faults: a file replaced or changed between parsing and reading is refused") {
  for (const bool in_place : {false, true}) {
    CAPTURE(in_place);
    const fs::path path = model_file(7), other = model_file(8);
    std::atomic<bool> done{false};
    StreamOptions stream;
    stream.fault = [&](uint64_t attempt, size_t) {  // while the dense weights are read, before the experts' reader opens
      if (attempt == 0 || done.exchange(true)) return 0;
      if (in_place) fs::copy_file(other, path, fs::copy_options::overwrite_existing);
      else fs::rename(other, path);
      return 0;
    };
    check_thrown(thrown_by([&] { open(path, stream); }), ErrorKind::io, "changed or replaced");
    CHECK(done);
    CHECK(same_bits(logits_of(open(path)), resident_logits(path)));
  }
}
