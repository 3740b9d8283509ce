// JSON text as Python's json.dumps(json.loads(text), ensure_ascii=False) writes it: what Mistral
// models were trained to read around tools.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace duet {

// nullopt when `text` is no JSON for Python either (which, like this, takes NaN and Infinity).
// Of a key that is twice in an object the last value counts, at the first place. Integers keep
// all their digits. Nesting beyond 64 levels counts as no JSON.
std::optional<std::string> python_json(std::string_view text);

// A JSON string literal of `text`, invalid UTF-8 as U+FFFD.
std::string python_json_string(std::string_view text);

}  // namespace duet
