#include "base/json.h"

#include <limits>
#include <set>
#include <type_traits>
#include <vector>

#include "base/error.h"

namespace duet {
namespace {

// Refuses too deep nesting and repeated keys while nlohmann-json builds the document.
class StructureCheck {
 public:
  StructureCheck(const std::string& source, int max_depth) : source_(source), max_depth_(max_depth) {}

  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    if (depth > max_depth_) fail(ErrorKind::format, source_, ": JSON nested deeper than ", max_depth_, " levels");
    if (event == Event::object_start) keys_.emplace_back();
    if (event == Event::object_end) keys_.pop_back();
    if (event == Event::key && !keys_.back().insert(parsed.get<std::string>()).second)
      fail(ErrorKind::format, source_, ": JSON key '", parsed.get<std::string>(), "' appears twice in one object");
    return true;
  }

 private:
  const std::string& source_;
  int max_depth_;
  std::vector<std::set<std::string>> keys_;  // of the objects being read
};

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, bool>) return "a boolean";
  else if constexpr (std::is_same_v<T, int64_t>) return "an integer";
  else if constexpr (std::is_same_v<T, uint64_t>) return "a non-negative integer";
  else if constexpr (std::is_same_v<T, double>) return "a number";
  else return "a string";
}

template <class T>
bool has_type(const Json& value) {
  if constexpr (std::is_same_v<T, bool>) return value.is_boolean();
  else if constexpr (std::is_same_v<T, int64_t>)
    return value.is_number_integer() &&
           (!value.is_number_unsigned() || value.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()});
  else if constexpr (std::is_same_v<T, uint64_t>)
    return value.is_number_unsigned() || (value.is_number_integer() && value.get<int64_t>() >= 0);
  else if constexpr (std::is_same_v<T, double>) return value.is_number();
  else return value.is_string();
}

template <class T>
T typed(const Json& value, const char* key, const std::string& source) {
  if (!has_type<T>(value))
    fail(ErrorKind::format, source, ": '", key, "' is ", value.dump().substr(0, 60), ", expected ", type_name<T>());
  return value.get<T>();
}

}  // namespace

Json parse_json(std::string_view text, const std::string& source, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes)
    fail(ErrorKind::format, source, ": JSON of ", text.size(), " bytes, at most ", limits.max_bytes, " accepted");
  try {
    return Json::parse(text, StructureCheck(source, limits.max_depth));
  } catch (const Json::exception& e) {
    fail(ErrorKind::format, source, ": not valid JSON: ", e.what());
  }
}

template <class T>
T json_get(const Json& object, const char* key, const std::string& source) {
  const auto it = object.find(key);
  if (it == object.end()) fail(ErrorKind::format, source, ": '", key, "' is missing");
  return typed<T>(*it, key, source);
}

template <class T>
T json_get_or(const Json& object, const char* key, T fallback, const std::string& source) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return fallback;
  return typed<T>(*it, key, source);
}

template bool json_get<bool>(const Json&, const char*, const std::string&);
template int64_t json_get<int64_t>(const Json&, const char*, const std::string&);
template uint64_t json_get<uint64_t>(const Json&, const char*, const std::string&);
template double json_get<double>(const Json&, const char*, const std::string&);
template std::string json_get<std::string>(const Json&, const char*, const std::string&);
template bool json_get_or<bool>(const Json&, const char*, bool, const std::string&);
template int64_t json_get_or<int64_t>(const Json&, const char*, int64_t, const std::string&);
template uint64_t json_get_or<uint64_t>(const Json&, const char*, uint64_t, const std::string&);
template double json_get_or<double>(const Json&, const char*, double, const std::string&);
template std::string json_get_or<std::string>(const Json&, const char*, std::string, const std::string&);

}  // namespace duet
