// JSON schemas -> grammars. A text of the grammar fits the schema; not every text that fits is in the grammar:
// properties come in the order of the schema, others only where additionalProperties asks for them, and white
// space between tokens is short.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "base/json_fwd.h"

namespace duet::grammar {

// Writes GBNF: rules of its own beside those made from schemas. Every text of a rule is bounded by white space of
// the rule "ws" only where JSON has some inside.
class GrammarWriter {
 public:
  GrammarWriter();
  ~GrammarWriter();
  GrammarWriter(const GrammarWriter&) = delete;
  GrammarWriter& operator=(const GrammarWriter&) = delete;

  // The name of a rule for JSON that fits. `source` begins messages. Error(unsupported): a keyword that has no
  // counterpart here, named with its place; Error(usage): not a schema, or one that nothing fits.
  std::string add_schema(const Json& schema, const std::string& source);
  std::string any_object();  // the name of a rule for any JSON object
  // A rule of a name that no schema's has: lower case letters only.
  void add_rule(const std::string& name, const std::string& body);
  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// For texts that fit one schema, and for any object.
std::string schema_grammar(const Json& schema, const std::string& source);
std::string json_object_grammar();

}  // namespace duet::grammar
