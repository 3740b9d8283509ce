# Instruction-set flags are per file, chosen at run time (runtime/kernels/dispatch.cpp): the build
# as a whole stays at the architecture's baseline. Each file exports only its add_* function
# (cmake/check_isa_symbols.cmake); optimized in debug builds too, because without inlining the
# standard functions that xsimd calls would be emitted with these flags for anyone to link.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2_flags -mavx2 -mfma -mf16c $<$<CONFIG:Debug>:-O2>)
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND DUET_SANITIZE)
    # "ignoring loop annotation" where checks are inserted: a warning without a name.
    list(APPEND avx2_flags -Wno-error)
    list(APPEND avx512_flags -Wno-error)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 intrinsics start from "undefined" registers and warn (GCC bug 105593).
    list(APPEND avx512_flags -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  set(avx2_sources runtime/kernels/x86_avx2.cpp runtime/kernels/x86_avx2_k.cpp runtime/kernels/x86_avx2_float.cpp runtime/kernels/x86_avx2_peak.cpp)
  set(avx512_sources runtime/kernels/x86_avx512.cpp runtime/kernels/x86_avx512_k.cpp runtime/kernels/x86_avx512_float.cpp runtime/kernels/x86_avx512_peak.cpp)
  set_source_files_properties(${avx2_sources} PROPERTIES COMPILE_OPTIONS "${avx2_flags}")
  set_source_files_properties(${avx512_sources} PROPERTIES COMPILE_OPTIONS "${avx512_flags}")
  set_source_files_properties(runtime/kernels/x86_avxvnni.cpp PROPERTIES COMPILE_OPTIONS "${avx2_flags};-mavxvnni")
  set_source_files_properties(runtime/kernels/x86_avx512vnni256.cpp PROPERTIES COMPILE_OPTIONS
    "${avx512_flags};-mprefer-vector-width=256")
  set(DUET_ISA_SOURCES ${avx2_sources} ${avx512_sources} runtime/kernels/x86_avxvnni.cpp
    runtime/kernels/x86_avx512vnni256.cpp)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(neon_dot_sources runtime/kernels/arm_neon.cpp runtime/kernels/arm_neon_k.cpp runtime/kernels/arm_neon_peak.cpp)
  set(DUET_ISA_SOURCES ${neon_dot_sources} runtime/kernels/arm_neon_float.cpp)
  set_source_files_properties(${neon_dot_sources} PROPERTIES COMPILE_OPTIONS "-march=armv8.2-a+dotprod;$<$<CONFIG:Debug>:-O2>")
  set_source_files_properties(runtime/kernels/arm_neon_float.cpp PROPERTIES COMPILE_OPTIONS "$<$<CONFIG:Debug>:-O2>")
endif()
