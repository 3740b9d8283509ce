#!/usr/bin/env python3
"""Block decoding against the gguf package and, if there, ggml itself: bit for bit, random bytes.

Writes a small GGUF whose matrices are random bytes, one format each, lets `duet quantize ... F32`
decode it, and compares every value. NaN payloads have no meaning; all else must agree.

  quant_oracle.py [--seed N] [--rounds N]

Environment: DUET = the duet binary; LLAMA_CPP_LIB_PATH = folder of libggml-base.so (optional).
Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import ctypes
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0".split()
WIDTH, LAYERS = 256, 4  # every matrix is [WIDTH, WIDTH]; 2 + 7 * LAYERS of them, one for each format
MATRICES = ["token_embd", "output"] + [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in
                                       "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()]


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


try:
    import gguf
    import numpy as np
except ImportError as error:
    skip(f"{error}: pip install gguf numpy")


def write_model(path, rng):
    """Returns {tensor name: (type name, raw bytes)}."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(8)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 8)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(WIDTH)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [b"t%d" % i for i in range(WIDTH - 3)])
    writer.add_token_scores([float(-i) for i in range(WIDTH)])
    writer.add_token_types([2, 3, 3] + [1] * (WIDTH - 3))
    matrices = {}
    for i, name in enumerate(MATRICES):
        kind = gguf.GGMLQuantizationType[TYPES[i % len(TYPES)]]
        elems, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (WIDTH, WIDTH // elems * n_bytes), dtype=np.uint8)
        writer.add_tensor(name + ".weight", raw, raw_dtype=kind)
        matrices[name + ".weight"] = (kind.name, raw)
    norms = ["output_norm"] + [f"blk.{layer}.{name}_norm" for layer in range(LAYERS) for name in ("attn", "ffn")]
    for name in norms:
        writer.add_tensor(name + ".weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def by_gguf_package(kind, raw):
    if kind == "F32":
        return raw.reshape(-1).view(np.float32)
    if kind == "F16":
        return raw.reshape(-1).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(-1)


def by_ggml(ggml, kind, raw):
    if kind == "F32":
        return raw.reshape(-1).view(np.float32)
    names = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    decode = getattr(ggml, names.get(kind, "dequantize_row_" + kind.lower().replace("_k", "_K")))
    out = np.empty(WIDTH * WIDTH, np.float32)
    raw = np.ascontiguousarray(raw)
    decode(raw.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    return out


def load_ggml():
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if not folder:
        return None
    ggml = ctypes.CDLL(str(pathlib.Path(folder) / "libggml-base.so"))
    ggml.ggml_init.restype = ctypes.c_void_p
    return ggml


def differing(a, b):
    both_nan = np.isnan(a) & np.isnan(b)
    return int(((a.view(np.uint32) != b.view(np.uint32)) & ~both_nan).sum())


def compare(duet, ggml, rng, folder):
    """One round; returns the number of comparisons that failed."""
    source, decoded = folder / "in.gguf", folder / "out.gguf"
    matrices = write_model(source, rng)
    done = subprocess.run([duet, "quantize", source, decoded, "F32", "--force"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"FAIL: duet quantize: exit {done.returncode}: {done.stderr.strip()}")
    ours = {t.name: np.array(t.data).reshape(-1) for t in gguf.GGUFReader(decoded).tensors}
    references = {"gguf": by_gguf_package}
    if ggml is not None:
        references["ggml"] = lambda kind, raw: by_ggml(ggml, kind, raw)
    failures = 0
    for name, (kind, raw) in matrices.items():
        for reference, decode in references.items():
            bad = differing(ours[name], np.ascontiguousarray(decode(kind, raw), np.float32))
            failures += bad != 0
            print(f"{'PASS' if bad == 0 else 'FAIL'}: {kind} against {reference}: {bad} of {ours[name].size} values differ")
    return failures


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    duet = pathlib.Path(os.environ.get("DUET", ROOT / "build/release/duet"))
    if not duet.exists():
        skip(f"{duet} not found (set DUET)")
    ggml = load_ggml()
    if ggml is None:
        print("note: LLAMA_CPP_LIB_PATH is not set, comparing with the gguf package only")
    failures = 0
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            failures += compare(duet, ggml, np.random.default_rng(args.seed + i), pathlib.Path(name))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
