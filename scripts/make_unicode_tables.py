#!/usr/bin/env python3
"""Writes runtime/unicode_tables.cpp: character classes by code point.

Uses the package unicodedata2 when it is installed (its version chooses the Unicode version),
otherwise Python's own unicodedata. Run from the top folder: scripts/make_unicode_tables.py
"""
import pathlib

try:
    import unicodedata2 as ucd
except ImportError:
    import unicodedata as ucd

# Values of enum CharClass in runtime/unicode.h.
CLASSES = {"Lu": 1, "Lt": 1, "Ll": 2, "Lm": 3, "Lo": 3, "M": 4, "N": 5, "P": 6, "S": 7}
SPACE = 8
# The White_Space property, which unicodedata does not offer.
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
               0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def char_class(cp):
    if cp in WHITE_SPACE:
        return SPACE
    category = ucd.category(chr(cp))
    return CLASSES.get(category, CLASSES.get(category[0], 0))


def ranges():
    previous = None
    for cp in range(0x110000):
        current = char_class(cp)
        if current != previous:
            yield cp, current
        previous = current


def main():
    entries = [f"0x{cp << 4 | value:x}" for cp, value in ranges()]
    lines, line = [], "   "
    for entry in entries:
        if len(line) + len(entry) + 2 > 100:
            lines.append(line)
            line = "   "
        line += f" {entry},"
    lines.append(line)
    target = pathlib.Path(__file__).resolve().parent.parent / "runtime" / "unicode_tables.cpp"
    target.write_text(
        f"// Unicode {ucd.unidata_version}. Made by scripts/make_unicode_tables.py: do not edit.\n"
        '#include "runtime/unicode.h"\n\nnamespace duet {\nnamespace {\n\n'
        "// First code point of a range << 4 | its CharClass, ascending.\n"
        "constexpr uint32_t kRanges[] = {\n" + "\n".join(lines) +
        "\n};\n\n}  // namespace\n\n"
        "std::span<const uint32_t> char_ranges() { return kRanges; }\n\n}  // namespace duet\n")
    print(f"{target}: {len(entries)} ranges, Unicode {ucd.unidata_version}")


main()
