# Instruction-set flags are per file, chosen at run time (runtime/kernels/dispatch.cpp): the build
# as a whole stays at the architecture's baseline. One line per ISA file.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(DUET_ISA_SOURCES runtime/kernels/x86_avx2.cpp runtime/kernels/x86_avx512.cpp)
  set_source_files_properties(runtime/kernels/x86_avx2.cpp PROPERTIES
    COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(runtime/kernels/x86_avx512.cpp PROPERTIES
    COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
  set(DUET_ISA_DEFINITIONS DUET_HAVE_X86)
endif()
