// Keys and values kept in files: what comes back is what was evaluated, whatever has happened to the folder.
#include <doctest/doctest.h>

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "base/mapped_file.h"
#include "formats/gguf.h"
#include "server/prefix_store.h"
#include "tests/support/errors.h"
#include "tests/support/logits.h"
#include "tests/support/random_model.h"

using namespace duet;
using namespace duet::server;
using test::some_tokens;

namespace {

namespace fs = std::filesystem;

constexpr size_t kTokens = 600;  // two blocks and a part

struct Place {
  explicit Place(const char* name) : model(model_file(name)), folder(fs::path(DUET_TEST_DIR) / (std::string(name) + ".kv")) { fs::remove_all(folder); }
  ~Place() { fs::remove_all(folder); }
  static fs::path model_file(const std::string& name) {
    test::RandomModel random;
    random.hparams = test::small_mixtral_hparams(2, 512);
    random.type = [](const std::string&) { return DType::Q4_K; };
    return test::write_model(random, (name + ".gguf").c_str());
  }
  PrefixStore open(const std::string& identity = "a model", uint64_t max_bytes = 1 << 30) {
    return PrefixStore({.folder = folder, .max_bytes = max_bytes, .version = "1", .notice = [this](const std::string& text) { notes.push_back(text); }}, identity, 2);
  }
  std::vector<fs::path> files() const {
    std::vector<fs::path> out;
    for (const auto& entry : fs::directory_iterator(folder)) out.push_back(entry.path());
    std::sort(out.begin(), out.end());
    return out;
  }

  fs::path model, folder;
  std::vector<std::string> notes;
};

struct Evaluated {
  Evaluated(const Engine& engine, KvType type, std::span<const Token> tokens) : batch(engine, {.n_ctx = 1024, .n_batch = 512, .kv_type = type}), sequence(batch.new_sequence()) { append(tokens); }
  void append(std::span<const Token> tokens) {
    while (!tokens.empty()) {
      const size_t n = std::min<size_t>(tokens.size(), 512);
      const Batch::Part part{&sequence, tokens.first(n)};
      batch.evaluate({&part, 1});
      tokens = tokens.subspan(n);
      last_row = n - 1;
    }
  }
  std::vector<float> logits() {
    const auto out = batch.logits({&last_row, 1});
    return {out.begin(), out.end()};
  }
  Batch batch;
  Sequence sequence;
  size_t last_row = 0;
};

size_t store_all(PrefixStore& store, const Sequence& sequence) {
  size_t block = 0;
  while (store.store(sequence, block)) ++block;
  return block;
}

bool same_bits(std::span<const float> a, std::span<const float> b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0; }

void change_byte(const fs::path& path, uint64_t at) {
  at = std::min<uint64_t>(at, fs::file_size(path) - 1);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(at));
  const char old = static_cast<char>(file.get());
  file.seekp(static_cast<std::streamoff>(at));
  file.put(static_cast<char>(old ^ 1));
}

unsigned mode_of(const fs::path& path) {
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 0777;
}

}  // namespace

TEST_CASE("prefix store: a sequence that was loaded goes on as the one that was evaluated, to the bit") {
  Place place("prefix_round");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto tokens = some_tokens(kTokens, engine.info().hparams.n_vocab);
  for (const KvType type : {KvType::f16, KvType::f32, KvType::q8_0}) {
    CAPTURE(static_cast<int>(type));
    fs::remove_all(place.folder);
    const std::vector<Token> held(tokens.begin(), tokens.end() - 1);
    Evaluated first(engine, type, held);
    {
      PrefixStore store = place.open();
      CHECK(store_all(store, first.sequence) == 3);
      CHECK(store.n_blocks() == 3);
    }
    first.append({&tokens.back(), 1});
    for (const size_t n_held : {size_t{0}, size_t{100}, size_t{256}, size_t{300}}) {
      CAPTURE(n_held);
      PrefixStore store = place.open();
      Evaluated second(engine, type, std::span(tokens).first(n_held));
      CHECK(store.extend(second.sequence, held) == held.size() - n_held);
      CHECK(std::ranges::equal(second.sequence.tokens(), held));
      second.append({&tokens.back(), 1});
      CHECK(same_bits(second.logits(), first.logits()));
    }
  }
  CHECK(place.notes.empty());
}

TEST_CASE("prefix store: a prompt that departs from what is stored takes what is common") {
  Place place("prefix_departs");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  auto tokens = some_tokens(kTokens, engine.info().hparams.n_vocab);
  PrefixStore store = place.open();
  store_all(store, Evaluated(engine, KvType::f16, tokens).sequence);
  tokens[400] = tokens[400] == 7 ? 8 : 7;
  Evaluated loaded(engine, KvType::f16, {}), whole(engine, KvType::f16, tokens);
  CHECK(store.extend(loaded.sequence, tokens) == 400);
  loaded.append(std::span(tokens).subspan(400));
  CHECK(same_bits(loaded.logits(), whole.logits()));
  CHECK(store_all(store, whole.sequence) == 3);
  CHECK(store.n_blocks() == 5);  // the first is common to both
  tokens[5] = tokens[5] == 7 ? 8 : 7;
  Evaluated little(engine, KvType::f16, {});
  CHECK(store.extend(little.sequence, tokens) == 0);  // five tokens are not worth it
}

TEST_CASE("prefix store: a conversation that has gone on replaces its last block") {
  Place place("prefix_grows");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto tokens = some_tokens(kTokens, engine.info().hparams.n_vocab);
  Evaluated growing(engine, KvType::f16, std::span(tokens).first(300));
  PrefixStore store = place.open();
  CHECK(store_all(store, growing.sequence) == 2);
  const auto before = place.files();
  growing.append(std::span(tokens).subspan(300, 50));
  CHECK(store_all(store, growing.sequence) == 2);
  CHECK(store.n_blocks() == 2);
  CHECK(place.files().size() == 2);
  CHECK(place.files() != before);
  growing.sequence.truncate(280);  // what is stored already is not stored again
  store_all(store, growing.sequence);
  CHECK(place.files().size() == 2);
}

TEST_CASE("prefix store: damaged and strange files are ignored with a note, then replaced") {
  Place place("prefix_damage");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto tokens = some_tokens(kTokens, engine.info().hparams.n_vocab);
  const Evaluated whole(engine, KvType::f16, tokens);
  { PrefixStore store = place.open(); store_all(store, whole.sequence); }
  const auto files = place.files();
  REQUIRE(files.size() == 3);
  const std::string intact = read_file(files[0], 1 << 30);
  std::vector<uint64_t> places{0, 9, 40, 44, 60, intact.size() - 1};
  for (uint64_t at = 100; at < intact.size(); at += intact.size() / 13) places.push_back(at);
  for (const uint64_t at : places) {
    CAPTURE(at);
    place.notes.clear();
    for (const fs::path& file : files) change_byte(file, at);
    PrefixStore store = place.open();
    Evaluated loaded(engine, KvType::f16, {});
    CHECK(store.extend(loaded.sequence, tokens) == 0);
    CHECK(loaded.sequence.tokens().empty());
    if (at < 8 || at >= 40) CHECK(place.notes.size() == 1);  // else they look like those of another model
    for (const fs::path& file : files) change_byte(file, at);
  }
  for (const size_t n : {size_t{0}, size_t{30}, size_t{50}, size_t{1000}, intact.size() - 1}) {
    for (const fs::path& file : files) fs::resize_file(file, std::min<uintmax_t>(n, fs::file_size(file) - 1));
    PrefixStore store = place.open();
    Evaluated loaded(engine, KvType::f16, {});
    CHECK(store.extend(loaded.sequence, tokens) == 0);
    CHECK(store_all(store, whole.sequence) == 3);
    CHECK(store.extend(loaded.sequence, tokens) == kTokens);
  }
  CHECK(read_file(files[0], 1 << 30) == intact);
}

TEST_CASE("prefix store: files of other models, links, folders and other names are left alone") {
  Place place("prefix_foreign");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto tokens = some_tokens(300, engine.info().hparams.n_vocab);
  const Evaluated whole(engine, KvType::f16, tokens);
  { PrefixStore store = place.open("another model"); store_all(store, whole.sequence); }
  std::ofstream(place.folder / "letter.txt") << "mine";
  fs::create_directory(place.folder / (std::string(32, 'a') + "-" + std::string(32, 'b') + ".kv"));
  fs::create_symlink("/etc/passwd", place.folder / (std::string(32, 'c') + "-" + std::string(32, 'd') + ".kv"));
  const size_t n_files = place.files().size();
  PrefixStore store = place.open();
  Evaluated loaded(engine, KvType::f16, {});
  CHECK(store.n_blocks() == 0);
  CHECK(store.extend(loaded.sequence, tokens) == 0);
  CHECK(store_all(store, whole.sequence) == 2);
  CHECK(place.files().size() == n_files + 2);
  CHECK(place.notes.empty());
}

TEST_CASE("prefix store: the least recently used go when the size is reached") {
  Place place("prefix_size");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto of = [&](Token first) {
    auto tokens = some_tokens(512, engine.info().hparams.n_vocab);
    tokens[0] = first;
    return tokens;
  };
  uint64_t one = 0;
  {
    PrefixStore store = place.open();
    store_all(store, Evaluated(engine, KvType::f16, of(0)).sequence);
    one = store.bytes();
  }
  fs::remove_all(place.folder);
  const uint64_t max_bytes = one * 7 / 2;
  PrefixStore store = place.open("a model", max_bytes);
  for (Token i = 1; i <= 3; ++i) store_all(store, Evaluated(engine, KvType::f16, of(i)).sequence);
  Evaluated used(engine, KvType::f16, {});
  CHECK(store.extend(used.sequence, of(1)) == 512);  // now the second is the oldest
  store_all(store, Evaluated(engine, KvType::f16, of(4)).sequence);
  uint64_t sum = 0;
  for (const fs::path& file : place.files()) sum += fs::file_size(file);
  CHECK(sum == store.bytes());
  CHECK(sum <= max_bytes);
  for (const Token i : {1, 4}) {
    Evaluated kept(engine, KvType::f16, {});
    CHECK(store.extend(kept.sequence, of(i)) == 512);
  }
  Evaluated gone(engine, KvType::f16, {});
  CHECK(store.extend(gone.sequence, of(2)) < 512);
  PrefixStore smaller = place.open("a model", one);
  CHECK(smaller.bytes() <= one);
}

TEST_CASE("prefix store: others can neither read nor write it") {
  Place place("prefix_modes");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto tokens = some_tokens(300, engine.info().hparams.n_vocab);
  PrefixStore store = place.open();
  store_all(store, Evaluated(engine, KvType::f16, tokens).sequence);
  CHECK(mode_of(place.folder) == 0700);
  for (const fs::path& file : place.files()) CHECK(mode_of(file) == 0600);
  fs::permissions(place.folder, fs::perms::all);
  test::check_thrown(test::thrown_by([&] { place.open(); }), ErrorKind::io, "others may write");
  fs::permissions(place.folder, fs::perms::owner_all);
}

TEST_CASE("prefix store: when nothing can be written, one note tells, and nothing else happens") {
  Place place("prefix_gone");
  const Engine engine = Engine::open(place.model, {.n_threads = 2, .isa = {}, .notice = {}});
  const auto tokens = some_tokens(300, engine.info().hparams.n_vocab);
  const Evaluated whole(engine, KvType::f16, tokens);
  PrefixStore store = place.open();
  fs::remove_all(place.folder);
  CHECK(store_all(store, whole.sequence) == 0);
  CHECK(store_all(store, whole.sequence) == 0);
  CHECK(place.notes.size() == 1);
}

TEST_CASE("the fingerprint of a model tells weights apart, not places") {
  test::RandomModel random;
  random.hparams = test::small_mixtral_hparams(2, 512);
  random.type = [](const std::string&) { return DType::Q8_0; };
  const fs::path a = test::write_model(random, "fingerprint_a.gguf"), b = test::write_model(random, "fingerprint_b.gguf");
  const auto of = [](const fs::path& path) { return Batch(Engine::open(path, {.n_threads = 1, .isa = {}, .notice = {}}), {.n_ctx = 64}).fingerprint(); };
  const std::string print = of(a);
  CHECK(print.size() == 64);
  CHECK(of(b) == print);
  const GgufFile file = GgufFile::open(b);
  const auto data = file.find_tensor("blk.1.attn_k.weight")->data;
  change_byte(b, file.place_of(data.data() + data.size() / 2).offset);
  CHECK(of(b) != print);
  fs::remove(a);
  fs::remove(b);
}
