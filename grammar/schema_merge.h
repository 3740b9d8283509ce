// JSON schemas with their references and combinations written out.
#pragma once

#include <cstddef>
#include <string>

#include "base/error.h"
#include "base/json_fwd.h"

namespace duet::grammar {

// What a schema asks for cannot be: another one beside it may do.
class NothingFits : public Error {
 public:
  explicit NothingFits(const std::string& message) : Error(ErrorKind::usage, message) {}
};
template <class... Parts>
[[noreturn]] void nothing_fits(const std::string& where, const Parts&... parts) {
  throw NothingFits(concat(where, ": ", parts...));
}

// What writing out schemas may still cost: small ones can ask for much.
struct MergeWork {
  size_t merges = 2000;
  size_t values = size_t{1} << 20;  // looked at or copied
};

// Whether a keyword says something about values, as a title does not.
bool is_constraint(const std::string& keyword);
bool has_constraints(const Json& schema);  // of an object
bool is_anything(const Json& schema);      // every value fits it: true, {}
// What a "$ref" to a place of this document means. Error(unsupported): another document; Error(usage): no such place.
const Json& referred(const Json& root, const std::string& reference, const std::string& where);
// The same schema without "$ref" and "allOf" at its top. Error(unsupported) when that takes more work than is left.
Json flattened(const Json& root, const Json& schema, const std::string& where, MergeWork& left);
// One that both fit; b is a part of a's schema: what a says of "unevaluated" values is said of what is in b too.
// Error(unsupported) when it cannot be written as one; NothingFits: nothing fits both.
Json merged(Json a, const Json& b, const std::string& where, MergeWork& left);
// Without "unevaluatedProperties" and "unevaluatedItems", where nothing that they depend on is left to be merged.
Json settled(Json schema, const std::string& where);

}  // namespace duet::grammar
