#include "grammar/schema_merge.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "base/error.h"
#include "base/json.h"

namespace duet::grammar {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::array<std::string_view, 19> kAnnotations = {"$schema", "$id", "id", "$comment", "$anchor", "$defs", "definitions", "title", "description", "default",
                                                           "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator", "strict", "contentMediaType", "contentEncoding"};

Json both(const Json& a, const Json& b) { return Json{{"allOf", Json::array({a, b})}}; }

// Names that are not those of the other's properties must not be shut out by one of the two.
void check_additional(const Json& a, const Json& b, const std::string& where) {
  const auto closed = [](const Json& s) { return s.contains("additionalProperties") && s["additionalProperties"] != Json(true); };
  const auto lacks = [](const Json& s, const Json& other) {
    const Json names = s.value("properties", Json::object());
    const Json others = other.value("properties", Json::object());
    for (const auto& [name, value] : others.items())
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
  if (out.empty()) fail(ErrorKind::usage, where, ": no value has all of its types");
  return out;
}

Json common_values(const Json& a, const Json& b, const std::string& where) {
  Json out = Json::array();
  for (const Json& value : a)
    if (std::find(b.begin(), b.end(), value) != b.end()) out.push_back(value);
  if (out.empty()) fail(ErrorKind::usage, where, ": no value is in all of its 'enum'");
  return out;
}

Json union_of(const Json& a, const Json& b) {
  Json out = a;
  for (const Json& value : b)
    if (std::find(out.begin(), out.end(), value) == out.end()) out.push_back(value);
  return out;
}

Json merged_keyword(const std::string& key, const Json& a, const Json& b, const std::string& where) {
  if (a == b) return a;
  if (key == "type") return merged_types(a, b, where);
  if (key == "required" && a.is_array() && b.is_array()) return union_of(a, b);
  if (key == "enum" && a.is_array() && b.is_array()) return common_values(a, b, where);
  if (key == "items" || key == "additionalProperties") return both(a, b);
  if (a.is_number() && b.is_number()) {
    const bool least = key == "minimum" || key == "exclusiveMinimum" || key == "minLength" || key == "minItems";
    const bool most = key == "maximum" || key == "exclusiveMaximum" || key == "maxLength" || key == "maxItems";
    if (least || most) return (a.get<double>() > b.get<double>()) == least ? a : b;
  }
  if (key == "properties" && a.is_object() && b.is_object()) {
    Json out = a;
    for (const auto& [name, value] : b.items()) out[name] = out.contains(name) ? both(out[name], value) : value;
    return out;
  }
  fail(ErrorKind::unsupported, where, ": two different '", key, "' together are not supported");
}

Json flattened(const Json& root, const Json& schema, const std::string& where, int depth, int& left) {
  if (--left < 0) fail(ErrorKind::unsupported, where, ": its combinations are more than ", kMaxMerges);
  if (depth > kMaxDepth) fail(ErrorKind::unsupported, where, ": it refers to itself, or is nested too deep");
  if (!schema.is_object()) return schema;
  Json out = schema;
  out.erase("$ref");
  out.erase("allOf");
  if (const auto ref = schema.find("$ref"); ref != schema.end()) {
    if (!ref->is_string()) fail(ErrorKind::usage, where, ": '$ref' must be a string");
    out = merged(out, flattened(root, referred(root, ref->get<std::string>(), where), where, depth + 1, left), where);
  }
  if (const auto all = schema.find("allOf"); all != schema.end()) {
    if (!all->is_array() || all->empty()) fail(ErrorKind::usage, where, ": 'allOf' must be an array that is not empty");
    for (const Json& part : *all) out = merged(out, flattened(root, part, where, depth + 1, left), where);
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

const Json& referred(const Json& root, const std::string& reference, const std::string& where) {
  if (!reference.starts_with('#')) fail(ErrorKind::unsupported, where, ": '$ref' to another document, ", quote(reference), ", is not supported");
  const std::string pointer = reference.substr(1);
  try {
    const Json::json_pointer place(pointer);
    if (root.contains(place)) return root.at(place);
  } catch (const Json::exception&) {
    // Said below.
  }
  fail(ErrorKind::usage, where, ": '$ref' ", quote(reference), " leads nowhere");
}

Json merged(const Json& a, const Json& b, const std::string& where) {
  for (const Json* schema : {&a, &b})
    if (!schema->is_object() && !schema->is_boolean()) fail(ErrorKind::usage, where, ": a schema must be an object, true or false");
  if (b == Json(true)) return a;
  if (a == Json(true)) return b;
  if (a.is_boolean() || b.is_boolean()) return Json(false);
  check_additional(a, b, where);
  Json out = a;
  for (const auto& [key, value] : b.items()) {
    if (!is_constraint(key)) {
      if (!out.contains(key)) out[key] = value;
      continue;
    }
    out[key] = out.contains(key) ? merged_keyword(key, out[key], value, where) : value;
  }
  return out;
}

Json flattened(const Json& root, const Json& schema, const std::string& where, int& left) { return flattened(root, schema, where, 0, left); }

}  // namespace duet::grammar
