# The GPU module: a shared library that the program loads at run time, so that neither needs a driver to start.
#   duet_cuda          libduet_cuda.so, with nvcc
#   duet_gpu_emulated  the same sources for the CPU (runtime/cuda/emulation.h): the device of tests, not installed
set(DUET_CUDA AUTO CACHE STRING "GPU module: AUTO (where nvcc is found), ON, OFF")
set_property(CACHE DUET_CUDA PROPERTY STRINGS AUTO ON OFF)
set(DUET_CUDA_ARCHITECTURES 75-virtual 80-real 86-real 89-real 90-real CACHE STRING "What the GPU module is compiled for")

set(cuda_kernels float_ops routing attention matmul_float matmul_block32 matmul_super matmul_codebook)
list(TRANSFORM cuda_kernels PREPEND runtime/cuda/)
list(TRANSFORM cuda_kernels APPEND .cu)

# Sources are read as C++ here, and as CUDA in the folder of the other module.
set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX)
add_library(duet_gpu_emulated MODULE ${cuda_kernels} runtime/cuda/device.cpp runtime/cuda/emulation.cpp runtime/cuda/runtime_api_emulated.cpp)
set_target_properties(duet_gpu_emulated PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
target_include_directories(duet_gpu_emulated PRIVATE ${PROJECT_SOURCE_DIR})
# Threads jump between stacks, which a fortified longjmp() refuses; device memory has no types; pragmas are nvcc's.
target_compile_options(duet_gpu_emulated PRIVATE -fno-strict-aliasing -Wno-unknown-pragmas -U_FORTIFY_SOURCE $<$<CONFIG:Debug>:-O1>)
target_link_libraries(duet_gpu_emulated PRIVATE duet_options)

set(DUET_WITH_CUDA OFF)
if(NOT DUET_CUDA STREQUAL "OFF")
  find_program(DUET_NVCC nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda/bin)
  if(CMAKE_CROSSCOMPILING OR DUET_SANITIZE OR DUET_FUZZ)
    message(STATUS "GPU module: not built here")
  elseif(DUET_NVCC)
    set(DUET_WITH_CUDA ON)
    add_subdirectory(runtime/cuda)
  elseif(NOT DUET_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "DUET_CUDA=${DUET_CUDA} needs nvcc, which is neither in PATH nor in /usr/local/cuda/bin: install the CUDA toolkit, or set DUET_NVCC")
  endif()
endif()
