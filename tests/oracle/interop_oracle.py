#!/usr/bin/env python3
"""Files travel both ways between duet, llama.cpp (llama-cpp-python) and the gguf package.

1. Files written by `duet convert` (every recipe) and `duet make-synthetic` load in llama.cpp and
   give the perplexity that duet gives.
2. Files quantized by llama.cpp (types that duet does not write among them) give the same in duet.
3. The gguf package reads our files and decodes their blocks to the very bits that
   `duet quantize ... F32` does, also when the blocks are random bytes.

Needs numpy, gguf, llama_cpp. duet: DUET or build/release/duet. Prints PASS/FAIL lines; exit 1 on
failure, 77 when a package is missing.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build" / "release" / "duet"))
TEXT = ROOT / "tests" / "golden" / "data" / "sample.txt"
CONTEXT, CHUNKS = 512, 4
RECIPES = "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 Q3_K_L Q3_K_M Q3_K_S Q2_K".split()
# llama.cpp's file type numbers: what people have and duet does not write.
FOREIGN = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15,
           "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}
# Both sum in float32 in different orders; llama.cpp rounds activations to F16 or BF16 beside such
# weights; quantized products round them in both, which a small
# model shows in the fourth digit.
F32_TOLERANCE, HALF_TOLERANCE, QUANT_TOLERANCE = 1e-4, 1e-3, 5e-3

failures = 0


def report(ok, *what):
    global failures
    failures += not ok
    print("PASS" if ok else "FAIL", *what, flush=True)


def duet(*args):
    run = subprocess.run([DUET, *map(str, args)], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"duet {' '.join(map(str, args))}: exit {run.returncode}: {run.stderr.strip()}")
    return run.stdout


def duet_perplexity(model):
    out = duet("perplexity", model, "-f", TEXT, "--ctx", CONTEXT, "--chunks", CHUNKS, "--json")
    return json.loads(out)["perplexity"]


def llama_perplexity(model):
    """BOS, then the text's ids in chunks whose first id is BOS; the second half of each is scored."""
    import llama_cpp
    import numpy as np
    llm = llama_cpp.Llama(str(model), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, verbose=False,
                          type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    ids = llm.tokenize(TEXT.read_bytes(), add_bos=True, special=False)
    nll, n = 0.0, 0
    for c in range(CHUNKS):
        chunk = ids[c * CONTEXT:(c + 1) * CONTEXT]
        chunk[0] = llm.token_bos()
        llm.reset()
        llm.eval(chunk)
        x = np.asarray(llm.scores[:CONTEXT], dtype=np.float64)
        x -= x.max(axis=1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
        for i in range(CONTEXT // 2, CONTEXT - 1):
            nll -= x[i, chunk[i + 1]]
            n += 1
    llm.close()
    return float(np.exp(nll / n))


def compare(label, model, tolerance):
    try:
        ours, theirs = duet_perplexity(model), llama_perplexity(model)
    except (RuntimeError, ValueError) as e:
        return report(False, label, e)
    difference = abs(ours - theirs) / theirs
    report(difference <= tolerance, label, f"duet {ours:.4f} llama.cpp {theirs:.4f} ({100 * difference:.3f} %)")


def tolerance_of(recipe):
    return {"F32": F32_TOLERANCE, "F16": HALF_TOLERANCE, "BF16": HALF_TOLERANCE}.get(recipe, QUANT_TOLERANCE)


def our_files(tmp):
    for recipe in RECIPES:
        path = tmp / f"{recipe}.gguf"
        duet("convert", ROOT / "models" / "demo", "-q", recipe, "-o", path)
        compare(f"written here: {recipe}", path, tolerance_of(recipe))
    path = tmp / "synthetic.gguf"
    for kind in ("F32", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0"):
        duet("make-synthetic", "tiny", "--type", kind, "-o", path, "--force")
        compare(f"synthetic: {kind}", path, QUANT_TOLERANCE)


def foreign_files(tmp):
    import llama_cpp
    for name, file_type in FOREIGN.items():
        path = tmp / f"foreign-{name}.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = file_type
        params.nthread = 2
        rc = llama_cpp.llama_model_quantize(str(tmp / "F32.gguf").encode(), str(path).encode(), params)
        if rc != 0:
            report(False, f"quantized there: {name}", f"llama_model_quantize: {rc}")
            continue
        compare(f"quantized there: {name}", path, QUANT_TOLERANCE)


def same_bits(path, unpacked):
    """Every tensor of `path`, decoded by the gguf package, against `duet quantize path F32`."""
    import gguf
    import numpy as np
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    wrong = []
    for tensor in gguf.GGUFReader(unpacked).tensors:
        source = theirs[tensor.name]
        if source.tensor_type == gguf.GGMLQuantizationType.BF16:  # kept as bytes by the package
            values = (source.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            with np.errstate(all="ignore"):
                values = gguf.quants.dequantize(source.data, source.tensor_type)
        a = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
        b = np.ascontiguousarray(tensor.data, dtype=np.float32).reshape(-1).view(np.uint32)
        nan = np.isnan(a.view(np.float32)) & np.isnan(b.view(np.float32))
        if a.size != b.size or not np.all((a == b) | nan):
            wrong.append(tensor.name)
    return wrong


def block_decoding(tmp):
    for recipe in RECIPES[1:]:
        path, unpacked = tmp / f"{recipe}.gguf", tmp / "unpacked.gguf"
        duet("quantize", path, unpacked, "F32", "--force")
        wrong = same_bits(path, unpacked)
        report(not wrong, f"decoded alike by the gguf package: {recipe}", *wrong[:3])


def random_blocks(tmp):
    """The data of a file overwritten by random bytes: NaN, infinities and all."""
    import gguf
    import numpy as np
    path, unpacked = tmp / "random.gguf", tmp / "unpacked.gguf"
    for name in FOREIGN:
        shutil.copy(tmp / f"foreign-{name}.gguf", path)
        reader = gguf.GGUFReader(path, "r+")
        rng = np.random.default_rng(5)
        for tensor in reader.tensors:
            if "blk.0." in tensor.name and tensor.data.dtype == np.uint8:
                tensor.data[...] = rng.integers(0, 256, tensor.data.shape, dtype=np.uint8)
        reader.data.flush()
        del reader
        duet("quantize", path, unpacked, "F32", "--force")
        wrong = same_bits(path, unpacked)
        report(not wrong, f"random bytes decoded alike: {name}", *wrong[:3])


def main():
    try:
        import gguf  # noqa: F401
        import llama_cpp
        import numpy  # noqa: F401
    except ImportError as e:
        print(f"SKIP: {e}")
        return 77
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, None)
    with tempfile.TemporaryDirectory() as folder:
        tmp = pathlib.Path(folder)
        our_files(tmp)
        foreign_files(tmp)
        block_decoding(tmp)
        random_blocks(tmp)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
