// How a divergence is shown.
#pragma once

#include <string>

#include "base/json_fwd.h"
#include "runtime/divergence.h"

namespace duet::cli {

std::string divergence_text(const DivergenceResult& result);
Json divergence_json(const DivergenceResult& result);

}  // namespace duet::cli
