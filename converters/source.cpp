#include "converters/source.h"

namespace duet {

std::string identity_of(const GgufFile& file) {
  const auto paths = file.part_paths();
  const auto identities = file.part_identities();
  std::string out;
  for (size_t i = 0; i < paths.size(); ++i) out += identity_line(paths[i], identities[i]);
  return out;
}

}  // namespace duet
