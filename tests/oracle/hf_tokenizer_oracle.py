#!/usr/bin/env python3
"""Folders that have only tokenizer.json against the tokenizers library.

Trains small tokenizers of the two kinds met (SentencePiece-like BPE with byte fallback; byte-level
BPE with each known word splitter), converts their folders with `duet convert --vocab-only` and
compares the ids of the texts of tests/golden/data/tok_v1.json.

Needs tokenizers. duet: DUET or build/release/duet. Exit 1 on failure, 77 when the package is missing.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build" / "release" / "duet"))
DATA = ROOT / "tests" / "golden" / "data"
CORPUS = ["sample.txt", "tok_v1.json", "chat.json"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(tk, stages):
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence(stages) if len(stages) > 1 else stages[0]
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(vocab_size=1500, special_tokens=["<|endoftext|>"], show_progress=False,
                                     initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainer


def split(tk, regex):
    return [tk.pre_tokenizers.Split(tk.Regex(regex), "isolated"),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def sentencepiece_like(tk):
    tokenizer = tk.Tokenizer(tk.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("\u2581"), tk.normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = tk.decoders.Sequence([tk.decoders.Replace("\u2581", " "), tk.decoders.ByteFallback(),
                                              tk.decoders.Fuse(), tk.decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trainer = tk.trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False, limit_alphabet=200)
    return tokenizer, trainer


def kinds(tk):
    plain = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tk.pre_tokenizers.Digits(individual_digits=True)
    return {"llama": sentencepiece_like(tk), "gpt-2": byte_level(tk, [plain]), "smollm": byte_level(tk, [digits, plain]),
            "llama-bpe": byte_level(tk, split(tk, LLAMA3)),
            "qwen2": byte_level(tk, split(tk, LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"))),
            "tekken": byte_level(tk, split(tk, TEKKEN))}


def corpus(kind):
    lines = []
    for name in CORPUS:
        text = (DATA / name).read_text()
        # A SentencePiece-like trainer sees words one by one, as its normalizer leaves no others.
        lines += [w for line in text.splitlines() for w in line.split()] if kind == "llama" else text.splitlines(True)
    return lines


def save_folder(folder, tokenizer, kind):
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    data = json.loads(path.read_text())
    if kind == "llama":  # byte tokens are ordinary entries in such files, and text may not name the rest
        data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < 3]
        path.write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 512, "rms_norm_eps": 1e-5}))


def run(*args):
    done = subprocess.run([DUET, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"FAIL duet {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout


def check(tk, kind, tokenizer, trainer, texts):
    tokenizer.train_from_iterator(corpus(kind), trainer)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_folder(folder, tokenizer, kind)
        tokenizer = tk.Tokenizer.from_file(str(folder / "tokenizer.json"))
        run("convert", folder, "--vocab-only", "-o", folder / "vocab.gguf")
        (folder / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
        ours = [json.loads(line) for line in run("tokenize", folder / "vocab.gguf", "--jsonl", folder / "texts.jsonl").splitlines()]
    wrong = [(t, tokenizer.encode(t, add_special_tokens=False).ids, ids) for t, ids in zip(texts, ours)
             if tokenizer.encode(t, add_special_tokens=False).ids != ids]
    ok = not wrong and len(ours) == len(texts)
    print("PASS" if ok else "FAIL", kind, f"{len(texts) - len(wrong)} of {len(texts)} texts", *wrong[:2], flush=True)
    return ok


def main():
    try:
        import tokenizers as tk
    except ImportError as e:
        print(f"SKIP: {e}")
        return 77
    cases = json.loads((DATA / "tok_v1.json").read_text())
    cases = cases["cases"] if isinstance(cases, dict) else cases
    # duet makes no control token out of user text; the library does.
    texts = [c["text"] for c in cases if c["text"] and "<s>" not in c["text"]]
    results = [check(tk, kind, *pair, texts) for kind, pair in kinds(tk).items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
