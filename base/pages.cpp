#include "base/pages.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/units.h"

namespace duet {
namespace {

constexpr uint64_t kPage = 4096;

}  // namespace

PageArray::PageArray(uint64_t n_bytes) : n_bytes_(n_bytes) {
  if (n_bytes == 0) return;
  data_ = ::mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    fail(ErrorKind::memory, "cannot allocate ", n_bytes, " bytes (", format_size(n_bytes), "): ", std::strerror(errno));
  }
  static_cast<void>(::madvise(data_, n_bytes, MADV_HUGEPAGE));  // a kernel without them refuses
}

PageArray::~PageArray() {
  if (data_ != nullptr) ::munmap(data_, n_bytes_);
}

void PageArray::release(uint64_t begin, uint64_t n_bytes) const {
  const uint64_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + n_bytes) / kPage * kPage;
  if (first < end) ::madvise(data() + first, end - first, MADV_DONTNEED);
}

bool PageArray::lock() const { return data_ == nullptr || ::mlock(data_, n_bytes_) == 0; }

}  // namespace duet
