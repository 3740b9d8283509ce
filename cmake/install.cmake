# Install: the duet binary with manual pages and completions, an example of a systemd unit, the libraries, the headers of the public interface (runtime/engine.h,
# converters/*.h and what they include) and a CMake package "duet" (find_package(duet)).
include(CMakePackageConfigHelpers)
install(TARGETS duet RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
if(NOT CMAKE_CROSSCOMPILING)  # made by the program itself
  set(shell_dir ${PROJECT_BINARY_DIR}/shell)
  install(CODE "execute_process(COMMAND \"${CMAKE_COMMAND}\" \"-DDUET=$<TARGET_FILE:duet>\" \"-DOUTPUT=${shell_dir}\"
    -P \"${PROJECT_SOURCE_DIR}/cmake/make_shell_files.cmake\" COMMAND_ERROR_IS_FATAL ANY)")
  install(DIRECTORY ${shell_dir}/man1 DESTINATION ${CMAKE_INSTALL_MANDIR})
  install(FILES ${shell_dir}/duet.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME duet)
  install(FILES ${shell_dir}/_duet DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/site-functions)
  install(FILES ${shell_dir}/duet.fish DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
endif()
install(FILES packaging/duet.service DESTINATION ${CMAKE_INSTALL_DATADIR}/duet)
install(TARGETS duet_base duet_quant duet_formats duet_converters duet_kernels duet_runtime
  EXPORT duetTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
foreach(header base/block_reader.h base/error.h base/file_descriptor.h base/resumable_file.h base/sha256.h base/bytes.h base/json.h base/mapped_file.h base/topology.h quant/format.h formats/tensor.h formats/gguf.h
        formats/lora.h formats/schema.h base/json_fwd.h runtime/engine.h runtime/observer.h runtime/tokenizer.h runtime/vocabulary.h runtime/chat_template.h
        runtime/sampler.h runtime/memory_plan.h base/host.h converters/convert.h)
  get_filename_component(dir ${header} DIRECTORY)
  install(FILES ${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/duet/${dir})
endforeach()
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/duet)
install(EXPORT duetTargets NAMESPACE duet:: DESTINATION ${package_dir})
configure_package_config_file(cmake/Config.cmake.in ${PROJECT_BINARY_DIR}/duetConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/duetConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/duetConfig.cmake ${PROJECT_BINARY_DIR}/duetConfigVersion.cmake
  cmake/FindOneDNN.cmake DESTINATION ${package_dir})
