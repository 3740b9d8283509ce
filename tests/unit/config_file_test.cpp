// The configuration file's syntax. What flags make of it: tests/e2e/config_test.cpp.
#include <doctest/doctest.h>

#include "base/error.h"
#include "cli/config_file.h"
#include "tests/support/errors.h"

using namespace duet;
using cli::ConfigEntry;

namespace {

std::string shown(const std::string& text) {
  std::string out;
  for (const ConfigEntry& entry : cli::parse_config(text, "f")) {
    out += concat(entry.line, ":", entry.section, ".", entry.key, "=");
    for (const std::string& value : entry.values) out += "<" + value + ">";
    out += " ";
  }
  return out;
}

std::string error(const std::string& text) {
  try {
    return shown(text);
  } catch (const Error& e) {
    return e.what();
  }
}

}  // namespace

TEST_CASE("config file: sections, values, comments") {
  CHECK(shown("# nothing\n\nthreads = 8\n[serve] # here\n  port=9000 # there\r\napi-key = [\"a # b\", 'c\\d']\nno-api-key = true\nsystem = \"one\\n\\\"two\\\" \\\\\"\n") ==
        "3:.threads=<8> 5:serve.port=<9000> 6:serve.api-key=<a # b><c\\d> 7:serve.no-api-key=<true> 8:serve.system=<one\n\"two\" \\> ");
  CHECK(shown("") == "");
  CHECK(shown("a = []") == "1:.a= ");
  CHECK(shown("a = [1, 2,]") == "1:.a=<1><2> ");
  CHECK(shown("temp = -1.5e3") == "1:.temp=<-1.5e3> ");
}

TEST_CASE("config file: mistakes are named with their line") {
  CHECK(error("threads = 8\nkv-type = q8_0\n") == "f:2: q8_0 needs quotes: \"q8_0\"");
  CHECK(error("threads\n") == "f:1: a setting is written key = value");
  CHECK(error("\n\n= 5") == "f:3: a setting is written key = value");
  CHECK(error("a =") == "f:1: a value is missing after '='");
  CHECK(error("a = 5 6") == "f:1: nothing is expected at '6'");
  CHECK(error("a = \"x") == "f:1: a string does not end");
  CHECK(error("a = 'x") == "f:1: a string does not end");
  CHECK(error("a = \"\\x\"") == "f:1: \\x is not known in strings; '...' takes all characters as they are");
  CHECK(error("a = \"\\") == "f:1: \\  is not known in strings; '...' takes all characters as they are");
  CHECK(error("a = [1 2]") == "f:1: ',' or ']' is expected in the array");
  CHECK(error("a = [1, ") == "f:1: a value is missing after '='");
  CHECK(error("[serve") == "f:1: a section is written [command]");
  CHECK(error("[]") == "f:1: a section is written [command]");
  CHECK(error("a = 1\nb = 2\na = 3") == "f:3: a has been set in line 1 already");
}
