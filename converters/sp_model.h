// A SentencePiece model file ("tokenizer.model"), as far as a GGUF vocabulary needs it.
//
// The file is a protobuf; it is read here with checked bounds rather than through the sentencepiece
// library, which hides user-defined pieces and the dummy-prefix switch and does not promise to
// survive hostile bytes. Checked against that library in tests/unit/hf_tokenizer_test.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace duet {

struct SpPiece {
  std::string text;
  float score = 0;
  // 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte: GGUF took the numbers over.
  int type = 1;
};

struct SpModel {
  std::vector<SpPiece> pieces;
  int model_type = 1;                                   // 1 unigram, 2 BPE, 3 word, 4 char
  int unk_id = 0, bos_id = 1, eos_id = 2, pad_id = -1;  // -1: none
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool has_normalization_rules = false;  // a compiled character map (NFKC and the like)
};

// Throws Error(format) "source: ... (byte N)".
SpModel parse_sp_model(std::span<const std::byte> bytes, const std::string& source);

}  // namespace duet
