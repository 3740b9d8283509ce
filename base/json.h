// JSON, by way of nlohmann-json, for text that may be hostile: size, depth and duplicate keys are
// checked and its exceptions become Error.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/json_fwd.h"

namespace duet {

struct JsonLimits {
  size_t max_bytes = size_t{64} << 20;
  int max_depth = 64;
};

// Throws Error(format) "source: ..." on malformed, too large, too deep text, invalid UTF-8, or an
// object with the same key twice.
Json parse_json(std::string_view text, const std::string& source, const JsonLimits& limits = {});

// Typed access for parsed files: Error(format) "source: key 'x' ..." when absent or of another
// type. Integers must fit T; a JSON float with an integral value is no integer.
template <class T>
T json_get(const Json& object, const char* key, const std::string& source);
// The fallback serves for an absent or null member only.
template <class T>
T json_get_or(const Json& object, const char* key, T fallback, const std::string& source);

extern template bool json_get<bool>(const Json&, const char*, const std::string&);
extern template int64_t json_get<int64_t>(const Json&, const char*, const std::string&);
extern template uint64_t json_get<uint64_t>(const Json&, const char*, const std::string&);
extern template double json_get<double>(const Json&, const char*, const std::string&);
extern template std::string json_get<std::string>(const Json&, const char*, const std::string&);
extern template bool json_get_or<bool>(const Json&, const char*, bool, const std::string&);
extern template int64_t json_get_or<int64_t>(const Json&, const char*, int64_t, const std::string&);
extern template uint64_t json_get_or<uint64_t>(const Json&, const char*, uint64_t, const std::string&);
extern template double json_get_or<double>(const Json&, const char*, double, const std::string&);
extern template std::string json_get_or<std::string>(const Json&, const char*, std::string, const std::string&);

}  // namespace duet
