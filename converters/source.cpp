#include "converters/source.h"

#include "base/error.h"

namespace duet {
namespace {

std::string line_of(const std::filesystem::path& path, const FileIdentity& identity) {
  return concat(path.filename().string(), " ", identity.size, " ", identity.modified_ns, "\n");
}

}  // namespace

std::string identity_of(const GgufFile& file) {
  const auto paths = file.part_paths();
  const auto identities = file.part_identities();
  std::string out;
  for (size_t i = 0; i < paths.size(); ++i) out += line_of(paths[i], identities[i]);
  return out;
}

std::string identity_of(const Safetensors& files) {
  std::string out;
  for (const auto& [path, identity] : files.files()) out += line_of(path, identity);
  return out;
}

}  // namespace duet
