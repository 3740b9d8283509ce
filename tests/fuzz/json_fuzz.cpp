// JSON text -> document; what is accepted must survive being written and read again.
#include <cstdint>

#include "base/error.h"
#include "base/json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace duet;
  try {
    const Json json = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    DUET_ASSERT(parse_json(json.dump(), "again").dump() == json.dump());
    if (!json.is_object()) return 0;
    for (const auto& [key, value] : json.items()) {
      if (value.is_string())
        DUET_ASSERT(json_get<std::string>(json, key.c_str(), "fuzz") == value);
      else
        (void)json_get_or<uint64_t>(json, key.c_str(), 0, "fuzz");
    }
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::internal) throw;
  }
  return 0;
}
