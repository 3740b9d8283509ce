// What a generation took, in the form of llama-server's "timings".
#pragma once

#include "base/json_fwd.h"
#include "server/answer.h"

namespace duet::server {

// Of a finished choice. Where experts are read from the file: the share of those needed meanwhile, by
// whichever request, that were in memory ("expert_hit_rate").
Json timings(const Choice& choice);

}  // namespace duet::server
