#include "server/served_model.h"

#include <algorithm>

#include "server/api_error.h"

namespace duet::server {
namespace {

// Ollama's clients add the tag of the newest version.
std::string plain(std::string name) {
  if (name.ends_with(":latest")) name.resize(name.size() - 7);
  std::transform(name.begin(), name.end(), name.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  return name;
}

}  // namespace

void ServedModel::check_name(const std::string& name) const {
  if (name.empty()) return;
  const auto is = [&](const std::string& known) { return known == "*" || plain(known) == plain(name); };
  if (is(id) || is(file_name) || std::any_of(aliases.begin(), aliases.end(), is)) return;
  throw ApiError(404, concat("model ", quote(name), " not found; this server has '", id, "' (start it with --alias NAME for other names)"), "model");
}

}  // namespace duet::server
