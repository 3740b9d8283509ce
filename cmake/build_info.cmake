# cmake -DSOURCE=dir -DOUTPUT=file -P cmake/build_info.cmake: writes cli/build_info.h's definition.
# Runs at each build; the file changes, and is compiled, only when its contents do.
cmake_minimum_required(VERSION 3.25)
execute_process(COMMAND git -C ${SOURCE} describe --always --abbrev=10 --exclude=* --dirty=+changes
  OUTPUT_VARIABLE commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  set(commit "unknown")
endif()
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT [[
#include "cli/build_info.h"
const char* duet::cli::build_commit() { return "@commit@"; }
]] @ONLY)
