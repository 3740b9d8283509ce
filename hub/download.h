// One file from a URL to disk: in parallel ranges, resumed where an earlier attempt stopped, checked.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "hub/http.h"

namespace duet::hub {

struct DownloadRequest {
  std::string url, token;
  std::filesystem::path destination;  // appears only when complete and right; what another process has put there meanwhile stays
  std::optional<uint64_t> size;       // when known beforehand
  std::string sha256;                 // 64 lower-case digits; "": not known, then it must begin as a GGUF file does
};

struct DownloadOptions {
  HttpOptions http;
  uint64_t chunk_bytes = uint64_t{64} << 20;
  size_t connections = 4;
  std::chrono::milliseconds save_interval{2000};  // of the journal
  std::function<void(const std::string&)> notice = [](const std::string&) {};
  // What is done: "download" or "check".
  std::function<void(uint64_t done, uint64_t total, const char* what)> progress = [](uint64_t, uint64_t, const char*) {};
};

// Throws Error: io (the server's refusal, the network, the disk), format (the bytes have another size or SHA-256 than
// they should, or are no GGUF file: they are thrown away), cancelled. After io and cancelled the same call goes on where this one stopped.
void download(const DownloadRequest& request, const DownloadOptions& options);

}  // namespace duet::hub
