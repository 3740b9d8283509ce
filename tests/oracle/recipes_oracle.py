#!/usr/bin/env python3
"""Compares the tensor types of every recipe with llama.cpp's quantizer.

Makes GGUF files that are all header (sparse files: the tensor data are holes) for full-size and odd
shapes, lets `llama-quantize --dry-run` and `duet quantize --dry-run` choose types, and compares
tensor by tensor, with and without an importance matrix. With --write FILE it also writes llama.cpp's choices
as the table that tests/unit/recipe_test.cpp reads.

Needs llama-quantize: in the folder LLAMA_BIN or in PATH. duet: DUET or build/release/duet.
"""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DUET = os.environ.get("DUET", os.path.join(ROOT, "build", "release", "duet"))
RECIPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0",
           "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS"]
KEYS = ["n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab", "n_expert", "tied"]
MODELS = {  # KEYS in order
    "demo": [6, 256, 512, 8, 2, 32, 4096, 8, 0],
    "mixtral-8x7b": [32, 4096, 14336, 32, 8, 128, 32000, 8, 0],
    "mixtral-8x22b": [56, 6144, 16384, 48, 8, 128, 32768, 8, 0],
    "mistral-7b": [32, 4096, 14336, 32, 8, 128, 32000, 0, 0],
    "llama-2-13b": [40, 5120, 13824, 40, 40, 128, 32000, 0, 0],
    "llama-2-70b": [80, 8192, 28672, 64, 8, 128, 32000, 0, 0],
    "llama-3.2-1b": [16, 2048, 8192, 32, 8, 64, 128256, 0, 1],
    "four-experts": [24, 2048, 5632, 16, 4, 128, 32000, 4, 0],
    "smollm-135m": [30, 576, 1536, 9, 3, 64, 49152, 0, 1],
    "rows-of-576-8-experts": [17, 576, 1440, 9, 3, 64, 32000, 8, 0],
    "rows-of-100": [5, 100, 300, 5, 5, 20, 1000, 0, 0],
    "rows-of-100-tied": [5, 100, 288, 5, 5, 20, 1000, 8, 1],
}


def model_of(name):
    return dict(zip(KEYS, MODELS[name]))


def tensors_of(m):
    """(name, ne innermost first)"""
    e, f, q, kv = m["n_embd"], m["n_ff"], m["n_head"] * m["head_dim"], m["n_head_kv"] * m["head_dim"]
    out = [("token_embd", [e, m["n_vocab"]]), ("output_norm", [e])]
    if not m["tied"]:
        out.append(("output", [e, m["n_vocab"]]))
    for i in range(m["n_layer"]):
        layer = [("attn_norm", [e]), ("attn_q", [e, q]), ("attn_k", [e, kv]), ("attn_v", [e, kv]),
                 ("attn_output", [q, e]), ("ffn_norm", [e])]
        if m["n_expert"]:
            x = m["n_expert"]
            layer += [("ffn_gate_inp", [e, x]), ("ffn_gate_exps", [e, f, x]), ("ffn_up_exps", [e, f, x]),
                      ("ffn_down_exps", [f, e, x])]
        else:
            layer += [("ffn_gate", [e, f]), ("ffn_up", [e, f]), ("ffn_down", [f, e])]
        out += [(f"blk.{i}.{n}", ne) for n, ne in layer]
    return [(n + ".weight", ne) for n, ne in out]


def string(s):
    b = s.encode()
    return struct.pack("<Q", len(b)) + b


def write_sparse_gguf(path, m):
    kv = [("general.architecture", 8, "llama"), ("llama.block_count", 4, m["n_layer"]),
          ("llama.context_length", 4, 2048), ("llama.embedding_length", 4, m["n_embd"]),
          ("llama.feed_forward_length", 4, m["n_ff"]), ("llama.attention.head_count", 4, m["n_head"]),
          ("llama.attention.head_count_kv", 4, m["n_head_kv"]), ("llama.vocab_size", 4, m["n_vocab"]),
          ("llama.attention.key_length", 4, m["head_dim"]), ("llama.attention.value_length", 4, m["head_dim"]),
          ("llama.rope.dimension_count", 4, m["head_dim"]), ("llama.rope.freq_base", 6, 1e6),
          ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5)]
    if m["n_expert"]:
        kv += [("llama.expert_count", 4, m["n_expert"]), ("llama.expert_used_count", 4, 2)]
    tensors = tensors_of(m)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(kv))
    for key, kind, value in kv:
        head += string(key) + struct.pack("<I", kind)
        head += string(value) if kind == 8 else struct.pack("<I" if kind == 4 else "<f", value)
    offset = 0
    for name, ne in tensors:
        head += string(name) + struct.pack("<I", len(ne)) + struct.pack(f"<{len(ne)}Q", *ne)
        head += struct.pack("<IQ", 0, offset)  # F32
        n = 4
        for d in ne:
            n *= d
        offset += (n + 31) // 32 * 32
    head += b"\0" * (-len(head) % 32)
    with open(path, "wb") as f:
        f.write(head)
        f.truncate(len(head) + offset)


def write_imatrix(path, m):
    """The legacy form, with data for one tensor: types depend on there being a matrix alone."""
    name, n = (b"blk.0.ffn_down_exps.weight", m["n_expert"] * m["n_ff"]) if m["n_expert"] else (b"blk.0.ffn_down.weight", m["n_ff"])
    with open(path, "wb") as f:
        f.write(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, n) + struct.pack("<f", 1) * n)


def llama_types(binary, path, recipe, imatrix):
    run = subprocess.run([binary, "--dry-run"] + (["--imatrix", imatrix] if imatrix else []) + [path, recipe], capture_output=True, text=True)
    types = {}
    pattern = r"^\[ *\d+/ *\d+\] (\S+) +- \[.*type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
    for line in (run.stdout + run.stderr).splitlines():
        found = re.search(pattern, line)
        if found:
            types[found[1]] = (found[3] or found[2]).upper()
    return types


def duet_types(path, recipe, imatrix):
    run = subprocess.run([DUET, "quantize", path, os.devnull, recipe, "--dry-run", "--json"] + (["--imatrix", imatrix] if imatrix else []),
                         capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"FAIL duet quantize --dry-run: {run.stderr.strip()}")
    return {t["name"]: t["type"] for t in json.loads(run.stdout)["tensors"]}


def run_lengths(types):
    """{kind: "Q6_K*2 Q4_K*6 ..."} over the layers in order; norms left out."""
    per_kind = {}
    for name, kind in types.items():
        if "_norm." in name:
            continue
        found = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
        key, layer = (found[2], int(found[1])) if found else (name.removesuffix(".weight"), 0)
        per_kind.setdefault(key, {})[layer] = kind
    out = {}
    for key in sorted(per_kind):
        runs = []
        for layer in sorted(per_kind[key]):
            kind = per_kind[key][layer]
            if runs and runs[-1][0] == kind:
                runs[-1][1] += 1
            else:
                runs.append([kind, 1])
        out[key] = " ".join(f"{k}*{n}" for k, n in runs)
    return out


def version_of(binary):
    run = subprocess.run([binary, "--dry-run", os.devnull, "Q8_0"], capture_output=True, text=True)
    found = re.search(r"commit (\w+)", run.stdout + run.stderr)
    return found[1] if found else "unknown"


def main():
    binary = shutil.which("llama-quantize", path=os.environ.get("LLAMA_BIN")) or shutil.which("llama-quantize")
    if not binary:
        print("SKIP: llama-quantize not found (set LLAMA_BIN to its folder)")
        return 77
    table = {"source": f"llama-quantize --dry-run of llama.cpp {version_of(binary)}", "keys": KEYS, "models": {}}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path, matrix = os.path.join(folder, "model.gguf"), os.path.join(folder, "matrix.dat")
            write_sparse_gguf(path, model_of(name))
            write_imatrix(matrix, model_of(name))
            entry = {"shape": MODELS[name], "types": {}, "imatrix": {}}  # the latter: where types differ
            for recipe in RECIPES:
                for imatrix in None, matrix:
                    theirs, ours = llama_types(binary, path, recipe, imatrix), duet_types(path, recipe, imatrix)
                    wrong = [f"{t}: {ours.get(t)}, llama.cpp {theirs.get(t)}" for t in sorted(theirs.keys() | ours.keys())
                             if ours.get(t) != theirs.get(t)]
                    failed |= bool(wrong) or not theirs
                    print("FAIL" if wrong or not theirs else "PASS", name, recipe, "with imatrix" if imatrix else "", f"{len(theirs)} tensors", *wrong[:3])
                    types = run_lengths(theirs)
                    if imatrix is None:
                        entry["types"][recipe] = types
                    elif types != entry["types"][recipe]:
                        entry["imatrix"][recipe] = types
            table["models"][name] = entry
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        text = json.dumps(table, separators=(",", ":"))  # one line per model and recipe
        with open(sys.argv[2], "w") as f:
            f.write(re.sub(r'("\w+":\{"attn_k|"[\w.-]+":\{"shape)', r"\n\1", text) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
