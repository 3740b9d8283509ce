// The name Json for headers that only pass documents on: nlohmann-json is slow to compile.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace duet {
using Json = nlohmann::ordered_json;
}
