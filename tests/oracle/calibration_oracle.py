#!/usr/bin/env python3
"""How near quantized files of a small model are to the original: ours and llama.cpp's, by method.

For every row of the table the same weights (F32) are quantized to the same tensor types by llama.cpp
without and with an importance matrix and by duet plain, with that matrix, and calibrated (--calibrate); the
matrix and the calibration come from the first --tokens of one text, the scores from another, 100 chunks of
512 (25,500 scored tokens), by `duet perplexity --kld` or, with --judge llama, by llama-perplexity.

  calibration_oracle.py --calibration FILE --text FILE [--sets experts,wide,recipes] [--tokens N] [--greedy N]
      [--model FOLDER|F32.gguf] [--also-calibration NAME=FILE ...] [--judge duet|llama] [--keep FOLDER] [--only REGEX] [--methods REGEX]
      [--calibrate-tokens N]

Sets: experts (experts Q3_K or Q4_K, all else F32; 50 % below llama.cpp with imatrix is asked), wide (Q3_K_M and
Q4_K_M, embedding and head Q8_0: 45 %), recipes (as they are: below), sized (files of
the size of Q3_K_M and Q4_K_M whose types --target-size has chosen: below those recipes by the same method), down (ffn_down Q3_K or Q4_K, all else F16: 35 %).
--also-calibration: rows calibrated with another kind of text, at every entry of the chosen sets. --only: entries of the sets whose names match;
--methods: those rows only (llama.cpp imatrix and duet calibrated are needed for the verdict); --calibrate-tokens:
fewer for the calibrated rows than for the matrix.
--keep: files and scores stay there, a run that was broken off goes on; with other texts or counts it is refused. Environment: DUET = the duet binary; LLAMA_BIN =
folder of llama-quantize, llama-imatrix and llama-perplexity. Prints Markdown. Exit 0 pass, 1 fail, 77 cannot run here.
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
Q8 = (["--token-embedding-type", "Q8_0", "--output-tensor-type", "Q8_0"],
      ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"])


def only(pattern, kind, rest):
    """Options of both programs: matrices whose names hold the pattern get one type, all others another."""
    attention = ["attn_q", "attn_k", "attn_v", "attn_output"]
    ffn = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
    ours = ["--tensor", f"{pattern}={kind}", "--tensor", f".*={rest}"]
    theirs = ["--token-embedding-type", rest.lower(), "--output-tensor-type", rest.lower()]
    for name in attention + ffn:
        theirs += ["--tensor-type", f"{name}={(kind if re.search(pattern, name) else rest).lower()}"]
    return ours, theirs


# set -> (wanted: how far below llama.cpp with imatrix, [(label, recipe, (our options, theirs))])
SETS = {
    "experts": (0.50, [(f"{k}, experts only", f"{k}_S", only("ffn_(gate|up|down)_exps", k, "F32")) for k in ("Q3_K", "Q4_K")]),
    "wide": (0.45, [(f"{k}, embedding and head Q8_0", k, Q8) for k in ("Q3_K_M", "Q4_K_M")]),
    "recipes": (0.0, [(k, k, ([], [])) for k in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")]),
    "sized": (0.0, [(k, k, ([], [])) for k in ("Q3_K_M", "Q4_K_M")]),
    "down": (0.35, [(f"{k}, ffn_down only", f"{k}_S", only("ffn_down_exps", k, "F16")) for k in ("Q3_K", "Q4_K")]),
}


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


def run(*cmd, both=False):
    """What a program printed; both: also what it wrote to stderr."""
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        sys.exit(f"FAIL: {' '.join(map(str, cmd))}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + (done.stderr if both else "")


def tensor_types(path):
    from gguf import GGUFReader
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}


def number(text, label):
    found = re.search(re.escape(label) + r"\s*:?\s*([-\d.]+)(?:\s*±\s*([-\d.]+))?", text)
    if not found:
        sys.exit(f"FAIL: '{label}' not in the output of llama-perplexity:\n{text[-3000:]}")
    return float(found.group(1)), float(found.group(2) or 0)


class Judge:
    def __init__(self, args, tools, f32, folder):
        self.args, self.tools, self.base = args, tools, folder / f"reference-{args.judge}-{args.chunks}"
        if self.base.exists():
            return
        partial = self.base.with_suffix(".new")
        if args.judge == "duet":
            run(tools.duet, "perplexity", f32, "-f", args.text, "--chunks", args.chunks, "--save-logits", partial)
        else:
            run(*self.llama(f32), "--kl-divergence-base", partial)
        partial.rename(self.base)

    def llama(self, model):
        return [self.tools.llama / "llama-perplexity", "-m", model, "-f", self.args.text, "-c", 512, "--chunks", self.args.chunks]

    def score(self, model):
        if self.args.judge == "duet":
            r = json.loads(run(self.tools.duet, "perplexity", model, "--kld", self.base, "--json"))
            return {"ratio": r["ratio"]["value"], "ratio_error": r["ratio"]["stderr"], "kld": r["kld"]["mean"],
                    "error": r["kld"]["stderr"], "p99": r["kld"]["p99"], "top": 100 * r["same_top"]["value"],
                    "top_error": 100 * r["same_top"]["stderr"]}
        for _ in range(5):  # the program's logger sometimes loses its last lines at exit
            out = run(*self.llama(model), "--kl-divergence", "--kl-divergence-base", self.base, both=True)
            if "Same top p:" in out and "Mean PPL(Q)  " in out:
                break
        ratio, kld, top = (number(out, label) for label in ("Mean PPL(Q)/PPL(base)", "Mean    KLD", "Same top p"))
        return {"ratio": ratio[0], "ratio_error": ratio[1], "kld": kld[0], "error": kld[1], "p99": number(out, "99.0%   KLD")[0],
                "top": top[0], "top_error": top[1]}


class Continuations:
    """Greedy continuations of places in the test text: how many tokens are the original's before the first other one."""
    def __init__(self, args, tools, f32, folder):
        self.tools, self.folder, self.n = tools, folder, args.greedy_tokens
        text = pathlib.Path(args.text).read_text(errors="replace")
        self.prompts = [text[i * len(text) // args.greedy:][:400] for i in range(args.greedy)]
        self.original = [self.ids(f32, prompt) for prompt in self.prompts]

    def ids(self, model, prompt):
        path = self.folder / "prompt.txt"
        path.write_text(prompt)
        return json.loads(run(self.tools.duet, "run", model, "--raw", "--file", path, "--temp", 0, "-n", self.n, "--json"))["ids"]

    def agreement(self, model):
        lengths = []
        for prompt, original in zip(self.prompts, self.original):
            ids = self.ids(model, prompt)
            same = next((i for i, pair in enumerate(zip(ids, original)) if pair[0] != pair[1]), min(len(ids), len(original)))
            lengths.append(same)
        mean = sum(lengths) / len(lengths)
        spread = (sum((x - mean) ** 2 for x in lengths) / (len(lengths) - 1)) ** 0.5
        return {"greedy": mean, "greedy_error": spread / len(lengths) ** 0.5}


class Tools:
    def __init__(self):
        self.duet = pathlib.Path(os.environ.get("DUET", ROOT / "build/release/duet"))
        llama = os.environ.get("LLAMA_BIN") or os.path.dirname(shutil.which("llama-quantize") or "")
        self.llama = pathlib.Path(llama or "/nonexistent")
        if not (self.llama / "llama-imatrix").exists():
            skip("llama-quantize and llama-imatrix not found (set LLAMA_BIN)")
        try:
            import gguf  # noqa: F401
        except ImportError:
            skip("the gguf package is missing")


def methods(args, tools, f32, imatrix, recipe, options):
    """Name -> command that writes to the path put behind it."""
    ours, theirs = options
    llama = [tools.llama / "llama-quantize"]
    goes_on = lambda out: "--resume" if pathlib.Path(f"{out}.part").exists() else "--force"
    calibrated = lambda text: lambda out: [tools.duet, "quantize", f32, out, recipe, *ours, goes_on(out), "--calibrate", text,
                                           "--calibrate-tokens", args.calibrate_tokens or args.tokens]
    table = {
        "llama.cpp plain": lambda out: [*llama, *theirs, f32, out, recipe, 2],
        "llama.cpp imatrix": lambda out: [*llama, "--imatrix", imatrix, *theirs, f32, out, recipe, 2],
        "duet plain": lambda out: [tools.duet, "quantize", f32, out, recipe, *ours, "--force"],
        "duet imatrix": lambda out: [tools.duet, "quantize", f32, out, recipe, *ours, "--force", "--imatrix", imatrix],
        "duet calibrated": calibrated(args.calibration),
    }
    for pair in args.also_calibration:
        name, path = pair.split("=", 1)
        table[f"duet calibrated, {name}"] = calibrated(path)
    return {name: command for name, command in table.items() if re.search(args.methods, name)}


def measured(judge, folder, label, method, command):
    """The score of one file, with its size and types; kept beside it."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", f"{label} {method}")
    kept = folder / f"{stem}-{judge.args.judge}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    path = folder / f"{stem}.gguf"
    run(*command(path))
    result = judge.score(path) | (judge.continuations.agreement(path) if judge.continuations else {}) | {"bytes": path.stat().st_size, "types": tensor_types(path)}
    kept.write_text(json.dumps(result))
    path.unlink()
    return result


def measure_sized(args, tools, judge, folder, f32, imatrix, entry):
    """The same recipe against types chosen for its size."""
    label, recipe, _ = entry
    passed = True
    ways = {"plain": [], "imatrix": ["--imatrix", imatrix], "calibrated": ["--calibrate", args.calibration, "--calibrate-tokens", args.calibrate_tokens or args.tokens]}
    for way, options in ways.items():
        if not re.search(args.methods, f"duet {way}"):
            continue
        fixed = measured(judge, folder, label, f"duet {way}", lambda out, o=options: [tools.duet, "quantize", f32, out, recipe, "--force", *o])
        size = fixed["bytes"]
        sized = measured(judge, folder, label, f"duet sized {way}",
                         lambda out, o=options, n=size: [tools.duet, "quantize", f32, out, "--target-size", n, "--force", *o])
        print(row(label, f"duet {way}", fixed, None))
        print(row(f"size of {label}", f"duet {way}, --target-size", sized, fixed), flush=True)
        if sized["kld"] >= fixed["kld"] or not 0.995 * size <= sized["bytes"] <= size:
            print(f"FAIL: {label}, {way}: types chosen for its size are not better, or the size is missed")
            passed = False
    return passed


def row(label, method, r, reference):
    change = f"{100 * (r['kld'] / reference['kld'] - 1):+.1f} %" if reference else ""
    return (f"| {label} | {method} | {r['bytes']} | {r['ratio']:.4f} ± {r['ratio_error']:.4f} | {r['kld']:.6f} ± {r['error']:.6f} "
            f"| {change} | {r['p99']:.4f} | {r['top']:.2f} ± {r['top_error']:.2f} % |"
            + (f" {r['greedy']:.1f} ± {r['greedy_error']:.1f} |" if "greedy" in r else ""))


def measure_entry(args, tools, judge, folder, f32, imatrix, wanted, entry):
    """Prints the rows of one entry; True when what is asked is met."""
    label, recipe, options = entry
    results = {name: measured(judge, folder, label, name, command)
               for name, command in methods(args, tools, f32, imatrix, recipe, options).items()}
    reference = results["llama.cpp imatrix"]
    for name, r in results.items():
        print(row(label, name, r, None if r is reference else reference), flush=True)
    passed = True
    if len({json.dumps(r["types"], sort_keys=True) for r in results.values()}) > 1:
        print(f"FAIL: {label}: tensor types differ")
        passed = False
    if results["duet calibrated"]["kld"] > (1 - wanted) * reference["kld"]:
        print(f"FAIL: {label}: less than {100 * wanted:.0f} % below llama.cpp with imatrix")
        passed = False
    return passed


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--sets", default="experts,wide,recipes")
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--calibrate-tokens", type=int)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/demo")
    parser.add_argument("--also-calibration", action="append", default=[])
    parser.add_argument("--greedy", type=int, default=0, help="greedy continuations to compare")
    parser.add_argument("--greedy-tokens", type=int, default=128)
    parser.add_argument("--judge", choices=["duet", "llama"], default="duet")
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--only", default="", help="entries whose names match")
    parser.add_argument("--methods", default="", help="methods whose names match")
    return parser.parse_args()


def check_settings(args, folder):
    """What is kept there must have been made with the same settings."""
    settings = {key: str(getattr(args, key)) for key in
                ("model", "text", "calibration", "tokens", "calibrate_tokens", "chunks", "greedy", "greedy_tokens")}
    path = folder / "settings.json"
    if path.exists() and (kept := json.loads(path.read_text())) != settings:
        differing = ", ".join(f"{key} {kept.get(key)}, not {value}" for key, value in settings.items() if kept.get(key) != value)
        sys.exit(f"FAIL: {folder} holds scores made with other settings ({differing}); give another folder")
    path.write_text(json.dumps(settings))


def measure(args, tools, folder):
    check_settings(args, folder)
    f32, imatrix = folder / "f32.gguf", folder / "imatrix.gguf"
    if args.model.suffix == ".gguf":
        f32 = args.model
    elif not f32.exists():
        run(tools.duet, "convert", args.model, "-q", "F32", "-o", f32)
    if not imatrix.exists():
        partial = folder / "partial.gguf"  # the program writes the file again and again while it runs
        run(tools.llama / "llama-imatrix", "-m", f32, "-f", args.calibration, "-o", partial, "-c", 512, "--chunks", args.tokens // 512,
            "--process-output", "--no-ppl")
        partial.rename(imatrix)
    judge = Judge(args, tools, f32, folder)
    judge.continuations = Continuations(args, tools, f32, folder) if args.greedy > 1 else None
    fewer = f" ({args.calibrate_tokens} for the calibrated rows)" if args.calibrate_tokens else ""
    print(f"{args.tokens} calibration tokens{fewer}, {255 * args.chunks} scored tokens, scored by {args.judge}\n")
    greedy = " greedy tokens as the original |" if args.greedy > 1 else ""
    print("| types | method | bytes | perplexity ratio | mean KLD | against llama.cpp imatrix | 99 % KLD | same top |" + greedy)
    print("|---" * (9 if greedy else 8) + "|", flush=True)
    passed, n = True, 0
    for name in args.sets.split(","):
        wanted, entries = SETS[name]
        for entry in entries:
            if not re.search(args.only, entry[0]):
                continue
            n += 1
            passed &= (measure_sized(args, tools, judge, folder, f32, imatrix, entry) if name == "sized" else
                       measure_entry(args, tools, judge, folder, f32, imatrix, wanted, entry))
    if n == 0:
        sys.exit(f"FAIL: no entry of {args.sets} matches --only {args.only}")
    return passed


def main():
    args, tools = arguments(), Tools()
    if not args.text or not args.calibration:
        skip("needs --calibration FILE and --text FILE, disjoint")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        passed = measure(args, tools, args.keep)
    else:
        with tempfile.TemporaryDirectory() as name:
            passed = measure(args, tools, pathlib.Path(name))
    print("PASS" if passed else "FAIL")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
