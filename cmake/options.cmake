# Compile options of duet's own targets (never of its dependencies), collected in duet_options.
option(DUET_WERROR "Treat warnings as errors" OFF)
option(DUET_FUZZ "Build libFuzzer targets (clang only)" OFF)
set(DUET_SANITIZE "" CACHE STRING "Sanitizers, comma separated (address,undefined)")

add_library(duet_options INTERFACE)
target_compile_features(duet_options INTERFACE cxx_std_20)
target_compile_options(duet_options INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor -Wundef
  # One rounding per operation in all code that does not ask for fused arithmetic by name: the
  # scalar kernels are the specification, and results must not depend on a compiler's choice.
  -ffp-contract=off
  # g++ 12 sees overlaps that are not there in "text" + std::string (GCC bug 105651).
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict>
  $<$<BOOL:${DUET_WERROR}>:-Werror>)
if(DUET_SANITIZE)
  target_compile_options(duet_options INTERFACE
    -fsanitize=${DUET_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(duet_options INTERFACE -fsanitize=${DUET_SANITIZE})
  target_compile_definitions(duet_options INTERFACE _GLIBCXX_ASSERTIONS)
endif()
if(DUET_FUZZ)
  target_compile_options(duet_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

# duet_library(name dir [sources...]): the library target of one folder.
function(duet_library name)
  add_library(${name} STATIC ${ARGN})
  add_library(duet::${name} ALIAS ${name})
  string(REPLACE "duet_" "" short ${name})
  set_target_properties(${name} PROPERTIES EXPORT_NAME ${short} POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${name} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<INSTALL_INTERFACE:include/duet>)
  target_compile_features(${name} PUBLIC cxx_std_20)
  target_link_libraries(${name} PRIVATE $<BUILD_INTERFACE:duet_options>)
endfunction()
