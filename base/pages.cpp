#include "base/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/units.h"

namespace duet {
namespace {

constexpr uint64_t kPage = 4096, kHugePage = uint64_t{2} << 20;

}  // namespace

// Begins on a huge page: a disk takes so many pieces per request, and small pages make a read of
// 1 MiB 256 of them.
PageArray::PageArray(uint64_t n_bytes, bool huge) : n_bytes_(n_bytes) {
  if (n_bytes == 0) return;
  const uint64_t mapped = n_bytes + kHugePage;
  void* at = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED)
    fail(ErrorKind::memory, "cannot allocate ", n_bytes, " bytes (", format_size(n_bytes), "): ", std::strerror(errno));
  const auto first = reinterpret_cast<uintptr_t>(at);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage, end = (begin + n_bytes + kPage - 1) / kPage * kPage;
  if (begin > first) ::munmap(at, begin - first);
  if (first + mapped > end) ::munmap(reinterpret_cast<void*>(end), first + mapped - end);
  data_ = reinterpret_cast<void*>(begin);
  static_cast<void>(::madvise(data_, n_bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE));  // a kernel without them refuses
}

void PageArray::give_back(std::byte* first, uint64_t n_bytes) const {
  DUET_ASSERT(first >= data() && first + n_bytes <= data() + n_bytes_);
  // Whole pages of the system only: it refuses others, and what lies beside is not ours to give.
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(first);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + n_bytes) / page * page;
  if (begin < end) static_cast<void>(::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED));
}

PageArray::~PageArray() {
  if (data_ != nullptr) ::munmap(data_, n_bytes_);
}

}  // namespace duet
