#include "server/page.h"

#include "base/json.h"

namespace duet::server {
namespace {

constexpr const char* kPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

// Of each layer, the experts for which it is true.
Json expert_lists(const std::vector<bool>& cells, size_t n_expert) {
  Json out = Json::array();
  for (size_t i = 0; i < cells.size(); i += n_expert) {
    Json layer = Json::array();
    for (size_t e = 0; e < n_expert; ++e)
      if (cells[i + e]) layer.push_back(e);
    out.push_back(std::move(layer));
  }
  return out;
}

}  // namespace

bool wants_page(const HttpRequest& request) { return request.header("Accept").find("text/html") != std::string::npos; }

HttpReply page_reply(const PageFile& file, const HttpRequest& request) {
  HttpReply reply{.content_type = std::string(file.content_type)};
  reply.headers = {{"Content-Security-Policy", kPolicy}, {"X-Content-Type-Options", "nosniff"}, {"X-Frame-Options", "DENY"},
                   {"Referrer-Policy", "no-referrer"},   {"Cross-Origin-Opener-Policy", "same-origin"}, {"Cross-Origin-Resource-Policy", "same-origin"},
                   {"Cache-Control", "no-cache"},        {"ETag", std::string(file.etag)}};
  if (request.header("If-None-Match") == file.etag) reply.status = 304;
  else reply.body = file.content;
  return reply;
}

Json router_json(Scheduler& scheduler, const HParams& hparams) {
  const RouterWatch::Picture picture = scheduler.router().look();
  const Scheduler::Status status = scheduler.status();
  const size_t n_expert = hparams.n_expert;
  Json uses = Json::array();
  for (size_t i = 0; i < picture.uses.size(); i += n_expert)
    uses.push_back(std::vector<int>(picture.uses.begin() + static_cast<ptrdiff_t>(i), picture.uses.begin() + static_cast<ptrdiff_t>(i + n_expert)));
  Json out{{"layers", n_expert > 0 ? hparams.n_layer : 0}, {"experts", n_expert}, {"used", hparams.n_expert_used}, {"window", RouterWatch::kWindow},
           {"tokens", picture.n_tokens}, {"running", status.running.size()}, {"uses", std::move(uses)}, {"last", expert_lists(picture.last, n_expert)},
           {"streamed", status.stream.has_value()}};
  if (!status.stream) return out;
  out["read"] = expert_lists(picture.read, n_expert);
  out["resident"] = expert_lists(picture.resident, n_expert);
  out["hits"] = status.stream->hits;
  out["misses"] = status.stream->misses;
  return out;
}

}  // namespace duet::server
