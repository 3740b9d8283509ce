// The web page, embedded into the program, and the picture of the router that it shows.
#pragma once

#include <span>
#include <string_view>

#include "base/json_fwd.h"
#include "server/http.h"
#include "server/scheduler.h"

namespace duet::server {

struct PageFile {
  std::string_view path, content_type, etag, content;
};
std::span<const PageFile> page_files();  // made by cmake/embed_page.cmake of server/page/*

// Browsers get the page at "/", all others what Ollama's clients expect there.
bool wants_page(const HttpRequest& request);
// With headers that let the page load nothing but itself and be framed by nobody; 304 when the browser
// has it already.
HttpReply page_reply(const PageFile& file, const HttpRequest& request);
// GET /router.
Json router_json(Scheduler& scheduler, const HParams& hparams);

}  // namespace duet::server
