# Cross build for 64-bit ARM Linux, run under qemu-user. scripts/install-deps --aarch64 gets the
# compiler, the emulator and the libraries (unpacked in DUET_SYSROOT).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

set(DUET_SYSROOT "${CMAKE_CURRENT_LIST_DIR}/../build/sysroot-aarch64" CACHE PATH "arm64 libraries")
cmake_path(ABSOLUTE_PATH DUET_SYSROOT NORMALIZE)
if(NOT EXISTS "${DUET_SYSROOT}/complete")
  message(FATAL_ERROR "no arm64 libraries in ${DUET_SYSROOT}; run scripts/install-deps --aarch64 (Debian)")
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES DUET_SYSROOT)

# Not CMAKE_SYSROOT: the C and C++ libraries are the cross compiler's own.
set(CMAKE_FIND_ROOT_PATH "${DUET_SYSROOT}")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
set(ENV{PKG_CONFIG_SYSROOT_DIR} "${DUET_SYSROOT}")
set(ENV{PKG_CONFIG_LIBDIR}
  "${DUET_SYSROOT}/usr/lib/aarch64-linux-gnu/pkgconfig:${DUET_SYSROOT}/usr/share/pkgconfig")

# Debian keeps headers that depend on the machine (openssl/opensslconf.h) here, where its own compilers look by themselves.
set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES "${DUET_SYSROOT}/usr/include/aarch64-linux-gnu")

# What libraries need in turn is found there when linking and, by a run path that counts for all of them, when running.
add_link_options(
  "-Wl,--disable-new-dtags,-rpath-link,${DUET_SYSROOT}/usr/lib/aarch64-linux-gnu:${DUET_SYSROOT}/lib/aarch64-linux-gnu")
set(CMAKE_BUILD_RPATH "${DUET_SYSROOT}/usr/lib/aarch64-linux-gnu;${DUET_SYSROOT}/lib/aarch64-linux-gnu")

find_program(DUET_QEMU NAMES qemu-aarch64 qemu-aarch64-static)
if(DUET_QEMU)
  # The loader and the C library of the cross compiler; the rest by the run path of the programs.
  set(CMAKE_CROSSCOMPILING_EMULATOR "${DUET_QEMU};-L;/usr/aarch64-linux-gnu")
endif()
