#!/usr/bin/env python3
"""Writes tests/golden/data/tok_demo.json and chat_demo.json: what sentencepiece and mistral-common
make of the demo model's vocabulary (models/demo/tokenizer.model) and of two changed copies of it.

Needs: pip install mistral-common sentencepiece protobuf. Run from the top folder:
    PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python tests/golden/make_text_goldens.py
"""
import importlib.metadata
import json
import pathlib
import random
import tempfile

import sentencepiece
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import sentencepiece_model_pb2

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
DATA = TOP / "tests" / "golden" / "data"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
MARKERS = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[PREFIX]", "[SUFFIX]"]

FIXED_TEXTS = [
    "", " ", "  ", "Hello world", " leading", "trailing ", "two  spaces", "tab\tand\nnewline\r\n", "<s>", "</s>", "<unk>",
    "a <s> b </s> [INST] c [/INST]", "<0x0A>", "▁", "▁▁ meta ▁", "日本語と中文と한국어", "🎉👨‍👩‍👧🏳️‍🌈", "Größe, déjà vu, niño, perché",
    "\x00\x01\x7f", "\u00a0\u200b\u2028\ufeff", "e\u0301", "1234567890", "    def f(x):\n        return x ** 2\n", "a" * 300,
    " " * 70, "\n" * 20, "日" * 40, "the the the", "The quick brown fox jumps over the lazy dog.", "DESCRIPTION\n       -h, --help",
]
ALPHABETS = ["abcdefghijklmnopqrstuvwxyz      \n", "ABC xyz 0123456789.,;:!?()[]{}<>/\\\"'`~@#$%^&*-_=+|\t\r\n",
             "éèàùâêîôûçäöüßñ ÅØ", "абвгдежзиклмн ", "日本語漢字仮名中国人 ", "😀🚉🎉👍", "▁ ▁", "\x00\x7f\u00ad\u200d\u3000"]


def random_text(rng, pieces, sample):
    parts = []
    for _ in range(rng.randint(1, 14)):
        kind = rng.random()
        if kind < 0.3:
            alphabet = rng.choice(ALPHABETS)
            parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 8))))
        elif kind < 0.6:
            parts.append(rng.choice(pieces).replace("▁", " "))
        elif kind < 0.7:
            parts.append(" " * rng.randint(1, 12))
        elif kind < 0.9:
            start = rng.randrange(len(sample) - 60)
            parts.append(sample[start:start + rng.randint(3, 60)])
        else:
            parts.append(chr(rng.choice([rng.randint(0x20, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])))
    return "".join(parts)


def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def text_cases(model, seed, count):
    rng = random.Random(seed)
    spm = processor(model)
    pieces = [spm.id_to_piece(i) for i in range(spm.vocab_size())]
    sample = (DATA / "sample.txt").read_text(encoding="utf-8")
    texts = FIXED_TEXTS + [random_text(rng, pieces, sample) for _ in range(count)]
    encode = [{"text": t, "ids": spm.encode(t), "decoded": spm.decode(spm.encode(t))} for t in texts]
    lists = [[rng.choice([rng.randrange(spm.vocab_size()), rng.randrange(3, 259), 0, 1, 2]) for _ in range(rng.randint(0, 10))]
             for _ in range(count // 2)]
    return {"encode": encode, "decode": [{"ids": ids, "text": spm.decode(ids)} for ids in lists]}


def changed_types(model):
    """Some pieces unused, some user-defined: rules that the plain vocabulary never meets."""
    rng = random.Random(5)
    changes = {}
    for i, piece in enumerate(model.pieces):
        if piece.type == NORMAL and len(piece.piece) > 1:
            kind = rng.random()
            if kind < 0.12:
                changes[i] = UNUSED
            elif kind < 0.14:
                changes[i] = USER_DEFINED
    for i, kind in changes.items():
        model.pieces[i].type = kind
    return changes


def chat_cases():
    cases = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))["cases"]
    out = [{key: case[key] for key in ("name", "version", "messages", "tools")} for case in cases]
    call = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "f", "arguments": {"x": 1.50, "é": [True, None, "ü\n"]}}}
    user, final = {"role": "user", "content": "Do it"}, {"role": "user", "content": "Again"}
    extra = [
        ("neighbours", [user, final, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, final, user]),
        ("system messages", [{"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, user]),
        ("system in between", [user, {"role": "system", "content": "Late."}, final]),
        ("system only", [{"role": "system", "content": "Alone."}]),
        ("assistant first", [{"role": "assistant", "content": "Hi"}, user]),
        ("empty user", [{"role": "user", "content": ""}]),
        ("content parts", [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    ]
    for name, messages in extra:
        out += [{"name": name, "version": version, "messages": messages, "tools": None} for version in ("v1", "v3")]
    results = ["21", " 1.50 ", "{\"a\":1,\"b\":[1e20,1E5,-0,0.00001]}", "not json", "", "NaN", "01", "\"\\u00e9\\ud83d\\ude00\"",
               "12345678901234567890123", "{\"a\":1,\"b\":2,\"a\":3}", "[1,]", "1e400", "tab\t\"quote\""]
    for result in results:
        out.append({"name": "result " + result, "version": "v3", "tools": None, "messages": [
            user, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": result, "tool_call_id": call["id"]}]})
    for arguments in ["", "not json", "{\"b\": 1,\n \"a\": \"\\u00fc\"}"]:
        changed = dict(call, function={"name": "f", "arguments": arguments})
        out.append({"name": "arguments " + arguments, "version": "v3", "tools": None, "messages": [
            user, {"role": "assistant", "tool_calls": [changed, call]},
            {"role": "tool", "content": "1", "tool_call_id": call["id"]},
            {"role": "tool", "content": "2", "tool_call_id": call["id"]}, final]})
    return out


def ids_of(case, tokenizers):
    request = ChatCompletionRequest.from_openai(json.loads(json.dumps(case["messages"])), tools=case["tools"])
    return tokenizers[case["version"]].encode_chat_completion(request).tokens


def with_markers(model):
    for name in MARKERS:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = name, 0.0, CONTROL


def load():
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((TOP / "models" / "demo" / "tokenizer.model").read_bytes())
    return model


def write(name, document):
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"))
    (DATA / name).write_text(text.replace('{"text"', '\n{"text"').replace('{"name":', '\n{"name":') + "\n")
    print(name, len(text))


def main():
    versions = {name: importlib.metadata.version(name) for name in ("sentencepiece", "mistral-common")}
    changed = load()
    changes = changed_types(changed)
    write("tok_demo.json", {"made_by": "tests/golden/make_text_goldens.py", "versions": versions,
                            "plain": text_cases(load(), 1, 260), "changed": text_cases(changed, 2, 160),
                            "changed_types": [[i, kind] for i, kind in sorted(changes.items())]})
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = {}
        for version in ("v1", "v3"):
            model = load()
            if version == "v3":
                with_markers(model)
            path = pathlib.Path(folder) / f"tokenizer.model.{version}"
            path.write_bytes(model.SerializeToString())
            tokenizers[version] = MistralTokenizer.from_file(str(path))
        cases = [dict(case, ids=ids_of(case, tokenizers)) for case in chat_cases()]
    write("chat_demo.json", {"made_by": "tests/golden/make_text_goldens.py", "versions": versions, "markers": MARKERS, "cases": cases})


main()
