// JSON schemas with their references and combinations written out.
#pragma once

#include <string>

#include "base/json_fwd.h"

namespace duet::grammar {

// Whether a keyword says something about values, as a title does not.
bool is_constraint(const std::string& keyword);
bool has_constraints(const Json& schema);  // of an object
// What a "$ref" to a place of this document means. Error(unsupported): another document; Error(usage): no such place.
const Json& referred(const Json& root, const std::string& reference, const std::string& where);
// The same schema without "$ref" and "allOf" at its top. Error(unsupported) when that takes more than `left` steps,
// which are counted down.
inline constexpr int kMaxMerges = 2000;
Json flattened(const Json& root, const Json& schema, const std::string& where, int& left);
// One that both fit. Error(unsupported) when it cannot be written as one; Error(usage): nothing fits both.
Json merged(const Json& a, const Json& b, const std::string& where);

}  // namespace duet::grammar
