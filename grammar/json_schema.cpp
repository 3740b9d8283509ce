#include "grammar/json_schema.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "grammar/json_text.h"
#include "grammar/number_range.h"
#include "grammar/schema_merge.h"

namespace duet::grammar {
namespace {

constexpr size_t kMaxSchemaBytes = size_t{128} << 10, kMaxWorkBytes = size_t{16} << 20, kMaxTextBytes = size_t{1} << 20, kMaxItems = 100000, kNoLimit = SIZE_MAX;
constexpr int kMaxDepth = 200;

// JSON without a schema. Numbers that every reader can hold; surrogates in pairs only.
constexpr std::pair<const char*, const char*> kBasics[] = {
    {"ws", R"((" " | "\n" [ \t]{0,16})?)"},
    {"hex", "[0-9a-fA-F]"},
    {"char", R"([^"\\\x00-\x1f\x7f] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CeEfF] hex{3} | [dD] ([0-7] hex{2} | [89abAB] hex{2} "\\u" [dD] [c-fC-F] hex{2}))))"},
    {"string", R"("\"" char* "\"")"},
    {"integer", R"("-"? ("0" | [1-9] [0-9]{0,15}))"},
    {"number", R"(integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?)"},
    {"boolean", R"("true" | "false")"},
    {"null", R"("null")"},
    {"array", R"("[" ws (value ws ("," ws value ws)*)? "]")"},
    {"object", R"("{" ws (string ws ":" ws value ws ("," ws string ws ":" ws value ws)*)? "}")"},
    {"value", "object | array | string | number | boolean | null"},
};

constexpr std::array<std::string_view, 21> kRefused = {"not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "patternProperties",
                                                       "propertyNames", "minProperties", "maxProperties", "uniqueItems", "contains", "minContains", "maxContains",
                                                       "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "additionalItems", "multipleOf"};

// Keywords that say something of one type, and which.
constexpr std::pair<const char*, const char*> kTypeKeywords[] = {
    {"properties", "object"}, {"required", "object"}, {"additionalProperties", "object"}, {"items", "array"}, {"prefixItems", "array"}, {"minItems", "array"}, {"maxItems", "array"},
    {"pattern", "string"}, {"minLength", "string"}, {"maxLength", "string"}, {"format", "string"}, {"minimum", "number"}, {"maximum", "number"}, {"exclusiveMinimum", "number"},
    {"exclusiveMaximum", "number"}};

bool has_type(const Json& value, const std::string& type) {
  if (type == "integer") return value.is_number_integer();
  if (type == "number") return value.is_number();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "null") return value.is_null();
  return type == "array" ? value.is_array() : type == "object" && value.is_object();
}

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string times(size_t least, size_t most) { return most != kNoLimit ? concat("{", least, ",", most, "}") : concat("{", least, ",}"); }

}  // namespace

struct GrammarWriter::State {
  std::map<std::string, std::string> rules;  // by name
  std::map<std::string, std::string> known;  // names by schema, of the document at hand
  std::string source;
  const Json* root = nullptr;
  size_t n_rules = 0, n_bytes = 0, work_bytes = 0;
  int merges_left = kMaxMerges;
  int depth = 0;

  template <class... Parts>
  [[noreturn]] void unsupported(const Parts&... parts) const {
    fail(ErrorKind::unsupported, source, ": ", parts...);
  }
  template <class... Parts>
  [[noreturn]] void wrong(const Parts&... parts) const {
    fail(ErrorKind::usage, source, ": ", parts...);
  }

  std::string new_rule(const std::string& body) {
    const std::string name = concat("r", n_rules++);
    set_rule(name, body);
    return name;
  }
  void set_rule(const std::string& name, const std::string& body) {
    n_bytes += name.size() + body.size() + 6;
    if (n_bytes > kMaxTextBytes) unsupported("the schema comes to more than ", kMaxTextBytes, " bytes of grammar");
    rules[name] = body;
  }

  std::string rule_for(const Json& schema);
  std::string convert(const Json& schema);
  std::string convert_object(const Json& schema);
  std::string alternatives(const Json& schema, const char* keyword);
  std::string values(const Json& schema);
  std::string typed(const Json& schema, const std::string& type);
  std::string type_of(const Json& schema) const;
  std::string string_expression(const Json& schema);
  std::string number_expression(const Json& schema, bool integer);
  std::optional<Bound> bound(const Json& schema, const char* inclusive, const char* exclusive) const;
  std::optional<Bound> one_bound(const Json& schema, const char* keyword, bool exclusive) const;
  std::string array_expression(const Json& schema);
  std::string items_expression(const std::vector<std::string>& first, const std::string& item, size_t least, size_t most);
  std::string object_expression(const Json& schema);
  std::set<std::string> required_names(const Json& schema) const;
  std::string members(const std::vector<std::pair<std::string, bool>>& members, const std::string& others);
  std::string other_member(const Json& schema, const Json& properties);
  std::string key_besides(const Json& properties);
  size_t count(const Json& schema, const char* keyword, size_t fallback) const;
  void refuse(const Json& schema) const;
};

// Schemas that are alike are one rule: so those that contain themselves come to an end.
std::string GrammarWriter::State::rule_for(const Json& schema) {
  std::string text = dump(schema);
  work_bytes += text.size();
  if (work_bytes > kMaxWorkBytes) unsupported("its combinations come to more than ", kMaxWorkBytes, " bytes");
  const auto [entry, is_new] = known.try_emplace(std::move(text));
  if (!is_new) return entry->second;
  const std::string name = entry->second = concat("r", n_rules++);
  if (++depth > kMaxDepth) unsupported("it is nested too deep, or grows without end");
  set_rule(name, convert(schema));
  --depth;
  return name;
}

std::string GrammarWriter::State::convert(const Json& schema) {
  if (schema == Json(true)) return "value";
  if (schema == Json(false)) wrong("nothing fits the schema 'false'");
  if (!schema.is_object()) wrong("a schema must be an object, not ", quote(dump(schema)));
  if (const auto ref = schema.find("$ref"); ref != schema.end() && ref->is_string()) {
    Json rest = schema;
    rest.erase("$ref");
    if (!has_constraints(rest)) return rule_for(referred(*root, ref->get<std::string>(), source));
  }
  if (schema.contains("$ref") || schema.contains("allOf")) return rule_for(flattened(*root, schema, source, merges_left));
  return convert_object(schema);
}

std::string GrammarWriter::State::convert_object(const Json& schema) {
  refuse(schema);
  for (const char* keyword : {"anyOf", "oneOf"})
    if (schema.contains(keyword)) return alternatives(schema, keyword);
  if (schema.contains("const") || schema.contains("enum")) return values(schema);
  const auto type = schema.find("type");
  if (type == schema.end()) return typed(schema, type_of(schema));
  if (type->is_string()) return typed(schema, type->get<std::string>());
  if (!type->is_array() || type->empty()) wrong("'type' must be a string or an array of strings");
  std::string out;
  for (const Json& one : *type) {
    if (!one.is_string()) wrong("'type' must hold strings");
    out += (out.empty() ? "" : " | ") + new_rule(typed(schema, one.get<std::string>()));
  }
  return out;
}

// Keywords that restrict what a text may be and that no grammar here can keep to.
void GrammarWriter::State::refuse(const Json& schema) const {
  for (const std::string_view keyword : kRefused) {
    const auto found = schema.find(std::string(keyword));
    if (found == schema.end() || *found == Json(false) || (keyword == "multipleOf" && *found == Json(1))) continue;
    if ((keyword == "minProperties" || keyword == "minContains") && *found == Json(0)) continue;
    unsupported("'", keyword, "' is not supported");
  }
}

std::string GrammarWriter::State::alternatives(const Json& schema, const char* keyword) {
  const Json& parts = schema[keyword];
  if (!parts.is_array() || parts.empty()) wrong("'", keyword, "' must be an array that is not empty");
  Json rest = schema;
  rest.erase(keyword);
  const bool alone = !has_constraints(rest);
  std::string out;
  for (const Json& part : parts) {
    const Json whole = alone ? part : merged(rest, flattened(*root, part, source, merges_left), source);
    if (whole == Json(false)) continue;
    out += (out.empty() ? "" : " | ") + rule_for(whole);
  }
  if (out.empty()) wrong("nothing fits any part of '", keyword, "'");
  return out;
}

std::string GrammarWriter::State::values(const Json& schema) {
  Json all = schema.contains("enum") ? schema["enum"] : Json::array({schema["const"]});
  if (!all.is_array() || all.empty()) wrong("'enum' must be an array that is not empty");
  const auto any_is = [&](const char* type) { return std::any_of(all.begin(), all.end(), [&](const Json& value) { return has_type(value, type); }); };
  for (const auto& [keyword, type] : kTypeKeywords)
    if (schema.contains(keyword) && any_is(type)) unsupported("'", keyword, "' beside 'enum' or 'const' is not supported");
  const auto fits = [&](const Json& value) {
    if (schema.contains("const") && value != schema["const"]) return false;
    const auto type = schema.find("type");
    if (type == schema.end()) return true;
    if (type->is_string()) return has_type(value, type->get<std::string>());
    return type->is_array() && std::any_of(type->begin(), type->end(), [&](const Json& t) { return t.is_string() && has_type(value, t.get<std::string>()); });
  };
  std::string out;
  for (const Json& value : all)
    if (fits(value)) out += (out.empty() ? "" : " | ") + gbnf_literal(dump(value));
  if (out.empty()) wrong("no value of 'enum' or 'const' has the schema's type");
  return out;
}

// Of a schema that names no type: the one its keywords are for.
std::string GrammarWriter::State::type_of(const Json& schema) const {
  for (const auto& [keyword, type] : kTypeKeywords)
    if (schema.contains(keyword)) return type;
  return "any";
}

std::string GrammarWriter::State::typed(const Json& schema, const std::string& type) {
  if (type == "any") return "value";
  if (type == "boolean" || type == "null") return type;
  if (type == "string") return string_expression(schema);
  if (type == "integer" || type == "number") return number_expression(schema, type == "integer");
  if (type == "array") return array_expression(schema);
  if (type == "object") return object_expression(schema);
  wrong("there is no type ", quote(type));
}

size_t GrammarWriter::State::count(const Json& schema, const char* keyword, size_t fallback) const {
  const auto found = schema.find(keyword);
  if (found == schema.end()) return fallback;
  const double n = found->is_number() ? found->get<double>() : -1;
  if (!(n >= 0) || n != static_cast<double>(static_cast<size_t>(std::min(n, 1e15)))) wrong("'", keyword, "' must be a whole number, 0 or more");
  if (n > static_cast<double>(kMaxItems)) unsupported("'", keyword, "' above ", kMaxItems, " is not supported");
  return static_cast<size_t>(n);
}

std::string GrammarWriter::State::string_expression(const Json& schema) {
  const bool lengths = schema.contains("minLength") || schema.contains("maxLength");
  for (const char* keyword : {"pattern", "format"}) {
    const auto found = schema.find(keyword);
    if (found == schema.end()) continue;
    if (!found->is_string()) wrong("'", keyword, "' must be a string");
    const auto& text = found->get_ref<const std::string&>();
    const bool is_pattern = std::string_view(keyword) == "pattern";
    if (!is_pattern && (text == "password" || text == "binary")) continue;  // says nothing of the text
    if (lengths || (is_pattern && schema.contains("format"))) unsupported("'", keyword, "' beside other restrictions of a string is not supported");
    std::string inside;
    try {
      inside = is_pattern ? pattern_to_gbnf(text) : std::string(format_to_gbnf(text));
    } catch (const Error& e) {
      unsupported(e.what());
    }
    if (inside.empty()) unsupported("the format ", quote(text), " is not supported");
    return concat("\"\\\"\" ", inside, " \"\\\"\"");
  }
  if (!lengths) return "string";
  const size_t least = count(schema, "minLength", 0);
  const size_t most = count(schema, "maxLength", kNoLimit);
  if (most < least) wrong("'maxLength' is below 'minLength'");
  return concat("\"\\\"\" char", times(least, most), " \"\\\"\"");
}

std::optional<Bound> GrammarWriter::State::one_bound(const Json& schema, const char* keyword, bool exclusive) const {
  const auto found = schema.find(keyword);
  if (found == schema.end() || found->is_boolean()) return std::nullopt;
  if (!found->is_number()) wrong("'", keyword, "' must be a number");
  const auto value = parse_decimal(dump(*found));
  if (!value) unsupported("'", keyword, "' of ", dump(*found), " has too many digits");
  return Bound{*value, exclusive};
}

// The narrower of the two; draft 4 says "exclusiveMinimum": true.
std::optional<Bound> GrammarWriter::State::bound(const Json& schema, const char* inclusive, const char* exclusive) const {
  const bool flag = schema.contains(exclusive) && schema[exclusive] == Json(true);
  const auto a = one_bound(schema, inclusive, flag), b = one_bound(schema, exclusive, true);
  if (!a || !b) return a ? a : b;
  const double x = schema[inclusive].get<double>(), y = schema[exclusive].get<double>();
  const bool lower = std::string_view(inclusive) == "minimum";
  return (lower ? y >= x : y <= x) ? b : a;
}

std::string GrammarWriter::State::number_expression(const Json& schema, bool integer) {
  const auto low = bound(schema, "minimum", "exclusiveMinimum"), high = bound(schema, "maximum", "exclusiveMaximum");
  if (!low && !high) return integer ? "integer" : "number";
  const auto range = integer ? integer_range(low, high) : decimal_range(low, high);
  if (!range) wrong("no number is within its bounds");
  return *range;
}

std::string GrammarWriter::State::array_expression(const Json& schema) {
  const size_t least = count(schema, "minItems", 0);
  size_t most = count(schema, "maxItems", kNoLimit);
  const auto items = schema.find("items");
  const bool is_list = items != schema.end() && items->is_array();  // as prefixItems was called
  const auto prefix = is_list ? items : schema.find("prefixItems");
  std::vector<std::string> first;
  if (prefix != schema.end()) {
    if (!prefix->is_array()) wrong("'prefixItems' must be an array");
    for (const Json& item : *prefix) first.push_back(rule_for(item));
  }
  // Behind listed items there may be others, of which nothing is said: they are not needed.
  const bool closed = items == schema.end() ? prefix != schema.end() : is_list || *items == Json(false);
  if (closed) most = std::min(most, first.size());
  if (most < least) wrong("the array has room for fewer items than 'minItems'");
  first.resize(std::min(first.size(), most));
  const std::string item = closed || items == schema.end() ? "value" : rule_for(*items);
  return concat("\"[\" ws ", items_expression(first, item, least, most), " \"]\"");
}

// From the last item to the first, each with those behind it.
std::string GrammarWriter::State::items_expression(const std::vector<std::string>& first, const std::string& item, size_t least, size_t most) {
  std::string rest;
  if (most > first.size()) {
    const size_t n = first.size() + (first.empty() ? 1 : 0);  // the first item of all has no comma
    rest = concat("(\",\" ws ", item, " ws)", times(least - std::min(least, n), most == kNoLimit ? kNoLimit : most - n));
    if (first.empty()) rest = concat("(", item, " ws ", rest, ")", least == 0 ? "?" : "");
  }
  for (size_t i = first.size(); i-- > 0;) {
    rest = new_rule(concat(i == 0 ? "" : "\",\" ws ", first[i], " ws ", rest));
    if (i >= least) rest += "?";
  }
  return rest;
}

std::set<std::string> GrammarWriter::State::required_names(const Json& schema) const {
  const Json required = schema.value("required", Json::array());
  if (!required.is_array()) wrong("'required' must be an array");
  std::set<std::string> out;
  for (const Json& name : required) {
    if (!name.is_string()) wrong("'required' must hold strings");
    out.insert(name.get<std::string>());
  }
  return out;
}

std::string GrammarWriter::State::object_expression(const Json& schema) {
  const Json properties = schema.value("properties", Json::object());
  if (!properties.is_object()) wrong("'properties' must be an object");
  const std::set<std::string> needed = required_names(schema);
  const auto additional = schema.find("additionalProperties");
  const bool closed = additional != schema.end() && *additional == Json(false);
  const bool free = additional == schema.end() || *additional == Json(true);
  if (properties.empty() && needed.empty() && free) return "object";
  std::vector<std::pair<std::string, bool>> all;
  const auto add = [&](const std::string& name, const Json& value) {
    all.emplace_back(concat(gbnf_literal(dump(Json(name))), " ws \":\" ws ", rule_for(value), " ws"), needed.contains(name));
  };
  for (const auto& [name, value] : properties.items())
    if (value != Json(false) || needed.contains(name)) add(name, value);
  for (const std::string& name : needed) {
    if (properties.contains(name)) continue;
    if (closed) wrong("the property ", quote(name), " is required and not allowed");
    add(name, free ? Json(true) : *additional);
  }
  return concat("\"{\" ws ", members(all, additional == schema.end() || closed ? "" : other_member(schema, properties)), " \"}\"");
}

// In order. A comma stands before all but the first member there is, so those that may be first, up to the first
// that must be there, are alternatives.
std::string GrammarWriter::State::members(const std::vector<std::pair<std::string, bool>>& all, const std::string& others) {
  std::string rest = others.empty() ? "" : concat("(\",\" ws ", others, ")*");  // behind another member
  std::string first = others.empty() ? "\"\"" : concat("(", others, " ", rest, ")?");
  for (size_t i = all.size(); i-- > 0;) {
    const auto& [member, needed] = all[i];
    const std::string own = new_rule(member), behind = rest.empty() ? "" : " " + rest;
    first = needed ? own + behind : concat("(", own, behind, " | ", first, ")");
    if (first.size() > 200) first = new_rule(first);
    rest = concat("(\",\" ws ", own, ")", needed ? "" : "?", behind);
    if (rest.size() > 200) rest = new_rule(rest);
  }
  return first;
}

std::string GrammarWriter::State::other_member(const Json& schema, const Json& properties) {
  Json named = properties;
  for (const Json& name : schema.value("required", Json::array())) named[name.get<std::string>()] = true;
  return new_rule(concat(key_besides(named), " ws \":\" ws ", rule_for(schema["additionalProperties"]), " ws"));
}

// A name that is none of these. Without escapes, which could spell them.
std::string GrammarWriter::State::key_besides(const Json& properties) {
  if (properties.empty()) return "string";
  struct Node {
    std::map<unsigned char, Node> next;
    bool is_name = false;
  };
  Node tree;
  for (const auto& [name, value] : properties.items()) {
    Node* node = &tree;
    // Names beyond these characters cannot be spelt without an escape anyway.
    if (name.size() > 256 || std::any_of(name.begin(), name.end(), [](char c) { return c <= ' ' || c > '~' || c == '"' || c == '\\'; })) continue;
    for (const char c : name) node = &node->next[static_cast<unsigned char>(c)];
    node->is_name = true;
  }
  // Characters of other keys; with all others left out a name cannot be spelt by accident.
  CharSet chars(U'!', U'~');
  chars = chars.without(CharSet::of({{U'"', U'"'}, {U'\\', U'\\'}}));
  const std::string any = gbnf_class(chars) + "*";
  const auto write = [&](const auto& self, const Node& node) -> std::string {
    CharSet taken;
    std::string out;
    for (const auto& [c, next] : node.next) {
      taken.add(c, c);
      out += concat(out.empty() ? "" : " | ", gbnf_literal(std::string(1, static_cast<char>(c))), " ", new_rule(self(self, next)));
    }
    if (const CharSet free = chars.without(taken); !free.empty()) out += concat(out.empty() ? "" : " | ", gbnf_class(free), " ", any);
    return node.is_name ? out : out + " | \"\"";
  };
  return concat("\"\\\"\" ", new_rule(write(write, tree)), " \"\\\"\"");
}

GrammarWriter::GrammarWriter() : state_(std::make_unique<State>()) {
  for (const auto& [name, body] : kBasics) state_->rules[name] = body;
}
GrammarWriter::~GrammarWriter() = default;

std::string GrammarWriter::add_schema(const Json& schema, const std::string& source) {
  state_->known.clear();
  state_->root = &schema;
  state_->source = source;
  state_->depth = 0;
  state_->work_bytes = 0;
  state_->merges_left = kMaxMerges;
  if (dump(schema).size() > kMaxSchemaBytes) state_->unsupported("a schema of more than ", kMaxSchemaBytes, " bytes");
  try {
    return state_->rule_for(schema);
  } catch (const Json::exception& e) {
    state_->wrong("not a valid schema: ", e.what());
  }
}

std::string GrammarWriter::any_object() { return "object"; }
void GrammarWriter::add_rule(const std::string& name, const std::string& body) { state_->set_rule(name, body); }

std::string GrammarWriter::text() const {
  std::string out;
  for (const auto& [name, body] : state_->rules) out += concat(name, " ::= ", body, "\n");
  return out;
}

std::string schema_grammar(const Json& schema, const std::string& source) {
  GrammarWriter writer;
  writer.add_rule("root", writer.add_schema(schema, source));
  return writer.text();
}

std::string json_object_grammar() {
  GrammarWriter writer;
  writer.add_rule("root", writer.any_object());
  return writer.text();
}

}  // namespace duet::grammar
