# cmake -DBUILD=<build folder> -DGENERATOR=<CMake generator> -DMODEL=<gguf> -DDIR=<scratch> -P run.cmake: installs duet into DIR,
# builds the consumer against it and runs it.
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
message(STATUS "consumer said: ${out}")
