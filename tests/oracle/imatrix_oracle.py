#!/usr/bin/env python3
"""`duet imatrix` against llama-imatrix on the same F32 model and text, and each other's files in use.

Every entry: sums of squares within 0.1 % of the largest of its matrix's columns (both add floats, in
another order), the same rows for every expert but for a few tokens whose two best experts are almost
equal. Then llama-quantize reads our file, duet quantize reads theirs (GGUF and the legacy form), and the
two GGUF forms give files of equal bytes up to those differences.

  imatrix_oracle.py --text FILE [--chunks N]

Environment: DUET = the duet binary; LLAMA_BIN = folder of llama-imatrix and llama-quantize.
Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


try:
    import gguf
    import numpy as np
except ImportError as error:
    skip(f"{error}: pip install gguf numpy")


def run(*cmd):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"FAIL: {' '.join(map(str, cmd))}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def tool(name):
    found = shutil.which(name, path=os.environ.get("LLAMA_BIN", os.environ["PATH"]))
    return found or skip(f"{name} not found (LLAMA_BIN)")


failures = 0


def check(what, good, figure=""):
    global failures
    failures += not good
    print(f"{'PASS' if good else 'FAIL'}: {what} {figure}")


def entries(path):
    tensors = {t.name: np.array(t.data, np.float32) for t in gguf.GGUFReader(path).tensors}
    return {n[:-len(".in_sum2")]: (v, tensors[n.replace(".in_sum2", ".counts")].reshape(-1)) for n, v in tensors.items() if n.endswith(".in_sum2")}


def compare(ours, theirs):
    check("the same tensors", ours.keys() == theirs.keys(), f"{len(ours)}; differing: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    worst, moved = 0.0, 0
    for name in ours.keys() & theirs.keys():
        (a, n_a), (b, n_b) = ours[name], theirs[name]
        if n_a.shape != n_b.shape or a.size != b.size:
            check(f"shape of {name}", False, f"{a.shape} {b.shape}")
            continue
        moved = max(moved, int(np.abs(n_a - n_b).max()))
        a, b = a.reshape(len(n_a), -1), b.reshape(len(n_a), -1)
        means_a, means_b = a / np.maximum(n_a, 1)[:, None], b / np.maximum(n_b, 1)[:, None]
        worst = max(worst, float((np.abs(means_a - means_b).max(1) / means_b.max(1).clip(1e-30)).max()))
    check("rows of every expert agree but for a few", moved <= 3, f"(largest difference {moved} rows)")
    check("mean squares agree", worst < (1e-3 if moved == 0 else 2e-2), f"(largest difference {worst:.2e} of a matrix's largest)")


def values(path, name):
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return np.array(tensor.data).reshape(-1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--chunks", type=int, default=20)
    args = parser.parse_args()
    duet = os.environ.get("DUET", str(ROOT / "build/release/duet"))
    llama_imatrix, llama_quantize = tool("llama-imatrix"), tool("llama-quantize")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = folder / "f32.gguf"
        run(duet, "convert", ROOT / "models/demo", "-q", "F32", "-o", model)
        run(duet, "imatrix", model, "-f", args.text, "--chunks", args.chunks, "-o", folder / "ours.gguf")
        run(llama_imatrix, "-m", model, "-f", args.text, "--chunks", args.chunks, "-c", 512, "-o", folder / "theirs.gguf")
        run(llama_imatrix, "-m", model, "-f", args.text, "--chunks", args.chunks, "-c", 512, "--output-format", "dat", "-o", folder / "theirs.dat")
        compare(entries(folder / "ours.gguf"), entries(folder / "theirs.gguf"))
        for form in ("ours.gguf", "theirs.gguf", "theirs.dat"):
            run(duet, "quantize", model, folder / f"{form}.q4", "Q4_K_M", "--imatrix", folder / form)
        name = "blk.1.ffn_gate_exps.weight"
        a, b, c = (values(folder / f"{form}.q4", name) for form in ("ours.gguf", "theirs.gguf", "theirs.dat"))
        check("our file and theirs quantize alike", (a != b).mean() < 0.02, f"({100 * (a != b).mean():.3f} % of bytes differ)")
        check("their two forms quantize alike", (b != c).mean() < 0.02, f"({100 * (b != c).mean():.3f} % of bytes differ)")
        said = run(llama_quantize, "--imatrix", folder / "ours.gguf", model, folder / "llama.q4", "Q4_K_M")
        check("llama-quantize takes ours", "imatrix" in said and (folder / "llama.q4").stat().st_size > 0)
        plain = folder / "plain.q4"
        run(llama_quantize, model, plain, "Q4_K_M")
        check("and uses it", (values(folder / "llama.q4", name) != values(plain, name)).mean() > 0.01)
    sys.exit(1 if failures else 0)


main()
