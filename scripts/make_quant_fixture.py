#!/usr/bin/env python3
"""Makes tests/unit/data/quant_blocks.{bin,json}: random bytes as blocks of every format, and the
float32 values that ggml decodes from them.

  make_quant_fixture.py      (LLAMA_CPP_LIB_PATH = folder of libggml-base.so; needs numpy)

In each format the first scales are set to infinity, NaN, a subnormal, minus zero and the largest
half; everything else is random. A NaN's payload has no meaning.
"""
import ctypes
import json
import os
import pathlib
import sys

import numpy as np

DATA = pathlib.Path(__file__).resolve().parents[1] / "tests/unit/data"
SEED, BLOCKS = 20251122, 8
# name: ggml type, elements and bytes per block, offsets of half-precision fields
FORMATS = {
    "F32": (0, 1, 4, []), "F16": (1, 1, 2, [0]), "BF16": (30, 1, 2, []),
    "Q4_0": (2, 32, 18, [0]), "Q4_1": (3, 32, 20, [0, 2]), "Q5_0": (6, 32, 22, [0]),
    "Q5_1": (7, 32, 24, [0, 2]), "Q8_0": (8, 32, 34, [0]), "Q2_K": (10, 256, 84, [80, 82]),
    "Q3_K": (11, 256, 110, [108]), "Q4_K": (12, 256, 144, [0, 2]), "Q5_K": (13, 256, 176, [0, 2]),
    "Q6_K": (14, 256, 210, [208]), "IQ4_NL": (20, 32, 18, [0]), "IQ4_XS": (23, 256, 136, [0]),
    "IQ1_S": (19, 256, 50, [0]), "IQ1_M": (29, 256, 56, []), "IQ2_XXS": (16, 256, 66, [0]), "IQ2_XS": (17, 256, 74, [0]),
    "IQ2_S": (22, 256, 82, [0]), "IQ3_XXS": (18, 256, 98, [0]), "IQ3_S": (21, 256, 110, [0]),
    "TQ1_0": (34, 256, 54, [52]), "TQ2_0": (35, 256, 66, [64]),
}
SPECIAL = [0x7C00, 0x7E01, 0x0003, 0x8000, 0x7BFF]
FLOAT_DECODERS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


def decode(ggml, name, raw, n):
    if name == "F32":
        return raw.view(np.float32).copy()
    function = getattr(ggml, FLOAT_DECODERS.get(name, "dequantize_row_" + name.lower().replace("_k", "_K")))
    values = np.empty(n, np.float32)
    function(raw.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(n))
    return values


def main():
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if not folder:
        sys.exit("set LLAMA_CPP_LIB_PATH to the folder of libggml-base.so")
    ggml = ctypes.CDLL(str(pathlib.Path(folder) / "libggml-base.so"))
    ggml.ggml_init.restype = ctypes.c_void_p
    ggml.ggml_version.restype = ctypes.c_char_p
    rng = np.random.default_rng(SEED)
    out, index = bytearray(), []
    for name, (dtype, elems, n_bytes, halves) in FORMATS.items():
        blocks = BLOCKS if elems > 1 else 256
        raw = rng.integers(0, 256, (blocks, n_bytes), dtype=np.uint8)
        for i, bits in enumerate(SPECIAL):
            for offset in halves:
                raw[i, offset:offset + 2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
        raw = raw.reshape(-1)
        values = decode(ggml, name, raw, blocks * elems)
        index.append({"name": name, "dtype": dtype, "n": blocks * elems, "at": len(out),
                      "bytes": raw.size, "values_at": len(out) + raw.size})
        out += raw.tobytes() + values.tobytes()
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / "quant_blocks.bin").write_bytes(out)
    provenance = {"made_by": "scripts/make_quant_fixture.py", "seed": SEED,
                  "reference": f"ggml {ggml.ggml_version().decode()}, the decoders of libggml-base",
                  "formats": index}
    (DATA / "quant_blocks.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"{len(out)} bytes, {len(index)} formats")


if __name__ == "__main__":
    main()
