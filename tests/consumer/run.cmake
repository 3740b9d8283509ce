# cmake -DBUILD=<build folder> -DGENERATOR=<CMake generator> -DMODEL=<gguf> -DDIR=<scratch> -P run.cmake: installs duet into DIR, with manual
# pages and completions, builds the consumer against it and runs it.
foreach(step
    "install|${CMAKE_COMMAND} --install ${BUILD} --prefix ${DIR}/prefix"
    "configure|${CMAKE_COMMAND} -G \"${GENERATOR}\" -S ${CMAKE_CURRENT_LIST_DIR} -B ${DIR}/build -DCMAKE_PREFIX_PATH=${DIR}/prefix -DCMAKE_BUILD_TYPE=Release"
    "build|${CMAKE_COMMAND} --build ${DIR}/build"
    "run|${DIR}/build/consumer ${MODEL} kernel")
  string(REPLACE "|" ";" parts "${step}")
  list(GET parts 0 name)
  list(GET parts 1 command)
  separate_arguments(command UNIX_COMMAND "${command}")
  execute_process(COMMAND ${command} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${name} failed (${code}):\n${out}\n${err}")
  endif()
endforeach()
foreach(file share/man/man1/duet.1 share/man/man1/duet-serve.1 share/bash-completion/completions/duet share/zsh/site-functions/_duet
    share/fish/vendor_completions.d/duet.fish share/duet/duet.service)
  if(NOT EXISTS "${DIR}/prefix/${file}")
    message(FATAL_ERROR "${file} has not been installed")
  endif()
endforeach()
message(STATUS "consumer said: ${out}")
