#!/usr/bin/env python3
"""langchain-openai, litellm, llama-index and lm-eval, as they are, against `duet serve` on the demo model.

lm-eval's local-completions, by token ids, on the F32 conversion with f32 keys and values is compared with its own
hf backend on models/demo: accuracy, each log-likelihood, is_greedy. transformers 5 reads a tokenizer.model without
SentencePiece's space before the first word, so both get it as the tokenizer.json that Mixtral's repositories have. By
the server's tokenizer lm-eval never asks for BOS: there its hf backend goes without too. Each part is skipped when its
packages are missing (lm-eval's comparison needs torch and transformers); exit code 77 when all are.
"""
import importlib
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
DEMO = ROOT / "models/demo"
FOLDER = tempfile.TemporaryDirectory()
# Before the packages are imported: nothing may be fetched, nothing be left behind.
os.environ.update(HF_HOME=FOLDER.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", LITELLM_LOCAL_MODEL_COST_MAP="True",
                  OPENAI_API_KEY="none", TOKENIZERS_PARALLELISM="false", NLTK_DATA=FOLDER.name)
QUESTION = "How do I install a package?"
failures = passes = 0


def check(name, ok, detail=""):
    global failures, passes
    failures += not ok
    passes += bool(ok)
    print(f"{'PASS' if ok else 'FAIL'} {name}{'' if ok else ': ' + str(detail)[:600]}", flush=True)


def packages(part, *names):
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as e:
            print(f"SKIP: {part}: {e}", flush=True)
            return False
    return True


class Server:
    def __init__(self, model, *extra):
        self.process = subprocess.Popen([DUET, "serve", model, "--port", "0", "--template", "chatml", "--ctx", "1024", *extra], stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http://[\d.:]+", self.process.stdout.readline()).group(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


def has_length_one(vector):
    return abs(sum(x * x for x in vector) - 1) < 1e-4


def check_langchain(url):
    if not packages("langchain", "langchain_openai"):
        return
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
    chat = ChatOpenAI(base_url=url + "/v1", model="demo", temperature=0, max_tokens=20, max_retries=0, stream_usage=True)
    messages = [SystemMessage("You are short."), HumanMessage(QUESTION)]
    whole = chat.invoke(messages)
    check("langchain chat", whole.content and whole.usage_metadata["output_tokens"] > 0 and whole.response_metadata["finish_reason"] in ("stop", "length"), whole)
    pieces = list(chat.stream(messages))
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    check("langchain stream equals whole", total.content == whole.content and total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"], total)
    batch = chat.batch([messages, [HumanMessage("What is a file?")], messages])
    check("langchain batch", batch[0].content == batch[2].content == whole.content)
    check("langchain logprobs", len(chat.bind(logprobs=True, top_logprobs=2).invoke(messages).response_metadata["logprobs"]["content"]) > 0)
    completion = OpenAI(base_url=url + "/v1", model="demo", temperature=0, max_tokens=8, max_retries=0)
    check("langchain completion stream equals whole", "".join(completion.stream("The package")) == completion.invoke("The package") != "")
    embeddings = OpenAIEmbeddings(base_url=url + "/v1", model="demo", check_embedding_ctx_length=False, max_retries=0)
    vectors = embeddings.embed_documents(["install a package", "a poem"])
    one = embeddings.embed_query("install a package")
    check("langchain embeddings", len(vectors) == 2 and all(map(has_length_one, vectors)) and max(abs(a - b) for a, b in zip(one, vectors[0])) < 1e-5)


def check_litellm(url):
    if not packages("litellm", "litellm"):
        return
    import litellm
    litellm.telemetry = False
    messages = [{"role": "user", "content": QUESTION}]
    common = dict(model="openai/demo", api_base=url + "/v1", api_key="none", num_retries=0)
    whole = litellm.completion(messages=messages, temperature=0, max_tokens=20, **common)
    text = whole.choices[0].message.content
    check("litellm chat", text and whole.usage.completion_tokens > 0, whole)
    streamed = "".join(c.choices[0].delta.content or "" for c in litellm.completion(messages=messages, temperature=0, max_tokens=20, stream=True, **common))
    check("litellm stream equals whole", streamed == text, (streamed, text))
    completion = litellm.text_completion(prompt="The package", temperature=0, max_tokens=8, model="text-completion-openai/demo", api_base=url + "/v1", api_key="none")
    check("litellm text completion", completion.choices[0].text)
    vectors = litellm.embedding(input=["install a package", "a poem"], **common).data
    check("litellm embedding", len(vectors) == 2 and all(has_length_one(v["embedding"]) for v in vectors))
    by_ollama = litellm.completion(model="ollama_chat/demo", api_base=url, messages=messages, temperature=0, max_tokens=20)
    check("litellm by the Ollama protocol, same text", by_ollama.choices[0].message.content == text, by_ollama)
    try:
        litellm.completion(**{**common, "model": "openai/other"}, messages=messages)
        check("litellm unknown model", False)
    except litellm.exceptions.NotFoundError:
        check("litellm unknown model is NotFoundError", True)


def check_llama_index(url):
    if not packages("llama-index", "llama_index.llms.openai_like", "llama_index.embeddings.openai_like"):
        return
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike
    common = dict(api_base=url + "/v1", api_key="none", max_retries=0)
    llm = OpenAILike(model="demo", temperature=0, max_tokens=20, context_window=1024, is_chat_model=True, **common)
    messages = [ChatMessage(role="user", content=QUESTION)]
    whole = llm.chat(messages).message.content
    check("llama-index chat", whole)
    check("llama-index stream equals whole", "".join(p.delta or "" for p in llm.stream_chat(messages)) == whole)
    plain = OpenAILike(model="demo", temperature=0, max_tokens=8, context_window=1024, is_chat_model=False, **common)
    check("llama-index complete, stream equals whole", "".join(p.delta or "" for p in plain.stream_complete("The package")) == plain.complete("The package").text != "")
    vectors = OpenAILikeEmbedding(model_name="demo", **common).get_text_embedding_batch(["install a package", "a poem"])
    check("llama-index embeddings", len(vectors) == 2 and all(map(has_length_one, vectors)))


CHOICE_TASK = """task: demo_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choice.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORD_TASK = """task: demo_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/word.jsonl"}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{begin}}}}"
doc_to_target: "{{{{word}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


GREEDY_TASK = """task: demo_greedy
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/greedy.jsonl"}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{begin}}}}"
doc_to_target: "{{{{word}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


class Reference:
    """The model as transformers has it. Its tokenizer, with the space before the first word, goes to a folder."""

    def __init__(self, folder):
        import torch
        from tokenizers import normalizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.torch = torch
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        self.tokenizer_folder = os.path.join(folder, "tokenizer")
        tokenizer.save_pretrained(self.tokenizer_folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder)
        self.model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()

    def ids(self, text, bos):
        return self.tokenizer(text, add_special_tokens=bos)["input_ids"]

    def logits(self, ids):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0]

    def lead(self, begin, whole):
        """How far the better of the right token and the best other one leads, least of all behind `begin`."""
        rows = self.logits(whole)
        out = math.inf
        for position in range(len(begin), len(whole)):
            row = rows[position - 1].clone()
            own = float(row[whole[position]])
            row[whole[position]] = -math.inf
            out = min(out, abs(own - float(row.max())))
        return out

    def continuation(self, text, n_tokens):
        """The model's own, where its text is tokenized as it was made; else None."""
        begin = self.ids(text, True)
        ids = list(begin)
        for _ in range(n_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        out = self.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ")
        if ids[-1] == self.tokenizer.eos_token_id or not out.startswith(text) or self.ids(out, True) != ids:
            return None
        return out[len(text):]


def write_tasks(folder, reference):
    """Sentences cut in two: which end is the right one; what is their last word; how the model would go on."""
    text = (ROOT / "tests/golden/data/sample.txt").read_text()
    sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split()))]
    sentences = [s for s in sentences if 8 <= len(s) <= 40][:40]
    if len(sentences) < 12:
        raise RuntimeError("too few sentences in sample.txt")
    pick = random.Random(1)
    choices, words, greedy = [], [], []
    for i, s in enumerate(sentences):
        others = pick.sample([t for j, t in enumerate(sentences) if j != i], 3)
        ends = [" ".join(t[len(t) // 2:]) for t in others]
        right = pick.randrange(4)
        ends.insert(right, " ".join(s[len(s) // 2:]))
        begin = " ".join(s[:len(s) // 2])
        choices.append({"begin": begin, "ends": ends, "right": right})
        words.append({"begin": " ".join(s[:-1]), "word": s[-1]})
        own = reference.continuation(begin, 4)
        if own is not None:
            greedy.append({"begin": begin, "word": own})
    for name, rows, task in (("choice", choices, CHOICE_TASK), ("word", words, WORD_TASK), ("greedy", greedy, GREEDY_TASK)):
        pathlib.Path(folder, name + ".jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        pathlib.Path(folder, name + ".yaml").write_text(task.format(folder=folder))


def evaluate(folder, model, /, **arguments):
    """Accuracies, and answers (log-likelihood, is_greedy) by (task, document, context, end)."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    out = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=["demo_choice", "demo_word", "demo_greedy"], batch_size=1, bootstrap_iters=0,
                                  log_samples=True, task_manager=TaskManager(include_path=folder, include_defaults=False))
    answers = {}
    for task, samples in out["samples"].items():
        for sample in samples:
            for request, response in zip(sample["arguments"].values() if isinstance(sample["arguments"], dict) else sample["arguments"], sample["filtered_resps"]):
                context, end = (request["arg_0"], request["arg_1"]) if isinstance(request, dict) else request
                answers[task, sample["doc_id"], context, end] = (float(response[0]), str(response[1]) == "True")
    accuracy = {(task, name): value for task, results in out["results"].items() for name, value in results.items() if name.startswith("acc") and "stderr" not in name}
    return accuracy, answers


def server_ids(url, text):
    """As lm-eval asks for them."""
    request = urllib.request.Request(url + "/tokenize", json.dumps({"prompt": text, "add_special_tokens": False}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["tokens"]


def check_lm_eval(folder):
    if not packages("lm-eval", "lm_eval", "datasets", "transformers", "torch"):
        return
    reference = Reference(folder)
    write_tasks(folder, reference)
    model = os.path.join(folder, "demo-f32.gguf")
    subprocess.run([DUET, "convert", str(DEMO), "-q", "F32", "-o", model], check=True, capture_output=True)
    with Server(model, "--kv-type", "f32") as server:
        for backend, bos, more in (("huggingface", True, {"tokenizer": reference.tokenizer_folder}), ("remote", False, {})):
            # logits_cache: requests whose tokens begin alike share a row of logits there, of which lm-eval 0.4.13 takes the wrong positions.
            expected = evaluate(folder, "hf", logits_cache=False, pretrained=str(DEMO), tokenizer=reference.tokenizer_folder, dtype="float32", device="cpu", add_bos_token=bos)
            got = evaluate(folder, "local-completions", model="demo-f32", base_url=server.url + "/v1/completions", tokenizer_backend=backend,
                           tokenized_requests=True, num_concurrent=4, max_retries=1, max_length=1024, add_bos_token=bos, **more)
            name = f"lm-eval, {backend} tokenizer"
            if backend == "remote":
                wrong = [key for key in got[1] if server_ids(server.url, key[2] + key[3]) != reference.ids(key[2] + key[3], False)]
                check(f"{name}: {len(got[1])} texts are the same ids", not wrong, wrong[:3])
            compare(name, expected, got, reference, bos)


def compare(name, expected, got, reference, bos):
    (expected_accuracy, expected), (accuracy, answers) = expected, got
    check(f"{name}: same requests", expected.keys() == answers.keys() and len(answers) >= 60, (len(expected), len(answers)))
    check(f"{name}: same accuracy {list(accuracy.values())}", accuracy == expected_accuracy and len(accuracy) >= 4, (accuracy, expected_accuracy))
    common = expected.keys() & answers.keys()
    worst = max(abs(expected[key][0] - answers[key][0]) for key in common)
    check(f"{name}: {len(common)} log-likelihoods within 1e-2, worst {worst:.2e}", worst < 1e-2)
    differ = [key for key in common if expected[key][1] != answers[key][1]]
    n_greedy = sum(expected[key][1] for key in common)
    wrong = [lead for lead in (reference.lead(reference.ids(key[2], bos), reference.ids(key[2] + key[3], bos)) for key in differ) if lead > 1e-2]
    check(f"{name}: is_greedy equal ({n_greedy} greedy, {len(differ)} ties)", not wrong and n_greedy > 0, (n_greedy, wrong))


def main():
    folder = FOLDER.name
    model = os.path.join(folder, "demo.gguf")
    subprocess.run([DUET, "convert", str(DEMO), "-q", "Q4_K_M", "-o", model], check=True, capture_output=True)
    with Server(model) as server:
        check_langchain(server.url)
        check_litellm(server.url)
        check_llama_index(server.url)
    check_lm_eval(folder)
    sys.exit(1 if failures else 0 if passes else 77)


main()
