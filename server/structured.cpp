#include "server/structured.h"

#include <array>

#include "base/json.h"
#include "grammar/json_schema.h"
#include "grammar/json_text.h"
#include "server/api_error.h"

namespace duet::server {
namespace {

std::string of_schema(const Json& schema, const std::string& field) {
  try {
    return grammar::schema_grammar(schema, concat("'", field, "'"));
  } catch (const Error& e) {
    bad_request(field, e.what());
  }
}

// A schema, as JSON or as its text; the empty one asks for an object. "": none.
std::string field_schema(const Fields& f, const char* field) {
  const Json* schema = f.find(field);
  if (schema == nullptr) return {};
  Json parsed = *schema;
  try {
    if (schema->is_string()) parsed = parse_json(schema->get_ref<const std::string&>(), concat("'", f.name(field), "'"));
  } catch (const Error& e) {
    bad_request(f.name(field), e.what());
  }
  return parsed.is_object() && parsed.empty() ? grammar::json_object_grammar() : of_schema(parsed, f.name(field));
}

// Exactly one of these texts; "": not asked for.
std::string of_choices(const Fields& f, const char* field) {
  if (f.find(field) == nullptr) return {};
  const std::vector<std::string> choices = f.strings(field, 1024);
  if (choices.empty()) bad_request(f.name(field), "'", f.name(field), "' must hold texts");
  std::string out = "root ::= ";
  for (size_t i = 0; i < choices.size(); ++i) out += (i == 0 ? "" : " | ") + grammar::gbnf_literal(choices[i]);
  return out;
}

}  // namespace

std::string response_format_grammar(const Fields& f) {
  const Json* value = f.find("response_format");
  if (value == nullptr) return {};
  const Fields format(*value, "response_format.");
  const std::string type = format.string("type", "text");
  if (type == "text") return {};
  if (type == "json_object") {
    const Json* schema = format.find("schema");
    return schema != nullptr ? of_schema(*schema, "response_format.schema") : grammar::json_object_grammar();
  }
  if (type != "json_schema") bad_request("response_format", "'response_format' of type ", quote(type), " is not supported; types are text, json_object and json_schema");
  const Json* inner = format.find("json_schema");
  if (inner == nullptr) bad_request("response_format.json_schema", "'response_format.json_schema' is missing");
  const Json* schema = Fields(*inner, "response_format.json_schema.").find("schema");
  if (schema == nullptr) bad_request("response_format.json_schema.schema", "'response_format.json_schema.schema' is missing");
  return of_schema(*schema, "response_format.json_schema.schema");
}

std::string requested_grammar(const Fields& f) {
  std::string out = response_format_grammar(f);
  const auto add = [&](const std::string& field, const std::string& gbnf) {
    if (!out.empty() && !gbnf.empty()) bad_request(field, "'", field, "' is one form of several asked for; only one can be kept to");
    if (!gbnf.empty()) out = gbnf;
  };
  for (const char* field : {"json_schema", "guided_json"}) add(field, field_schema(f, field));
  for (const char* field : {"grammar", "guided_grammar"}) add(field, f.string(field));
  add("guided_choice", of_choices(f, "guided_choice"));
  const Json* structured = f.find("structured_outputs");
  if (structured == nullptr) return out;
  const Fields of(*structured, "structured_outputs.");
  for (const char* field : {"regex", "structural_tag", "whitespace_pattern", "disable_any_whitespace"}) of.refuse(field, "");
  add(of.name("json"), field_schema(of, "json"));
  add(of.name("grammar"), of.string("grammar"));
  add(of.name("choice"), of_choices(of, "choice"));
  if (of.boolean("json_object", false)) add(of.name("json_object"), grammar::json_object_grammar());
  return out;
}

std::string ollama_format_grammar(const Fields& f) {
  const Json* format = f.find("format");
  if (format == nullptr || *format == Json("")) return {};
  if (*format == Json("json")) return grammar::json_object_grammar();
  if (!format->is_object()) bad_request("format", "'format' must be \"json\" or a JSON schema");
  return of_schema(*format, "format");
}

grammar::Grammar compiled(const std::string& gbnf, const char* field) {
  try {
    return grammar::Grammar::parse(gbnf);
  } catch (const Error& e) {
    bad_request(field, e.what());
  }
}

std::unique_ptr<const grammar::Constraint> text_constraint(const std::string& gbnf, const ServedModel& model) {
  if (gbnf.empty()) return nullptr;
  return std::make_unique<grammar::Constraint>(grammar::Constraint{.vocabulary = &model.vocabulary, .grammar = compiled(gbnf, "grammar")});
}

}  // namespace duet::server
