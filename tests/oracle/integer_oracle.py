#!/usr/bin/env python3
"""What 8-bit activations cost: the integer path of a quantized file against the float path of the
same weights, in duet and in llama.cpp.

For each recipe one file is made from the demo model, and a second one with exactly its weights as
F32. Each program scores the first against the second on the same text (windows of 512, the second
half of each); a row shows both mean KLDs. Passes when ours is at most 1.05 times the other's. (duet's
prefill and decode give the same bits, tests/unit; so one figure stands for both.)

  integer_oracle.py --text FILE [--text FILE ...] [--recipes Q4_K_M,...] [--chunks 40] [--isa NAME]

Environment: DUET = the duet binary; LLAMA_BIN = folder of llama-quantize and llama-perplexity.
Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = "Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_XS Q3_K_M Q2_K".split()
WINDOW = 512


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"FAIL: {' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def log_softmax(path):
    x = np.load(path)[WINDOW // 2:].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def duet_kld(duet, quantized, floats, windows, isa, tmp):
    rows = []
    for ids in windows:
        listed = ",".join(map(str, ids))
        for model, out in ((quantized, "q.npy"), (floats, "p.npy")):
            extra = ["--isa", isa] if isa else []
            run(duet, "logits", model, "--ids", listed, "-o", tmp / out, "--kv-type", "f32", *extra)
        p, q = log_softmax(tmp / "p.npy"), log_softmax(tmp / "q.npy")
        rows.append((np.exp(p) * (p - q)).sum(axis=1))
    rows = np.concatenate(rows)
    return rows.mean(), rows.std() / len(rows) ** 0.5


def llama_kld(llama, quantized, floats, text, chunks, tmp):
    score = [llama / "llama-perplexity", "-f", text, "-c", WINDOW, "--chunks", chunks, "-t", 2, "--kl-divergence-base", tmp / "base.kld"]
    run(*score, "-m", floats)
    for _ in range(5):  # the program's logger sometimes loses its last lines at exit
        found = re.search(r"Mean\s+KLD\s*:\s*([-\d.]+)\s*±\s*([-\d.]+)", run(*score, "-m", quantized, "--kl-divergence"))
        if found:
            return float(found.group(1)), float(found.group(2))
    sys.exit("FAIL: no KLD in the output of llama-perplexity")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--isa", default="")
    args = parser.parse_args()
    duet = pathlib.Path(os.environ.get("DUET", ROOT / "build/release/duet"))
    llama = pathlib.Path(os.environ.get("LLAMA_BIN", "."))
    if not (llama / "llama-quantize").exists():
        skip("llama-quantize not found (set LLAMA_BIN)")
    if not args.text:
        skip("needs --text FILE")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        tmp = pathlib.Path(name)
        text, f32 = tmp / "text.txt", tmp / "f32.gguf"
        text.write_bytes(b"\n".join(pathlib.Path(t).read_bytes() for t in args.text))
        run(duet, "convert", ROOT / "models/demo", "-q", "F32", "-o", f32)
        ids = [int(i) for i in re.findall(r"\d+", run(duet, "tokenize", f32, "--file", text, "--json"))]
        n = WINDOW - 1
        windows = [[1] + ids[i * n:(i + 1) * n] for i in range(args.chunks)]
        print("| recipe | mean KLD duet | mean KLD llama.cpp | ratio |\n|---|---|---|---|")
        for recipe in args.recipes.split(","):
            quantized, floats = tmp / "q.gguf", tmp / "floats.gguf"
            run(llama / "llama-quantize", f32, quantized, recipe, 2)
            run(duet, "quantize", quantized, floats, "F32", "--force")
            ours = duet_kld(duet, quantized, floats, windows, args.isa, tmp)
            theirs = llama_kld(llama, quantized, floats, text, args.chunks, tmp)
            ratio = ours[0] / theirs[0]
            print(f"| {recipe} | {ours[0]:.6f} ± {ours[1]:.6f} | {theirs[0]:.6f} ± {theirs[1]:.6f} | {ratio:.3f} |", flush=True)
            failed |= ratio > 1.05
    print("FAIL" if failed else "PASS")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        import numpy as np
    except ImportError:
        skip("numpy is missing")
    main()
