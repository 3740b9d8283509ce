#!/usr/bin/env python3
"""Every quantized recipe of the demo model, ours against llama.cpp's own (no imatrix).

For each recipe: `duet convert` and `llama-quantize` start from the same F32 weights; both files are
scored by the same program (llama-perplexity --kl-divergence) on the same text against F32. Passes
when the tensor types agree and our mean KLD is not above the other's plus one standard error.
With --duet both files are scored by duet too (all positions of the first chunks of 512).

  quality_oracle.py --text FILE [--text FILE ...] [--recipes Q4_K_M,...] [--duet]

Environment: DUET = the duet binary; LLAMA_BIN = folder of llama-quantize and llama-perplexity.
Prints a Markdown table. Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHUNKS = 100  # of 512 tokens, the second half of each scored: 25,500 tokens
RECIPES = "Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 Q3_K_L Q3_K_M Q3_K_S Q2_K IQ4_NL IQ4_XS".split()


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


def run(*cmd):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"FAIL: {' '.join(map(str, cmd))}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def number(text, label):
    found = re.search(re.escape(label) + r"\s*:?\s*([-\d.]+)\s*±\s*([-\d.]+)", text)
    if not found:
        sys.exit(f"FAIL: '{label}' not in the output of llama-perplexity:\n{text[-3000:]}")
    return float(found.group(1)), float(found.group(2))


def llama_score(llama, model, text, base):
    for _ in range(5):  # the program's logger sometimes loses its last lines at exit
        out = run(llama / "llama-perplexity", "-m", model, "-f", text, "-c", 512, "--chunks", CHUNKS, "-t", 1,
                  "--kl-divergence", "--kl-divergence-base", base)
        if "Same top p:" in out and "Mean PPL(Q)  " in out:
            break
    return {"ppl": number(out, "Mean PPL(Q)"), "kld": number(out, "Mean    KLD"),
            "top": number(out, "Same top p")}


def duet_logits(duet, model, ids, path):
    import numpy as np
    run(duet, "logits", model, "--ids", ",".join(map(str, ids)), "-o", path, "--kv-type", "f32")
    x = np.load(path).astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def duet_score(duet, model, chunks, base, tmp):
    """Mean KLD and its standard error over every position of the chunks."""
    import numpy as np
    kld = []
    for ids, p in zip(chunks, base):
        q = duet_logits(duet, model, ids, tmp / "q.npy")
        kld.append((np.exp(p) * (p - q)).sum(axis=1))
    kld = np.concatenate(kld)
    return kld.mean(), kld.std() / len(kld) ** 0.5, len(kld)


def tensor_types(path):
    from gguf import GGUFReader
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--duet", action="store_true")
    parser.add_argument("--chunks", type=int, default=40, help="chunks of 512 scored by duet")
    args = parser.parse_args()
    duet = pathlib.Path(os.environ.get("DUET", ROOT / "build/release/duet"))
    llama = os.environ.get("LLAMA_BIN") or os.path.dirname(shutil.which("llama-quantize") or "")
    if not llama or not (pathlib.Path(llama) / "llama-quantize").exists():
        skip("llama-quantize not found (set LLAMA_BIN)")
    llama = pathlib.Path(llama)
    try:
        import gguf  # noqa: F401
    except ImportError:
        skip("the gguf package is missing")
    if not args.text:
        skip("needs --text FILE: the demo's own sample is shorter than 20,000 scored tokens")

    failed = False
    with tempfile.TemporaryDirectory() as name:
        tmp = pathlib.Path(name)
        text = tmp / "text.txt"
        text.write_bytes(b"\n".join(pathlib.Path(t).read_bytes() for t in args.text))
        f32, base = tmp / "f32.gguf", tmp / "base.kld"
        run(duet, "convert", ROOT / "models/demo", "-q", "F32", "-o", f32)
        run(llama / "llama-perplexity", "-m", f32, "-f", text, "-c", 512, "--chunks", CHUNKS, "-t", 1, "--kl-divergence-base", base)
        chunks, base_logits = [], []
        if args.duet:
            ids = [int(i) for i in re.findall(r"\d+", run(duet, "tokenize", f32, "--file", text, "--json"))]
            chunks = [[1] + ids[i * 511:(i + 1) * 511] for i in range(args.chunks)]
            base_logits = [duet_logits(duet, f32, c, tmp / "p.npy") for c in chunks]
        print("| recipe | bytes duet | bytes llama.cpp | PPL duet | PPL llama.cpp | mean KLD duet | mean KLD llama.cpp | same top duet | llama.cpp |"
              + (" KLD in duet: duet | llama.cpp |" if args.duet else ""))
        print("|---" * (11 if args.duet else 9) + "|")
        for recipe in args.recipes.split(","):
            ours, theirs = tmp / "ours.gguf", tmp / "theirs.gguf"
            run(duet, "convert", ROOT / "models/demo", "-q", recipe, "-o", ours, "--force")
            run(llama / "llama-quantize", f32, theirs, recipe, 2)
            same_types = tensor_types(ours) == tensor_types(theirs)
            a, b = (llama_score(llama, m, text, base) for m in (ours, theirs))
            row = (f"| {recipe} | {ours.stat().st_size} | {theirs.stat().st_size} | {a['ppl'][0]:.4f} | {b['ppl'][0]:.4f} "
                   f"| {a['kld'][0]:.6f} ± {a['kld'][1]:.6f} | {b['kld'][0]:.6f} ± {b['kld'][1]:.6f} | {a['top'][0]:.2f} % | {b['top'][0]:.2f} % |")
            if args.duet:
                da, db = (duet_score(duet, m, chunks, base_logits, tmp) for m in (ours, theirs))
                row += f" {da[0]:.6f} ± {da[1]:.6f} | {db[0]:.6f} ± {db[1]:.6f} |"
            print(row, flush=True)
            if not same_types:
                print(f"FAIL: {recipe}: tensor types differ from llama.cpp's")
            if a["kld"][0] > b["kld"][0] + b["kld"][1]:
                print(f"FAIL: {recipe}: mean KLD above llama.cpp's plus one standard error")
            failed |= not same_types or a["kld"][0] > b["kld"][0] + b["kld"][1]
    print("FAIL" if failed else "PASS")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
