#include "grammar/json_schema.h"

#include <algorithm>
#include <array>
#include <cmath>
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

// Restrict what a text may be in ways that no grammar here can keep to.
constexpr std::array<std::string_view, 14> kRefused = {"not", "if", "dependentRequired", "dependentSchemas", "dependencies", "patternProperties", "propertyNames",
                                                       "minProperties", "maxProperties", "uniqueItems", "contains", "$dynamicRef", "$recursiveRef", "multipleOf"};

// Keywords that say something of one type, and which.
constexpr std::pair<const char*, const char*> kTypeKeywords[] = {
    {"properties", "object"}, {"required", "object"}, {"additionalProperties", "object"}, {"items", "array"}, {"prefixItems", "array"}, {"minItems", "array"}, {"maxItems", "array"},
    {"pattern", "string"}, {"minLength", "string"}, {"maxLength", "string"}, {"format", "string"}, {"minimum", "number"}, {"maximum", "number"}, {"exclusiveMinimum", "number"},
    {"exclusiveMaximum", "number"}};

bool has_type(const Json& value, const std::string& type) {
  if (type == "integer") return value.is_number_integer() || (value.is_number_float() && value.get<double>() == std::floor(value.get<double>()));
  if (type == "number") return value.is_number();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "null") return value.is_null();
  return type == "array" ? value.is_array() : type == "object" && value.is_object();
}

size_t n_chars(const std::string& utf8) {
  return static_cast<size_t>(std::count_if(utf8.begin(), utf8.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

bool has(const Json& schema, const char* keyword) { return schema.contains(keyword) && !is_anything(schema[keyword]); }

// Whether a keyword of kRefused lets pass all that is written here. "false" is the strictest schema, not none.
bool says_nothing(std::string_view keyword, const Json& value, const Json& schema) {
  if (keyword == "not" || keyword == "uniqueItems") return value == Json(false);
  if (keyword == "if") return !has(schema, "then") && !has(schema, "else");
  if (keyword == "multipleOf") return value == Json(1);
  if (keyword == "propertyNames") return is_anything(value) || value == Json{{"type", "string"}};
  if (keyword == "contains") return schema.contains("minContains") && schema["minContains"] == Json(0) && !schema.contains("maxContains");
  if (keyword == "minProperties") return value.is_number() && value <= Json(schema.contains("required") && schema["required"].is_array() ? schema["required"].size() : 0);
  const bool by_name = keyword == "dependentRequired" || keyword == "dependentSchemas" || keyword == "dependencies" || keyword == "patternProperties";
  return by_name && value.is_object() && std::all_of(value.begin(), value.end(), [](const Json& v) { return v.is_array() ? v.empty() : is_anything(v); });
}

std::string times(size_t least, size_t most) { return most != kNoLimit ? concat("{", least, ",", most, "}") : concat("{", least, ",}"); }

}  // namespace

struct GrammarWriter::State {
  std::map<std::string, std::string> rules;  // by name
  std::map<std::string, std::string> known;       // names by schema, of the document at hand
  std::map<std::string, std::string> impossible;  // schemas that nothing fits, and why
  std::vector<std::map<std::string, std::string>::iterator> made;  // of known, in order
  std::string source;
  const Json* root = nullptr;
  size_t n_rules = 0, n_bytes = 0, work_bytes = 0;
  MergeWork merge_work;
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

  // What is written for something that nothing fits is taken back: nothing.
  template <class Write>
  std::optional<std::string> attempt(const Write& write) {
    const size_t first_rule = n_rules, first_made = made.size();
    const int level = depth;
    try {
      return write();
    } catch (const NothingFits&) {
      for (; n_rules > first_rule; --n_rules) rules.erase(concat("r", n_rules - 1));
      for (; made.size() > first_made; made.pop_back()) known.erase(made.back());
      depth = level;
      return std::nullopt;
    }
  }

  std::string rule_for(const Json& schema);
  std::string convert(const Json& schema);
  std::string convert_object(const Json& schema);
  std::string alternatives(const Json& schema, const char* keyword);
  std::string values(const Json& schema);
  bool fits(const Json& schema, const Json& value) const;
  bool keeps_to(const Json& schema, const std::string& keyword, const Json& value) const;
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
  std::string other_member(const Json& schema, const std::set<std::string>& named);
  std::string key_besides(const std::set<std::string>& named);
  size_t count(const Json& schema, const char* keyword, size_t fallback) const;
  void refuse(const Json& schema) const;
};

// Schemas that are alike are one rule: so those that contain themselves come to an end.
std::string GrammarWriter::State::rule_for(const Json& schema) {
  std::string text = dump(schema);
  work_bytes += text.size();
  if (work_bytes > kMaxWorkBytes) unsupported("its combinations come to more than ", kMaxWorkBytes, " bytes");
  if (const auto found = impossible.find(text); found != impossible.end()) throw NothingFits(found->second);
  const auto [entry, is_new] = known.try_emplace(std::move(text));
  if (!is_new) return entry->second;
  made.push_back(entry);
  const std::string name = entry->second = concat("r", n_rules++);
  if (++depth > kMaxDepth) unsupported("it is nested too deep, or grows without end");
  try {
    set_rule(name, convert(schema));
  } catch (const NothingFits& e) {
    impossible.emplace(entry->first, e.what());
    throw;
  }
  --depth;
  return name;
}

std::string GrammarWriter::State::convert(const Json& schema) {
  if (schema == Json(true)) return "value";
  if (schema == Json(false)) nothing_fits(source, "nothing fits the schema 'false'");
  if (!schema.is_object()) wrong("a schema must be an object, not ", quote(dump(schema)));
  if (const auto ref = schema.find("$ref"); ref != schema.end() && ref->is_string()) {
    Json rest = schema;
    rest.erase("$ref");
    if (!has_constraints(rest)) return rule_for(referred(*root, ref->get<std::string>(), source));
  }
  if (schema.contains("$ref") || schema.contains("allOf")) return rule_for(flattened(*root, schema, source, merge_work));
  refuse(schema);
  for (const char* keyword : {"anyOf", "oneOf"})
    if (schema.contains(keyword)) return alternatives(schema, keyword);
  return convert_object(settled(schema, source));
}

std::string GrammarWriter::State::convert_object(const Json& schema) {
  if (schema.contains("const") || schema.contains("enum")) return values(schema);
  const auto type = schema.find("type");
  if (type == schema.end()) return typed(schema, type_of(schema));
  if (type->is_string()) return typed(schema, type->get<std::string>());
  if (!type->is_array() || type->empty()) wrong("'type' must be a string or an array of strings");
  std::string out;
  for (const Json& one : *type) {
    if (!one.is_string()) wrong("'type' must hold strings");
    if (const auto rule = attempt([&] { return new_rule(typed(schema, one.get<std::string>())); })) out += (out.empty() ? "" : " | ") + *rule;
  }
  if (out.empty()) nothing_fits(source, "nothing fits any of its types ", dump(*type));
  return out;
}

void GrammarWriter::State::refuse(const Json& schema) const {
  for (const std::string_view keyword : kRefused) {
    const auto found = schema.find(std::string(keyword));
    if (found != schema.end() && !says_nothing(keyword, *found, schema)) unsupported("'", keyword, "' is not supported");
  }
}

std::string GrammarWriter::State::alternatives(const Json& schema, const char* keyword) {
  const Json& parts = schema[keyword];
  if (!parts.is_array() || parts.empty()) wrong("'", keyword, "' must be an array that is not empty");
  Json rest = schema;
  rest.erase(keyword);
  const bool alone = !has_constraints(rest);
  const auto whole = [&](const Json& part) { return merged(rest, settled(flattened(*root, part, source, merge_work), source), source, merge_work); };
  std::string out;
  for (const Json& part : parts)
    if (const auto rule = attempt([&] { return rule_for(alone ? part : whole(part)); })) out += (out.empty() ? "" : " | ") + *rule;
  if (out.empty()) nothing_fits(source, "nothing fits any part of '", keyword, "'");
  return out;
}

std::string GrammarWriter::State::values(const Json& schema) {
  const Json all = schema.contains("enum") ? schema["enum"] : Json::array({schema["const"]});
  if (!all.is_array() || all.empty()) wrong("'enum' must be an array that is not empty");
  std::string out;
  for (const Json& value : all)
    if (fits(schema, value)) out += (out.empty() ? "" : " | ") + gbnf_literal(dump(value));
  if (out.empty()) nothing_fits(source, "no value of 'enum' or 'const' has the schema's type and keeps to its bounds");
  return out;
}

bool GrammarWriter::State::fits(const Json& schema, const Json& value) const {
  if (schema.contains("const") && value != schema["const"]) return false;
  const auto type = schema.find("type");
  const auto is = [&](const Json& name) { return name.is_string() && has_type(value, name.get<std::string>()); };
  if (type != schema.end() && !is(*type) && !(type->is_array() && std::any_of(type->begin(), type->end(), is))) return false;
  return std::all_of(std::begin(kTypeKeywords), std::end(kTypeKeywords), [&](const auto& row) {
    return !schema.contains(row.first) || !has_type(value, row.second) || keeps_to(schema, row.first, value);
  });
}

bool GrammarWriter::State::keeps_to(const Json& schema, const std::string& keyword, const Json& value) const {
  const Json& bound = schema[keyword];
  const auto exclusive = [&](const char* name) { return schema.contains(name) && schema[name] == Json(true); };  // draft 4
  if (keyword == "format" || (keyword.starts_with("exclusive") && bound.is_boolean())) return true;
  if (keyword == "minimum") return exclusive("exclusiveMinimum") ? value > bound : value >= bound;
  if (keyword == "maximum") return exclusive("exclusiveMaximum") ? value < bound : value <= bound;
  if (keyword == "exclusiveMinimum") return value > bound;
  if (keyword == "exclusiveMaximum") return value < bound;
  const size_t size = value.is_string() ? n_chars(value.get_ref<const std::string&>()) : value.size();
  if (keyword == "minLength" || keyword == "minItems") return size >= count(schema, keyword.c_str(), 0);
  if (keyword == "maxLength" || keyword == "maxItems") return size <= count(schema, keyword.c_str(), kNoLimit);
  if (keyword == "required") {
    const std::set<std::string> names = required_names(schema);
    return std::all_of(names.begin(), names.end(), [&](const std::string& name) { return value.contains(name); });
  }
  unsupported("'", keyword, "' beside 'enum' or 'const' is not supported");
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

// A format that is not known says nothing: many are only names.
std::string GrammarWriter::State::string_expression(const Json& schema) {
  const bool lengths = schema.contains("minLength") || schema.contains("maxLength");
  for (const char* keyword : {"pattern", "format"}) {
    const auto found = schema.find(keyword);
    if (found == schema.end()) continue;
    if (!found->is_string()) wrong("'", keyword, "' must be a string");
    const auto& text = found->get_ref<const std::string&>();
    const bool is_pattern = std::string_view(keyword) == "pattern";
    if (!is_pattern && format_to_gbnf(text).empty()) continue;
    const Json format = schema.value("format", Json());
    if (lengths || (is_pattern && format.is_string() && !format_to_gbnf(format.get_ref<const std::string&>()).empty()))
      unsupported("'", keyword, "' beside other restrictions of a string is not supported");
    std::string inside;
    try {
      inside = is_pattern ? pattern_to_gbnf(text) : std::string(format_to_gbnf(text));
    } catch (const Error& e) {
      unsupported(e.what());
    }
    return concat("\"\\\"\" ", inside, " \"\\\"\"");
  }
  if (!lengths) return "string";
  const size_t least = count(schema, "minLength", 0);
  const size_t most = count(schema, "maxLength", kNoLimit);
  if (most < least) nothing_fits(source, "'maxLength' is below 'minLength'");
  return concat("\"\\\"\" char", times(least, most), " \"\\\"\"");
}

std::optional<Bound> GrammarWriter::State::one_bound(const Json& schema, const char* keyword, bool exclusive) const {
  const auto found = schema.find(keyword);
  if (found == schema.end() || found->is_boolean()) return std::nullopt;
  if (!found->is_number()) wrong("'", keyword, "' must be a number");
  const auto value = parse_decimal(dump(*found));
  // No number that is written here is so far out.
  const double number = found->get<double>();
  const bool lower = std::string_view(keyword).ends_with("inimum");
  if (!value && std::abs(number) >= 1e16 && (number < 0) == lower) return std::nullopt;
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
  integer = integer || schema.contains("multipleOf");  // of 1, or it had been refused
  const auto low = bound(schema, "minimum", "exclusiveMinimum"), high = bound(schema, "maximum", "exclusiveMaximum");
  if (!low && !high) return integer ? "integer" : "number";
  const auto range = integer ? integer_range(low, high) : decimal_range(low, high);
  if (!range) nothing_fits(source, "no number is within its bounds");
  return *range;
}

// Behind listed items there may be others; where nothing is said of them, only those that are needed.
std::string GrammarWriter::State::array_expression(const Json& schema) {
  const size_t least = count(schema, "minItems", 0);
  size_t most = count(schema, "maxItems", kNoLimit);
  const auto items = schema.find("items"), prefix = schema.find("prefixItems");
  if (prefix != schema.end() && !prefix->is_array()) wrong("'prefixItems' must be an array");
  std::vector<std::string> first;
  std::string item = "value";
  // No place behind one that nothing fits.
  const auto add = [&](const Json& of, const auto& place) {
    if (first.size() >= most) return;
    if (const auto rule = attempt([&] { return rule_for(of); })) place(*rule);
    else most = first.size();
  };
  if (prefix != schema.end())
    for (const Json& of : *prefix) add(of, [&](const std::string& rule) { first.push_back(rule); });
  if (items != schema.end()) add(*items, [&](const std::string& rule) { item = rule; });
  else if (prefix != schema.end()) most = std::min(most, std::max(first.size(), least));
  if (most < least) nothing_fits(source, "the array has room for fewer items than 'minItems'");
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
  const auto add = [&](const std::string& name, const std::string& rule) {
    all.emplace_back(concat(gbnf_literal(dump(Json(name))), " ws \":\" ws ", rule, " ws"), needed.contains(name));
  };
  for (const auto& [name, value] : properties.items()) {
    if (needed.contains(name)) add(name, rule_for(value));
    else if (const auto rule = attempt([&] { return rule_for(value); })) add(name, *rule);
  }
  std::set<std::string> named;
  for (const auto& [name, value] : properties.items()) named.insert(name);
  for (const std::string& name : needed) {
    if (!named.insert(name).second) continue;
    if (closed) nothing_fits(source, "the property ", quote(name), " is required and not allowed");
    add(name, rule_for(free ? Json(true) : *additional));
  }
  const auto others = additional == schema.end() || closed ? std::nullopt : attempt([&] { return other_member(schema, named); });
  return concat("\"{\" ws ", members(all, others.value_or("")), " \"}\"");
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

std::string GrammarWriter::State::other_member(const Json& schema, const std::set<std::string>& named) {
  return new_rule(concat(key_besides(named), " ws \":\" ws ", rule_for(schema["additionalProperties"]), " ws"));
}

// A name that is none of these. Without escapes, which could spell them.
std::string GrammarWriter::State::key_besides(const std::set<std::string>& named) {
  if (named.empty()) return "string";
  struct Node {
    std::map<unsigned char, Node> next;
    bool is_name = false;
  };
  Node tree;
  for (const std::string& name : named) {
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
  state_->impossible.clear();
  state_->made.clear();
  state_->root = &schema;
  state_->source = source;
  state_->depth = 0;
  state_->merge_work.merges = MergeWork{}.merges;  // the rest is for all schemas together
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
