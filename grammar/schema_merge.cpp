#include "grammar/schema_merge.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/json.h"

namespace duet::grammar {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kTextPerValue = 32;  // bytes of text that cost as much as a value
constexpr std::array<std::string_view, 19> kAnnotations = {"$schema", "$id", "id", "$comment", "$anchor", "$defs", "definitions", "title", "description", "default",
                                                           "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator", "strict", "contentMediaType", "contentEncoding"};

// Values in it, and its text.
size_t weight(const Json& json) {
  size_t out = 1;
  if (json.is_string()) out += json.get_ref<const std::string&>().size() / kTextPerValue;
  if (json.is_array())
    for (const Json& value : json) out += weight(value);
  if (json.is_object())
    for (const auto& [key, value] : json.items()) out += 1 + key.size() / kTextPerValue + weight(value);
  return out;
}

void charge(MergeWork& left, size_t values, const std::string& where) {
  if (values > left.values) fail(ErrorKind::unsupported, where, ": its combinations come to too much to be written out");
  left.values -= values;
}

// As values, those of each member of one with each of the other.
size_t comparisons(const Json& a, const Json& b) { return a.size() * b.size() / 16; }

// One that both fit, without looking into them: more parts of an "allOf" that there is, not one in another.
Json both(Json a, const Json& b) {
  if (is_anything(b)) return a;
  if (is_anything(a)) return b;
  const auto is_list = [](const Json& schema) { return schema.is_object() && schema.size() == 1 && schema.contains("allOf") && schema["allOf"].is_array(); };
  Json out = is_list(a) ? std::move(a) : Json{{"allOf", Json::array({std::move(a)})}};
  Json& parts = out["allOf"];
  const auto add = [&](const Json& part) {
    if (std::find(parts.begin(), parts.end(), part) == parts.end()) parts.push_back(part);
  };
  if (!is_list(b)) add(b);
  else
    for (const Json& part : b["allOf"]) add(part);
  return parts.size() == 1 ? Json(parts[0]) : out;
}

// Places of an object's members: to look them up one by one takes time in long ones.
class Members {
 public:
  explicit Members(const Json& object) {
    size_t i = 0;
    for (const auto& [name, value] : object.items()) places_.emplace(name, i++);
  }
  bool contains(const std::string& name) const { return places_.contains(name); }
  std::optional<size_t> find(const std::string& name) const {
    const auto found = places_.find(name);
    return found == places_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  std::unordered_map<std::string, size_t> places_;
};

const Json& member_or(const Json& object, const char* key, const Json& fallback) {
  const auto found = object.find(key);
  return found == object.end() ? fallback : *found;
}

const Json& properties_of(const Json& schema) {
  static const Json kNone = Json::object();
  const Json& properties = member_or(schema, "properties", kNone);
  return properties.is_object() ? properties : kNone;
}

// Names that are not those of the other's properties must not be shut out by one of the two.
void check_additional(const Json& a, const Json& b, const std::string& where) {
  const auto closed = [](const Json& s) { return s.contains("additionalProperties") && s["additionalProperties"] != Json(true); };
  const auto lacks = [](const Json& s, const Json& other) {
    const Members names(properties_of(s));
    for (const auto& [name, value] : properties_of(other).items())
      if (!names.contains(name)) return true;
    return false;
  };
  if ((closed(a) && lacks(a, b)) || (closed(b) && lacks(b, a)))
    fail(ErrorKind::unsupported, where, ": 'additionalProperties' beside properties of another part of 'allOf' is not supported");
}

Json merged_types(const Json& a, const Json& b, const std::string& where) {
  const auto list = [](const Json& type) { return type.is_array() ? type : Json::array({type}); };
  Json out = Json::array();
  for (const Json& x : list(a))
    for (const Json& y : list(b)) {
      if (x == y) out.push_back(x);
      else if ((x == "integer" && y == "number") || (x == "number" && y == "integer")) out.push_back("integer");
    }
  if (out.empty()) nothing_fits(where, "no value has all of its types");
  return out;
}

Json common_values(const Json& a, const Json& b, const std::string& where, MergeWork& left) {
  charge(left, comparisons(a, b), where);
  Json out = Json::array();
  for (const Json& value : a)
    if (std::find(b.begin(), b.end(), value) != b.end()) out.push_back(value);
  if (out.empty()) nothing_fits(where, "no value is in all of its 'enum'");
  return out;
}

Json union_of(Json a, const Json& b, const std::string& where, MergeWork& left) {
  charge(left, comparisons(a, b), where);
  for (const Json& value : b)
    if (std::find(a.begin(), a.end(), value) == a.end()) a.push_back(value);
  return a;
}

Json merged_properties(Json a, const Json& b) {
  const Members names(a);
  auto& members = a.get_ref<Json::object_t&>();
  for (const auto& [name, value] : b.items()) {
    const auto place = names.find(name);
    if (!place) {
      members.emplace_back(name, value);
      continue;
    }
    Json& own = (members.begin() + static_cast<std::ptrdiff_t>(*place))->second;
    own = both(std::move(own), value);
  }
  return a;
}

Json merged_keyword(const std::string& key, Json a, const Json& b, const std::string& where, MergeWork& left) {
  if (a == b) return a;
  if (key == "type") return merged_types(a, b, where);
  if (key == "required" && a.is_array() && b.is_array()) return union_of(std::move(a), b, where, left);
  if (key == "enum" && a.is_array() && b.is_array()) return common_values(a, b, where, left);
  if (key == "const") nothing_fits(where, "no value is all of its 'const'");
  if (key == "items" || key == "additionalProperties") return both(std::move(a), b);
  if (a.is_number() && b.is_number()) {
    const bool least = key == "minimum" || key == "exclusiveMinimum" || key == "minLength" || key == "minItems";
    const bool most = key == "maximum" || key == "exclusiveMaximum" || key == "maxLength" || key == "maxItems";
    if (least || most) return (a.get<double>() > b.get<double>()) == least ? a : b;
  }
  if (key == "properties" && a.is_object() && b.is_object()) return merged_properties(std::move(a), b);
  fail(ErrorKind::unsupported, where, ": two different '", key, "' together are not supported");
}

// Lists of items as "prefixItems" and "items", however they are written.
void normalize_items(Json& schema, const std::string& where) {
  const auto items = schema.find("items");
  if (items == schema.end() || !items->is_array()) {
    schema.erase("additionalItems");  // says something behind a list only
    return;
  }
  if (schema.contains("prefixItems")) fail(ErrorKind::unsupported, where, ": 'items' as a list beside 'prefixItems' is not supported");
  Json list = *items, more = member_or(schema, "additionalItems", Json());
  for (const char* keyword : {"items", "additionalItems"}) schema.erase(keyword);
  schema["prefixItems"] = std::move(list);
  if (!more.is_null()) schema["items"] = std::move(more);
}

// Each place of an array is for what both say of it; behind a list that is what is said of all other items.
void merge_items(Json& a, Json& b, const std::string& where) {
  for (Json* schema : {&a, &b}) normalize_items(*schema, where);
  static const Json kNone = Json::array(), kAny = true;
  const Json first = member_or(a, "prefixItems", kNone), second = member_or(b, "prefixItems", kNone);
  if (first.empty() && second.empty()) return;
  if (!first.is_array() || !second.is_array()) fail(ErrorKind::usage, where, ": 'prefixItems' must be an array");
  const auto item = [](const Json& list, const Json& schema, size_t i) { return i < list.size() ? list[i] : member_or(schema, "items", kAny); };
  Json all = Json::array();
  for (size_t i = 0; i < std::max(first.size(), second.size()); ++i) all.push_back(both(item(first, a, i), item(second, b, i)));
  a["prefixItems"] = std::move(all);
  b.erase("prefixItems");
}

Json flattened(const Json& root, const Json& schema, const std::string& where, int depth, MergeWork& left) {
  if (left.merges == 0) fail(ErrorKind::unsupported, where, ": its combinations are more than ", MergeWork{}.merges);
  --left.merges;
  if (depth > kMaxDepth) fail(ErrorKind::unsupported, where, ": it refers to itself, or is nested too deep");
  if (!schema.is_object()) return schema;
  Json out = Json::object();
  for (const auto& [key, value] : schema.items())
    if (key != "$ref" && key != "allOf") out.get_ref<Json::object_t&>().emplace_back(key, value);
  charge(left, weight(out), where);
  const auto add = [&](const Json& part) { out = merged(std::move(out), settled(flattened(root, part, where, depth + 1, left), where), where, left); };
  if (const auto ref = schema.find("$ref"); ref != schema.end()) {
    if (!ref->is_string()) fail(ErrorKind::usage, where, ": '$ref' must be a string");
    add(referred(root, ref->get<std::string>(), where));
  }
  if (const auto all = schema.find("allOf"); all != schema.end()) {
    if (!all->is_array() || all->empty()) fail(ErrorKind::usage, where, ": 'allOf' must be an array that is not empty");
    for (const Json& part : *all) add(part);
  }
  return out;
}

// Of a URI's fragment. What is no escape stands for itself.
std::string percent_decoded(std::string_view text) {
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escape = text[i] == '%' && i + 2 < text.size() && digit(text[i + 1]) >= 0 && digit(text[i + 2]) >= 0;
    if (!escape) {
      out += text[i];
      continue;
    }
    out += static_cast<char>(digit(text[i + 1]) << 4 | digit(text[i + 2]));
    i += 2;
  }
  return out;
}

}  // namespace

bool is_constraint(const std::string& keyword) { return std::find(kAnnotations.begin(), kAnnotations.end(), keyword) == kAnnotations.end(); }

bool has_constraints(const Json& schema) {
  for (const auto& [key, value] : schema.items())
    if (is_constraint(key)) return true;
  return false;
}

bool is_anything(const Json& schema) { return schema == Json(true) || (schema.is_object() && !has_constraints(schema)); }

const Json& referred(const Json& root, const std::string& reference, const std::string& where) {
  if (!reference.starts_with('#')) fail(ErrorKind::unsupported, where, ": '$ref' to another document, ", quote(reference), ", is not supported");
  const std::string pointer = percent_decoded(std::string_view(reference).substr(1));
  if (!pointer.empty() && pointer[0] != '/')
    fail(ErrorKind::unsupported, where, ": '$ref' ", quote(reference), " to a name ('$anchor') is not supported; write its place, as in '#/$defs/NAME'");
  try {
    const Json::json_pointer place(pointer);
    if (root.contains(place)) return root.at(place);
  } catch (const Json::exception&) {
    // Said below.
  }
  fail(ErrorKind::usage, where, ": '$ref' ", quote(reference), " leads nowhere");
}

Json merged(Json a, const Json& b, const std::string& where, MergeWork& left) {
  for (const Json* schema : {&std::as_const(a), &b})
    if (!schema->is_object() && !schema->is_boolean()) fail(ErrorKind::usage, where, ": a schema must be an object, true or false");
  if (b == Json(true)) return a;
  if (a == Json(true)) return b;
  if (a.is_boolean() || b.is_boolean()) return Json(false);
  charge(left, weight(a) + weight(b) + comparisons(a, b), where);
  check_additional(a, b, where);
  Json more = b;
  merge_items(a, more, where);
  for (auto& [key, value] : more.items()) {
    const auto own = a.find(key);
    if (own == a.end()) a[key] = std::move(value);
    else if (is_constraint(key)) *own = merged_keyword(key, std::move(*own), value, where, left);
  }
  return a;
}

Json flattened(const Json& root, const Json& schema, const std::string& where, MergeWork& left) { return flattened(root, schema, where, 0, left); }

Json settled(Json schema, const std::string& where) {
  if (!schema.is_object()) return schema;
  normalize_items(schema, where);
  constexpr std::pair<const char*, const char*> kRest[] = {{"unevaluatedProperties", "additionalProperties"}, {"unevaluatedItems", "items"}};
  for (const auto& [unevaluated, rest] : kRest) {
    const auto found = schema.find(unevaluated);
    if (found == schema.end()) continue;
    if (!is_anything(*found) && (schema.contains("anyOf") || schema.contains("oneOf")))
      fail(ErrorKind::unsupported, where, ": '", unevaluated, "' in a part of 'allOf' that has 'anyOf' or 'oneOf' is not supported");
    Json value = *found;
    schema.erase(unevaluated);
    if (!schema.contains(rest) && !is_anything(value)) schema[rest] = std::move(value);
  }
  return schema;
}

}  // namespace duet::grammar
