// Requests for text of a form: grammars and JSON schemas -> constraints.
#pragma once

#include <memory>
#include <string>

#include "base/json_fwd.h"
#include "grammar/constraint.h"
#include "server/params.h"
#include "server/served_model.h"

namespace duet::server {

// GBNF that a request asks for, "" when it asks for no form. ApiError 400 naming the field.
//   response_format: {type: text | json_object | json_schema}, as OpenAI's API has it; llama-server's
//   {type: json_object, schema}.
std::string response_format_grammar(const Fields& fields);
//   The above, grammar, json_schema (llama-server), guided_json, guided_grammar, guided_choice and structured_outputs
//   {json, grammar, choice, json_object} (vLLM): one of them.
std::string requested_grammar(const Fields& fields);
// Ollama's format: "json" or a schema.
std::string ollama_format_grammar(const Fields& fields);

// `field` is what errors of the grammar are blamed on.
grammar::Grammar compiled(const std::string& gbnf, const char* field);
std::unique_ptr<const grammar::Constraint> text_constraint(const std::string& gbnf, const ServedModel& model);  // "": none

}  // namespace duet::server
