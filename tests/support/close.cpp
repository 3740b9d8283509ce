#include "tests/support/close.h"

#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"

namespace duet::test {

GuardedBuffer::GuardedBuffer(size_t bytes, Side side) : size_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t inner = (bytes + page - 1) / page * page;
  map_bytes_ = inner + 2 * page;
  void* map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  DUET_ASSERT(map != MAP_FAILED);
  map_ = static_cast<std::byte*>(map);
  DUET_ASSERT(inner == 0 || mprotect(map_ + page, inner, PROT_READ | PROT_WRITE) == 0);
  data_ = map_ + page + (side == Side::after ? inner - bytes : 0);
}

GuardedBuffer::~GuardedBuffer() { munmap(map_, map_bytes_); }

}  // namespace duet::test
