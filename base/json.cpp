#include "base/json.h"

#include <limits>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/error.h"

namespace duet {
namespace {

// Builds the document while nlohmann-json reads it; refuses too deep nesting and repeated keys.
// Its own builder looks every key of an ordered object up by a linear search, which makes a file of
// 100,000 keys (a tokenizer, a hostile header) cost 10^10 comparisons.
class DocumentBuilder : public nlohmann::json_sax<Json> {
 public:
  DocumentBuilder(const std::string& source, int max_depth)
      : source_(source), max_depth_(max_depth) {}
  Json take() { return std::move(root_); }

  bool null() override { return add(nullptr), true; }
  bool boolean(bool value) override { return add(value), true; }
  bool number_integer(number_integer_t value) override { return add(value), true; }
  bool number_unsigned(number_unsigned_t value) override { return add(value), true; }
  bool number_float(number_float_t value, const string_t&) override { return add(value), true; }
  bool string(string_t& value) override { return add(std::move(value)), true; }
  bool binary(binary_t&) override { return false; }  // not in JSON text
  bool start_object(size_t) override { return open(Json::object()), true; }
  bool end_object() override { return open_.pop_back(), true; }
  bool start_array(size_t) override { return open(Json::array()), true; }
  bool end_array() override { return open_.pop_back(), true; }
  bool key(string_t& name) override {
    if (!open_.back().keys.insert(name).second)
      fail(ErrorKind::format, source_, ": JSON key ", quote(name), " appears twice in one object");
    key_ = std::move(name);
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& e) override {
    fail(ErrorKind::format, source_,
         ": not valid JSON: ", std::string_view(e.what()).substr(0, 200));
  }

 private:
  struct Open {
    Json* value;  // stays put: its parent grows again only when this one is complete
    std::unordered_set<std::string> keys;
  };

  Json& add(Json value) {
    if (open_.empty()) return root_ = std::move(value);
    Json& parent = *open_.back().value;
    if (parent.is_array()) return parent.get_ref<Json::array_t&>().emplace_back(std::move(value));
    return parent.get_ref<Json::object_t&>().emplace_back(std::move(key_), std::move(value)).second;
  }
  void open(Json value) {
    if (static_cast<int>(open_.size()) >= max_depth_)
      fail(ErrorKind::format, source_, ": JSON nested deeper than ", max_depth_, " levels");
    open_.push_back({&add(std::move(value)), {}});
  }

  const std::string& source_;
  int max_depth_;
  Json root_;
  std::string key_;
  std::vector<Open> open_;
};

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, bool>)
    return "a boolean";
  else if constexpr (std::is_same_v<T, int64_t>)
    return "an integer";
  else if constexpr (std::is_same_v<T, uint64_t>)
    return "a non-negative integer";
  else if constexpr (std::is_same_v<T, double>)
    return "a number";
  else
    return "a string";
}

template <class T>
bool has_type(const Json& value) {
  if constexpr (std::is_same_v<T, bool>)
    return value.is_boolean();
  else if constexpr (std::is_same_v<T, int64_t>)
    return value.is_number_integer() &&
           (!value.is_number_unsigned() ||
            value.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()});
  else if constexpr (std::is_same_v<T, uint64_t>)
    return value.is_number_unsigned() || (value.is_number_integer() && value.get<int64_t>() >= 0);
  else if constexpr (std::is_same_v<T, double>)
    return value.is_number();
  else
    return value.is_string();
}

// A value of the wrong type in a message: kinds with contents by name, the rest as written.
std::string shown(const Json& value) {
  if (value.is_object() || value.is_array()) return concat("an ", value.type_name());
  return value.is_string() ? quote(value.get_ref<const std::string&>()) : value.dump();
}

template <class T>
T typed(const Json& value, const char* key, const std::string& source) {
  if (!has_type<T>(value))
    fail(ErrorKind::format, source, ": '", key, "' is ", shown(value), ", expected ",
         type_name<T>());
  return value.get<T>();
}

}  // namespace

Json parse_json(std::string_view text, const std::string& source, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes)
    fail(ErrorKind::format, source, ": JSON of ", text.size(), " bytes, at most ", limits.max_bytes,
         " accepted");
  try {
    DocumentBuilder builder(source, limits.max_depth);
    Json::sax_parse(text, &builder);
    return builder.take();
  } catch (const Json::exception& e) {
    fail(ErrorKind::format, source,
         ": not valid JSON: ", std::string_view(e.what()).substr(0, 200));
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
template std::string json_get_or<std::string>(const Json&, const char*, std::string,
                                              const std::string&);

}  // namespace duet
