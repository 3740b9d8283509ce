// Internal to runtime/kernels: what each instruction-set file contributes to a table.
//
// A table is built by calling these in turn (dispatch.cpp); each function overrides the entries it
// has something better for. They only store pointers, but those files are compiled with the flags
// of their instruction set: call one only where KernelTable::needs is met.
#pragma once

#include "runtime/kernels/kernels.h"

namespace duet {

void fill_scalar(KernelTable& table);
void add_scalar_attention(KernelTable& table);
void add_scalar_peak(KernelTable& table);
#if defined(__x86_64__)
void add_avx2_block32(KernelTable& table);
void add_avx2_k(KernelTable& table);
void add_avx2_float(KernelTable& table);
void add_avx2_peak(KernelTable& table);
void add_avxvnni(KernelTable& table);
void add_avx512vnni256(KernelTable& table);
void add_avx512_block32(KernelTable& table);
void add_avx512_float(KernelTable& table);
void add_avx512_k(KernelTable& table);
void add_avx512_peak(KernelTable& table);
#elif defined(__aarch64__)
void add_neon_block32(KernelTable& table);
void add_neon_k(KernelTable& table);
void add_neon_float(KernelTable& table);
void add_neon_peak(KernelTable& table);
#endif

}  // namespace duet
