#!/usr/bin/env python3
"""`duet perplexity --kld` against llama-perplexity --kl-divergence: same files, same text.

The demo model in F32 is the reference, quantized files are measured against it by both programs.
Passes when every figure agrees within the two runs' rounding (activations are rounded differently, so
a quantized model is not bit for bit the same there): perplexities within 0.5 %, mean KLD within 5 %
or two standard errors, quantiles within 10 % (99 % and beyond: 15 %), top-1 agreement within two standard errors; and when
the F32 model measured against itself has a mean KLD below 1e-6.

  kld_oracle.py --text FILE [--recipes Q4_K_M,...] [--chunks N]

Environment: DUET = the duet binary; LLAMA_BIN = folder of llama-perplexity.
Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUANTILES = {"p999": "99.9%   KLD", "p99": "99.0%   KLD", "p95": "95.0%   KLD", "p90": "90.0%   KLD", "median": "Median  KLD"}


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


def run(*cmd):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"FAIL: {' '.join(map(str, cmd))}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def number(text, label):
    found = re.search(re.escape(label) + r"\s*:?\s*([-\d.]+)(?:\s*±\s*([-\d.]+))?", text)
    if not found:
        sys.exit(f"FAIL: '{label}' not in the output of llama-perplexity:\n{text[-3000:]}")
    return float(found.group(1)), float(found.group(2) or 0)


def theirs(llama, model, text, base, chunks):
    for _ in range(5):  # the program's logger sometimes loses its last lines at exit
        out = run(llama, "-m", model, "-f", text, "-c", 512, "--chunks", chunks, "--kl-divergence", "--kl-divergence-base", base)
        if "Same top p:" in out and "Mean PPL(Q)  " in out and "Median  KLD" in out:
            break
    got = {key: number(out, label)[0] for key, label in QUANTILES.items()}
    for key, label in (("ppl", "Mean PPL(Q)"), ("base", "Mean PPL(base)"), ("ratio", "Mean PPL(Q)/PPL(base)"), ("kld", "Mean    KLD"),
                       ("top", "Same top p:"), ("rms", "RMS Δp")):
        got[key] = number(out, label)
    return got


failures = 0


def check(what, ours, other, allowed):
    global failures
    good = abs(ours - other) <= allowed
    failures += not good
    print(f"{'PASS' if good else 'FAIL'}: {what}: {ours:.6g}, llama.cpp {other:.6g} (allowed difference {allowed:.2g})")


def compare(name, ours, other):
    for key, label in (("perplexity", "ppl"), ("reference_perplexity", "base")):
        check(f"{name} {key}", ours[key]["value"], other[label][0], 0.005 * other[label][0])
    check(f"{name} ratio", ours["ratio"]["value"], other["ratio"][0], 0.0005 + 2 * other["ratio"][1])
    check(f"{name} ratio's error", ours["ratio"]["stderr"], other["ratio"][1], 0.1 * other["ratio"][1])
    check(f"{name} mean KLD", ours["kld"]["mean"], other["kld"][0], max(0.05 * other["kld"][0], 2 * other["kld"][1]))
    for key in QUANTILES:
        check(f"{name} KLD {key}", ours["kld"][key], other[key], (0.15 if key.startswith('p99') else 0.1) * other[key])
    check(f"{name} top-1 %", 100 * ours["same_top"]["value"], other["top"][0], 2 * other["top"][1])
    check(f"{name} RMS dp %", 100 * ours["rms_difference"]["value"], other["rms"][0], 0.05 * other["rms"][0] + 2 * other["rms"][1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipes", default="Q8_0,Q4_K_M,Q2_K")
    parser.add_argument("--chunks", type=int, default=40)
    args = parser.parse_args()
    duet = os.environ.get("DUET", str(ROOT / "build/release/duet"))
    llama = shutil.which("llama-perplexity", path=os.environ.get("LLAMA_BIN", os.environ["PATH"]))
    if llama is None:
        skip("llama-perplexity not found (LLAMA_BIN)")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        run(duet, "convert", ROOT / "models/demo", "-q", "F32", "-o", folder / "f32.gguf")
        run(duet, "perplexity", folder / "f32.gguf", "-f", args.text, "--chunks", args.chunks, "--save-logits", folder / "ours.ref")
        run(llama, "-m", folder / "f32.gguf", "-f", args.text, "-c", 512, "--chunks", args.chunks, "--kl-divergence-base", folder / "theirs.ref")
        sizes = [(folder / f).stat().st_size for f in ("ours.ref", "theirs.ref")]
        print(f"reference files: ours {sizes[0]} bytes, llama.cpp's {sizes[1]}: {sizes[0] / sizes[1]:.3f}")
        own = json.loads(run(duet, "perplexity", folder / "f32.gguf", "--kld", folder / "ours.ref", "--json"))
        check("F32 against itself, mean KLD", own["kld"]["mean"], 0, 1e-6)
        check("F32 against itself, top-1", own["same_top"]["value"], 1, 0)
        for recipe in args.recipes.split(","):
            model = folder / f"{recipe}.gguf"
            run(duet, "convert", ROOT / "models/demo", "-q", recipe, "-o", model)
            ours = json.loads(run(duet, "perplexity", model, "--kld", folder / "ours.ref", "--json"))
            compare(recipe, ours, theirs(llama, model, args.text, folder / "theirs.ref", args.chunks))
            model.unlink()
    sys.exit(1 if failures else 0)


main()
