// The machine's limits as this process meets them: what decode and prefill are held against.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/kernels/kernels.h"

namespace duet {

struct Roofline {
  double read_bytes_per_s = 0;   // of memory, by all threads together
  double int8_macs_per_s = 0;    // multiply-adds of bytes, in registers
  double f32_macs_per_s = 0;
  uint64_t buffer_bytes = 0;     // that were read
};

// On n_threads threads of the compute team, with the instructions of each table:
//   read   best of five of a plain load-and-add loop over anonymous memory in huge pages where the system gives
//          them, each thread a contiguous part, as products read weights
//   peak   best of fifteen register-only loops of independent multiply-adds, about 10 ms each
// Reads min(max_bytes, a quarter of the memory available); takes about two seconds for 4 GB.
// Error(memory) when there is none to read.
std::vector<Roofline> measure_rooflines(std::span<const KernelTable* const> tables, int n_threads,
                                        uint64_t max_bytes = uint64_t{4} << 30);

// The read rate again and again, beside other measurements: memory that is shared with other machines
// changes its speed within minutes. Holds a buffer of min(max_bytes, a quarter of the memory
// available), written by n_threads threads. Error(memory) as above.
class ReadProbe {
 public:
  ReadProbe(const KernelTable& kernels, int n_threads, uint64_t max_bytes = uint64_t{1} << 30);
  ~ReadProbe();
  ReadProbe(const ReadProbe&) = delete;
  ReadProbe& operator=(const ReadProbe&) = delete;
  double bytes_per_s(int n_threads) const;  // of so many threads; best of two passes

 private:
  struct Memory;
  const KernelTable& kernels_;
  std::unique_ptr<Memory> memory_;
};

}  // namespace duet
