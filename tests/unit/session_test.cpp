// The forward pass and the session rules on small random models, against a naive double-precision
// reference (tests/support/reference_model) and against themselves.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "runtime/engine.h"
#include "runtime/kernels/kernels.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"
#include "tests/support/reference_model.h"

using namespace duet;
using test::RandomModel;
using test::some_tokens;
using test::tiny_hparams;

namespace {

struct Run {
  uint32_t n_batch = 512;
  int n_threads = 1;
  KvType kv_type = KvType::f32;
  std::string isa = {};
};

Engine open(const std::filesystem::path& path, const Run& run = {}) {
  return Engine::open(path, {.n_threads = run.n_threads, .isa = run.isa, .notice = {}});
}

Session session_of(const Engine& engine, const Run& run = {}) {
  return engine.new_session({.n_ctx = 128, .n_batch = run.n_batch, .kv_type = run.kv_type});
}

// All logits of `tokens`, [n_tokens, n_vocab].
std::vector<float> all_logits(const std::filesystem::path& path, std::span<const Token> tokens, const Run& run = {}) {
  const Engine engine = open(path, run);
  Session session = session_of(engine, run);
  return test::all_logits(session, tokens);
}

double max_difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::abs(double{a[i]} - double{b[i]});
    worst = d <= worst ? worst : d;
  }
  return worst;
}

// Against the reference, in one batch, in small batches and token by token, on every ISA.
void check_reference(const RandomModel& model, const std::string& name, double tolerance = 1e-3, size_t n_tokens = 37) {
  const auto path = test::write_model(model, name);
  const GgufFile file = GgufFile::open(path);
  const HParams hparams = read_hparams(file, [](const std::string&) {});
  const auto tokens = some_tokens(n_tokens, hparams.n_vocab);
  const test::Matrix reference = test::reference_logits(file, hparams, tokens);
  std::vector<float> want;
  for (const auto& row : reference)
    for (const double x : row) want.push_back(static_cast<float>(x));
  for (const KernelTable* table : usable_kernels())
    for (const uint32_t n_batch : {1u, 5u, 512u}) {
      CAPTURE(name);
      CAPTURE(table->isa);
      CAPTURE(n_batch);
      CHECK(max_difference(all_logits(path, tokens, {.n_batch = n_batch, .isa = table->isa}), want) <= tolerance);
    }
}

template <class Call>
std::string error_of(ErrorKind kind, const Call& call) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(e.kind() == kind);
    return e.what();
  }
  FAIL("no error");
  return {};
}

}  // namespace

TEST_CASE("3f-7 router: experts 4 and 8, used 1 to 3, equal the reference") {
  for (const uint32_t n_expert : {4u, 8u})
    for (const uint32_t n_used : {1u, 2u, 3u}) {
      HParams h = tiny_hparams();
      h.n_expert = n_expert;
      h.n_expert_used = n_used;
      check_reference({.hparams = h}, "session-experts.gguf", 1e-3, 20);
    }
}

TEST_CASE("forward: dense equals the reference") {
  HParams h = tiny_hparams();
  h.n_expert = h.n_expert_used = 0;
  check_reference({.hparams = h}, "session-dense.gguf");
}

TEST_CASE("forward: head groups of 1, 2 and 4 equal the reference") {
  for (const uint32_t n_head_kv : {4u, 2u, 1u}) {
    HParams h = tiny_hparams();
    h.n_head_kv = n_head_kv;
    check_reference({.hparams = h}, "session-gqa.gguf");
  }
}

TEST_CASE("forward: heads wider than the rotation, linear scale and factors equal the reference") {
  HParams h = tiny_hparams();
  h.head_dim = 24;  // n_head * head_dim != n_embd
  h.n_rot = 8;
  h.rope_scale = 0.25f;
  check_reference({.hparams = h}, "session-rot.gguf");
  check_reference({.hparams = tiny_hparams(), .rope_factors = true}, "session-factors.gguf");
}

TEST_CASE("forward: a sliding window equals the reference") {
  for (const uint32_t window : {1u, 4u, 16u, 100u}) {
    HParams h = tiny_hparams();
    h.n_expert = h.n_expert_used = 0;
    h.sliding_window = window;
    check_reference({.hparams = h}, "session-window.gguf", 1e-3, 50);
  }
}

TEST_CASE("forward: tied output and half-precision norms and router equal the reference") {
  HParams h = tiny_hparams();
  h.tied_output = true;
  for (const DType small : {DType::F16, DType::BF16})
    check_reference({.hparams = h, .type = [](const std::string&) { return DType::F16; }, .small_type = small}, "session-tied.gguf");
}

TEST_CASE("forward: integer dot products stay near the reference") {
  const auto q8 = [](const std::string&) { return DType::Q8_0; };
  check_reference({.hparams = tiny_hparams(), .type = q8}, "session-q8.gguf", 0.15);
}

TEST_CASE("forward: formats mixed per tensor and per expert equal the reference") {
  const auto type = [](const std::string& name) {
    if (name.find(".1.weight") != name.npos) return DType::F16;
    if (name.find("attn_k") != name.npos || name.find(".2.weight") != name.npos) return DType::BF16;
    return DType::F32;
  };
  check_reference({.hparams = tiny_hparams(), .split_experts = true, .type = type}, "session-mixed.gguf");
}

TEST_CASE("forward: mixed integer and float experts run in both layouts with the same bits") {
  const auto type = [](const std::string& name) { return name.find("ffn_") != name.npos ? DType::Q8_0 : DType::BF16; };
  const auto tokens = some_tokens(40, 97);
  const auto merged = all_logits(test::write_model({.hparams = tiny_hparams(), .type = type}, "session-m.gguf"), tokens);
  const auto split = all_logits(test::write_model({.hparams = tiny_hparams(), .split_experts = true, .type = type}, "session-s.gguf"), tokens);
  CHECK(merged == split);
}

TEST_CASE("forward: one thread and many give the same bits") {
  HParams h = tiny_hparams();
  h.n_embd = 128;  // wide enough that work is shared
  h.n_ff = 256;
  h.head_dim = h.n_rot = 32;
  for (const DType dtype : {DType::F32, DType::BF16, DType::Q8_0}) {
    const auto path = test::write_model({.hparams = h, .type = [=](const std::string&) { return dtype; }}, "session-threads.gguf");
    const auto tokens = some_tokens(20, 97);
    for (const uint32_t n_batch : {1u, 15u}) {
      const auto one = all_logits(path, tokens, {.n_batch = n_batch, .n_threads = 1});
      for (const int n_threads : {2, 3}) CHECK(all_logits(path, tokens, {.n_batch = n_batch, .n_threads = n_threads}) == one);
    }
  }
}

TEST_CASE("session: prefill in pieces of any size equals one by one") {
  const auto path = test::write_model({.hparams = tiny_hparams(), .type = [](const std::string&) { return DType::Q8_0; }}, "session-chunks.gguf");
  const auto tokens = some_tokens(60, 97);
  const auto single = all_logits(path, tokens, {.n_batch = 1});
  for (const uint32_t n_batch : {2u, 7u, 32u, 60u}) CHECK(all_logits(path, tokens, {.n_batch = n_batch}) == single);
}

TEST_CASE("session: half-precision keys and values stay near") {
  const auto path = test::write_model({.hparams = tiny_hparams()}, "session-kv.gguf");
  const auto tokens = some_tokens(60, 97);
  const double d = max_difference(all_logits(path, tokens, {.kv_type = KvType::f16}), all_logits(path, tokens));
  CHECK(d > 0);
  CHECK(d <= 0.02);
}

TEST_CASE("session: sync reuses the common prefix and equals a fresh session") {
  const Engine engine = open(test::write_model({.hparams = tiny_hparams()}, "session-sync.gguf"));
  const auto a = some_tokens(50, 97);
  auto b = a;
  for (size_t i = 30; i < b.size(); ++i) b[i] = (b[i] + 1) % 97;
  Session reused = session_of(engine), fresh = session_of(engine);
  reused.sync(a);
  size_t total = 0;
  reused.sync(b, [&](size_t, size_t n) { total = n; });
  CHECK(total == 20);
  fresh.sync(b);
  const std::vector<float> x(reused.logits().begin(), reused.logits().end()), y(fresh.logits().begin(), fresh.logits().end());
  CHECK(max_difference(x, y) <= 1e-4);
  CHECK(std::equal(b.begin(), b.end(), reused.tokens().begin(), reused.tokens().end()));

  reused.sync(b, [&](size_t, size_t n) { total = n; });  // the same again: the last token only
  CHECK(total == 1);
  reused.sync(std::span(b).first(10), [&](size_t, size_t n) { total = n; });  // shorter
  CHECK(total == 1);
  CHECK(reused.tokens().size() == 10);
}

TEST_CASE("session: append continues, truncate cuts back") {
  const Engine engine = open(test::write_model({.hparams = tiny_hparams()}, "session-append.gguf"));
  const auto tokens = some_tokens(40, 97);
  Session session = session_of(engine);
  CHECK_THROWS_AS(session.logits(), Error);
  session.append(tokens);
  const std::vector<float> want(session.logits().begin(), session.logits().end());
  session.truncate(25);
  CHECK(session.tokens().size() == 25);
  CHECK_THROWS_AS(session.logits(), Error);
  for (size_t i = 25; i < 40; ++i) session.append(std::span(tokens).subspan(i, 1));
  const std::vector<float> got(session.logits().begin(), session.logits().end());
  CHECK(max_difference(got, want) <= 1e-4);
  session.append({});
  CHECK(session.tokens().size() == 40);
}

TEST_CASE("session: logits of all tokens come in order, without the skipped ones") {
  const Engine engine = open(test::write_model({.hparams = tiny_hparams()}, "session-all.gguf"));
  const auto tokens = some_tokens(90, 97);
  for (const uint32_t n_batch : {16u, 512u}) {
    Session session = session_of(engine, {.n_batch = n_batch});
    size_t next = 37;
    std::vector<float> last;
    session.append_all_logits(
        tokens,
        [&](size_t first, size_t n_rows, std::span<const float> logits) {
          CHECK(first == next);
          CHECK(logits.size() == n_rows * 97);
          next += n_rows;
          last.assign(logits.end() - 97, logits.end());
        },
        37);
    CHECK(next == 90);
    const std::vector<float> want(session.logits().begin(), session.logits().end());
    CHECK(max_difference(last, want) <= 1e-4);
  }
}

TEST_CASE("session: too many tokens and foreign ids are refused and change nothing") {
  const Engine engine = open(test::write_model({.hparams = tiny_hparams()}, "session-limits.gguf"));
  Session session = engine.new_session({.n_ctx = 20});
  CHECK(session.n_ctx() == 20);
  const auto tokens = some_tokens(30, 97);
  session.append(std::span(tokens).first(15));
  const std::string text = error_of(ErrorKind::usage, [&] { session.append(std::span(tokens).first(6)); });
  CHECK(text.find("21") != text.npos);
  CHECK(text.find("20") != text.npos);
  error_of(ErrorKind::usage, [&] { session.sync(tokens); });
  for (const Token bad : {-1, 97, 1 << 30}) {
    const std::string message = error_of(ErrorKind::usage, [&] { session.append({&bad, 1}); });
    CHECK(message.find(std::to_string(bad)) != message.npos);
  }
  error_of(ErrorKind::usage, [&] { session.sync({}); });
  CHECK(session.tokens().size() == 15);
  CHECK(session.logits().size() == 97);
  session.append(std::span(tokens).first(5));
  CHECK(session.tokens().size() == 20);
}

TEST_CASE("session: cancel stops between layers and leaves complete batches") {
  const Engine engine = open(test::write_model({.hparams = tiny_hparams()}, "session-cancel.gguf"));
  std::atomic<bool> cancel{false};
  Session session = engine.new_session({.n_ctx = 64, .n_batch = 8, .cancel = &cancel});
  const auto tokens = some_tokens(40, 97);
  error_of(ErrorKind::cancelled, [&] {
    session.sync(tokens, [&](size_t done, size_t) { cancel = done >= 16; });
  });
  CHECK(session.tokens().size() == 16);
  cancel = false;
  session.sync(tokens);
  Session fresh = engine.new_session({.n_ctx = 64, .n_batch = 8});
  fresh.sync(tokens);
  CHECK(std::equal(session.logits().begin(), session.logits().end(), fresh.logits().begin()));
}

TEST_CASE("session: a context that cannot fit is refused with the numbers") {
  const Engine engine = open(test::write_model({.hparams = tiny_hparams()}, "session-memory.gguf"));
  const std::string text = error_of(ErrorKind::memory, [&] { engine.new_session({.n_ctx = 4000000000u}); });
  CHECK(text.find("1024000000000 bytes") != text.npos);  // 2 (k, v) x 2 layers x 2 heads x 16 x 2 bytes x positions
}

TEST_CASE("session: contexts beyond the training length are allowed with a notice") {
  std::string notice;
  const auto path = test::write_model({.hparams = tiny_hparams()}, "session-notice.gguf");
  const Engine engine = Engine::open(path, {.n_threads = 1, .isa = {}, .notice = [&](const std::string& s) { notice = s; }});
  notice.clear();
  CHECK(engine.new_session({}).n_ctx() == 256);
  CHECK(notice.empty());
  CHECK(engine.new_session({.n_ctx = 300}).n_ctx() == 300);
  CHECK(notice.find("256") != notice.npos);
}
