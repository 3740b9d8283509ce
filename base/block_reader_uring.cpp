#include "base/block_reader_core.h"

namespace duet::detail {

std::unique_ptr<BlockReader> make_uring_reader(ReaderSetup&, std::string& refusal) {
  refusal = "this build of duet has no liburing";
  return nullptr;
}

}  // namespace duet::detail
