# cmake -DFILES=... -DOUTPUT=file -P cmake/embed_page.cmake: the files of the web page as the
# definition of page_files() (server/page.h). index.html is "/", the others are "/page/NAME".
cmake_minimum_required(VERSION 3.25)
set(entries "")
foreach(file IN LISTS FILES)
  get_filename_component(name "${file}" NAME)
  get_filename_component(extension "${file}" EXT)
  if(extension STREQUAL ".html")
    set(type "text/html; charset=utf-8")
  elseif(extension STREQUAL ".css")
    set(type "text/css; charset=utf-8")
  elseif(extension STREQUAL ".js")
    set(type "text/javascript; charset=utf-8")
  elseif(extension STREQUAL ".svg")
    set(type "image/svg+xml")
  else()
    message(FATAL_ERROR "${file}: no content type is known for ${extension}")
  endif()
  set(path "/page/${name}")
  if(name STREQUAL "index.html")
    set(path "/")
  endif()
  file(READ "${file}" text)
  file(SHA256 "${file}" hash)
  string(SUBSTRING "${hash}" 0 16 hash)
  string(APPEND entries "    {\"${path}\", \"${type}\", \"\\\"${hash}\\\"\", R\"duet-page(${text})duet-page\"},\n")
endforeach()
file(WRITE "${OUTPUT}" "// Made by cmake/embed_page.cmake.
#include \"server/page.h\"

namespace duet::server {

std::span<const PageFile> page_files() {
  static constexpr PageFile kFiles[] = {
${entries}  };
  return kFiles;
}

}  // namespace duet::server
")
