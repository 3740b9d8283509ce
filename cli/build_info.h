// Which source this binary was built from. Written by cmake/build_info.cmake at each build.
#pragma once

namespace duet::cli {

// Abbreviated commit, with "+changes" when tracked files differed; "unknown" outside a repository.
const char* build_commit();

}  // namespace duet::cli
