// Names, listings and quantizations of the hub, and models that are on the machine already.
#include "hub/hub.h"

#include <doctest/doctest.h>

#include <filesystem>

#include "base/json.h"
#include "base/user_folders.h"
#include "hub/store.h"
#include "tests/support/errors.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/http_server.h"

using namespace duet;
using namespace duet::hub;
using namespace duet::test;

namespace {

namespace fs = std::filesystem;

std::string quants(const std::vector<Choice>& choices) {
  std::string out;
  for (const Choice& c : choices) out += concat(c.quant, "=", c.parts.size(), c.n_missing > 0 ? "!" : "", " ");
  return out;
}

std::vector<HubFile> files(const std::vector<std::string>& paths) {
  std::vector<HubFile> out;
  for (const std::string& path : paths) out.push_back({path, 10, ""});
  return out;
}

HttpOptions quick() {
  HttpOptions options;
  options.first_delay = std::chrono::milliseconds(1);
  return options;
}

std::vector<HubFile> listed(const std::string& body, const HttpOptions& options = quick()) {
  const WebServer server([&](const WebRequest&) { return WebReply{200, {}, body}; });
  return hub_files({server.url(), "", false}, "user/repo", options);
}

void put(const fs::path& path, const std::string& text = "x") {
  fs::create_directories(path.parent_path());
  write_text(path, text);
}

std::string names(const std::vector<LocalModel>& models) {
  std::string out;
  for (const LocalModel& m : models) out += concat(owner_name(m.owner), " ", m.name, m.n_done ? " partial" : "", "\n");
  return out;
}

}  // namespace

TEST_CASE("pull: what a model can be called") {
  CHECK(parse_model_ref("user/repo").repo == "user/repo");
  CHECK(parse_model_ref("user/repo:Q4_K_M").quant == "Q4_K_M");
  CHECK(parse_model_ref("hf.co/user/repo:IQ2_M").repo == "user/repo");
  CHECK(parse_model_ref("https://huggingface.co/user/repo").repo == "user/repo");
  CHECK(parse_model_ref("https://example.org/a/b.gguf?download=true").url == "https://example.org/a/b.gguf?download=true");
  CHECK(parse_model_ref("https://huggingface.co/user/repo/resolve/main/b.gguf").url != "");
  for (const char* bad : {"", "repo", "a/b/c", "../x", "a/..", "a/b:", "/a", "a/", "a/b:../c", "http://x/", "http://x/y.bin", "ftp://x/y.gguf",
                          "http://x/%2e%2e.gguf", "http://x/.gguf", "a b/c", "user/re\npo"}) {
    CAPTURE(bad);
    CHECK(thrown_by([&] { parse_model_ref(bad); }).kind == ErrorKind::usage);
  }
}

TEST_CASE("pull: the quantization is read from a file's name") {
  CHECK(quant_of_name("mixtral-8x7b-instruct-v0.1.Q4_K_M") == "Q4_K_M");
  CHECK(quant_of_name("Mixtral-8x22B-v0.1-IQ2_XXS") == "IQ2_XXS");
  CHECK(quant_of_name("mixtral.i1-Q4_K_S") == "i1-Q4_K_S");
  CHECK(quant_of_name("model-q8_0") == "Q8_0");
  CHECK(quant_of_name("model-bf16") == "BF16");
  CHECK(quant_of_name("Q5_K_M") == "Q5_K_M");
  CHECK(quant_of_name("ggml-model") == "");
  CHECK(quant_of_name("Qwen-7B") == "");
  CHECK(quant_of_name("") == "");
}

TEST_CASE("pull: parts of a split set have numbers") {
  const auto split = parse_split_name("mixtral-Q4_K_M-00002-of-00005");
  REQUIRE(split);
  CHECK(split->stem == "mixtral-Q4_K_M");
  CHECK(split->number == 2);
  CHECK(split->count == 5);
  CHECK(split_name("a", 3, 12) == "a-00003-of-00012");
  for (const char* bad : {"a", "a-00000-of-00005", "a-00006-of-00005", "a-0000x-of-00005", "-00001-of-00005", "a-00001-of-99999", "a_00001-of-00005"})
    CHECK_MESSAGE(!parse_split_name(bad), bad);
}

TEST_CASE("pull: files of a repository become quantizations to choose from") {
  const auto choices = choices_of(files({"m.Q4_K_M.gguf", "m.Q8_0.gguf", "mmproj-f16.gguf", "Q2_K/m-00002-of-00002.gguf", "Q2_K/m-00001-of-00002.gguf",
                                         "m-Q3_K_S-00001-of-00003.gguf"}));
  CHECK(quants(choices) == "Q2_K=2 Q3_K_S=1! Q4_K_M=1 Q8_0=1 ");
  CHECK(choose(choices, "", "r").parts[0].path == "m.Q4_K_M.gguf");
  CHECK(choose(choices, "q8_0", "r").parts[0].path == "m.Q8_0.gguf");
  CHECK(choose(choices, "m.Q8_0.gguf", "r").quant == "Q8_0");
  CHECK(choose(choices, "Q2_K", "r").parts[0].path == "Q2_K/m-00001-of-00002.gguf");
  CHECK(choose(choices, "Q2_K", "r").size() == 20);
  check_thrown(thrown_by([&] { choose(choices, "Q5_K_M", "r"); }), ErrorKind::usage, "r: has no Q5_K_M; choose one: r:QUANT with Q2_K, Q3_K_S, Q4_K_M, Q8_0");
  check_thrown(thrown_by([&] { choose(choices, "Q3_K_S", "r"); }), ErrorKind::io, "2 parts of Q3_K_S are missing");
  check_thrown(thrown_by([&] { choose({}, "", "r"); }), ErrorKind::io, "has no GGUF files");
  const auto twice = choices_of(files({"a.Q4_K_M.gguf", "b.Q4_K_M.gguf"}));
  check_thrown(thrown_by([&] { choose(twice, "", "r"); }), ErrorKind::usage, "several files are Q4_K_M; choose one: r:FILE with a.Q4_K_M.gguf, b.Q4_K_M.gguf");
  CHECK(choose(twice, "b.Q4_K_M", "r").parts[0].path == "b.Q4_K_M.gguf");
  CHECK(choose(choices_of(files({"only.gguf"})), "", "r").quant == "only");
}

TEST_CASE("pull: a listing gives paths, sizes and sums, page by page") {
  const std::string sum(64, 'a');
  std::string seen_token;
  std::string url;
  const WebServer server([&](const WebRequest& request) {
    if (const auto token = request.headers.find("authorization"); token != request.headers.end()) seen_token = token->second;
    if (request.target == "/api/models/user/repo/tree/main?recursive=true")
      return WebReply{200, {{"Link", "<" + url + "/page2>; rel=\"next\""}},
                      R"([{"type":"directory","path":"x.gguf","size":0},{"type":"file","path":"README.md","size":3},
                          {"type":"file","path":"a b.gguf","size":130,"lfs":{"oid":")" + sum + R"(","size":5000,"pointerSize":130}}])"};
    return WebReply{200, {}, R"([{"type":"file","path":"sub/c.GGUF","size":7}])"};
  });
  url = server.url();
  const HubAccess access{server.url(), "secret", false};
  const std::vector<HubFile> found = hub_files(access, "user/repo", quick());
  REQUIRE(found.size() == 2);
  CHECK(found[0].path == "a b.gguf");
  CHECK(found[0].size == 5000);
  CHECK(found[0].sha256 == sum);
  CHECK(found[1].path == "sub/c.GGUF");
  CHECK(found[1].sha256 == "");
  CHECK(seen_token == "Bearer secret");
  CHECK(hub_url(access, "user/repo", "a b.gguf") == url + "/user/repo/resolve/main/a%20b.gguf");
}

TEST_CASE("pull: hostile listings are refused") {
  const auto refused = [](const std::string& body, const std::string& words) {
    CAPTURE(body);
    check_thrown(thrown_by([&] { listed(body); }), ErrorKind::format, words);
  };
  refused("<html>", "JSON");
  refused("{}", "not a listing");
  refused("[3]", "not a listing");
  refused(R"([{"path":"../../x.gguf","size":1}])", "will not make a file named");
  refused(R"([{"path":"/etc/x.gguf","size":1}])", "will not make a file named");
  refused(R"([{"path":"a//x.gguf","size":1}])", "will not make a file named");
  refused(R"([{"path":".hidden/x.gguf","size":1}])", "will not make a file named");
  refused(R"([{"path":"a\u001b[2Jx.gguf","size":1}])", "will not make a file named");
  refused(R"([{"path":"x.gguf","size":-1}])", "size");
  refused(R"([{"path":"x.gguf"}])", "size");
  refused(R"([{"path":"x.gguf","size":1,"lfs":{"oid":"sha","size":1}}])", "is no SHA-256");
  const WebServer elsewhere([](const WebRequest&) { return WebReply{200, {{"Link", "<http://evil.example/x>; rel=\"next\""}}, "[]"}; });
  check_thrown(thrown_by([&] { hub_files({elsewhere.url(), "", false}, "u/r", quick()); }), ErrorKind::format, "goes on at another server");
  std::string url;
  const WebServer endless([&](const WebRequest&) { return WebReply{200, {{"Link", "<" + url + "/x>; rel=\"next\""}}, "[]"}; });
  url = endless.url();
  check_thrown(thrown_by([&] { hub_files({url, "", false}, "u/r", quick()); }), ErrorKind::format, "has no end");
}

TEST_CASE("models of duet and of other programs are found where they lie") {
  const TempFolder folder;
  const ModelFolders folders{folder / "duet", {folder / "ollama"}, {folder / "lm"}, {folder / "hf"}};
  put(folder / "duet/user/Repo-GGUF/m.Q4_K_M.gguf", "12345");
  put(folder / "duet/user/Repo-GGUF/m.Q8_0-00001-of-00002.gguf", "12");
  put(folder / "duet/user/Repo-GGUF/m.Q8_0-00002-of-00002.gguf", "345");
  put(folder / "duet/user/Half/h.Q2_K.gguf.part");
  put(folder / "duet/user/Half/h.Q2_K.gguf.part.json",
      R"({"format":"duet-download","version":1,"url":"","etag":"","sha256":"","size":100,"chunk_bytes":50,"done":[50,3]})");
  put(folder / "duet/example.org_80/thing.gguf");
  put(folder / "lm/publisher/Other-GGUF/o.Q5_K_M.gguf");
  put(folder / "hf/models--who--What-GGUF/refs/main", "abc\n");
  put(folder / "hf/models--who--What-GGUF/blobs/1", "123");
  fs::create_directories(folder / "hf/models--who--What-GGUF/snapshots/abc");
  fs::create_symlink("../../blobs/1", folder / "hf/models--who--What-GGUF/snapshots/abc/w.Q6_K.gguf");
  fs::create_symlink("../../blobs/2", folder / "hf/models--who--What-GGUF/snapshots/abc/w.Q2_K.gguf");  // not there
  const std::string digest(64, 'b');
  put(folder / "ollama/manifests/registry.ollama.ai/library/mixtral/8x7b",
      R"({"layers":[{"mediaType":"x"},{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:)" + digest + R"(","size":4}]})");
  put(folder / "ollama/manifests/registry.ollama.ai/library/bad/1", "{");
  put(folder / "ollama/manifests/registry.ollama.ai/library/bad/2",
      R"({"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:../../../../../../../../../../../../../../../../../../../etc/passwd0"}]})");
  put(folder / ("ollama/blobs/sha256-" + digest), "1234");
  const std::vector<LocalModel> models = local_models(folders);
  CHECK(names(models) ==
        "duet thing\n"
        "duet user/Half:Q2_K partial\n"
        "duet user/Repo-GGUF:Q4_K_M\n"
        "duet user/Repo-GGUF:Q8_0\n"
        "ollama mixtral:8x7b\n"
        "lm-studio publisher/Other-GGUF:Q5_K_M\n"
        "huggingface who/What-GGUF:Q6_K\n");
  const auto path_of = [&](const std::string& name) {
    const auto found = find_model(models, name);
    return found ? found->path.lexically_relative(folder.path()).string() : "";
  };
  CHECK(path_of("user/repo-gguf:q4_k_m") == "duet/user/Repo-GGUF/m.Q4_K_M.gguf");
  CHECK(path_of("Repo-GGUF:Q8_0") == "duet/user/Repo-GGUF/m.Q8_0-00001-of-00002.gguf");
  CHECK(path_of("thing") == "duet/example.org_80/thing.gguf");
  CHECK(path_of("o.Q5_K_M") == "lm/publisher/Other-GGUF/o.Q5_K_M.gguf");
  CHECK(path_of("Other-GGUF") == "lm/publisher/Other-GGUF/o.Q5_K_M.gguf");
  CHECK(path_of("mixtral") == "ollama/blobs/sha256-" + digest);
  CHECK(path_of("mixtral:8x7b") == "ollama/blobs/sha256-" + digest);
  CHECK(path_of("who/What-GGUF") == "hf/models--who--What-GGUF/snapshots/abc/w.Q6_K.gguf");
  CHECK(path_of("Half") == "");
  CHECK(path_of("nothing") == "");
  check_thrown(thrown_by([&] { path_of("repo-gguf"); }), ErrorKind::usage, "several models answer to it: user/Repo-GGUF:Q4_K_M, user/Repo-GGUF:Q8_0");
  CHECK(find_model(models, "Repo-GGUF:Q8_0")->n_bytes == 5);
}

TEST_CASE("rm removes all of a model of duet's own, and nothing of others") {
  const TempFolder folder;
  const ModelFolders folders{folder / "duet", {}, {folder / "lm"}, {}};
  put(folder / "duet/user/a/m.Q8_0-00001-of-00002.gguf");
  put(folder / "duet/user/a/m.Q8_0-00002-of-00002.gguf.part");
  put(folder / "duet/user/a/m.Q8_0-00002-of-00002.gguf.part.json");
  put(folder / "duet/user/b/n.Q8_0.gguf");
  put(folder / "lm/user/c/o.Q8_0.gguf");
  const std::vector<LocalModel> models = local_models(folders);
  REQUIRE(models.size() == 3);
  remove_model(folders, models[0]);
  CHECK(!fs::exists(folder / "duet/user/a"));
  CHECK(fs::exists(folder / "duet/user/b/n.Q8_0.gguf"));
  check_thrown(thrown_by([&] { remove_model(folders, models[2]); }), ErrorKind::usage, "belongs to lm-studio");
  CHECK(fs::exists(folder / "lm/user/c/o.Q8_0.gguf"));
  remove_model(folders, models[1]);
  CHECK(!fs::exists(folder / "duet/user"));
  CHECK(fs::exists(folder / "duet"));
}
