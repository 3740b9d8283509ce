#!/usr/bin/env python3
"""The official openai and ollama clients against `duet serve` on the demo model."""
import enum
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import typing

try:
    import httpx
    import ollama
    import openai
    import pydantic
except ImportError as e:
    print(f"SKIP: {e}")
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
failures = 0


def check(name, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'PASS' if ok else 'FAIL'} {name}{'' if ok else ': ' + str(detail)}", flush=True)


class Server:
    def __init__(self, model, *extra):
        template = [] if "--template" in extra else ["--template", "chatml"]
        self.process = subprocess.Popen([DUET, "serve", model, "--port", "0", "--ctx", "2048", *template, *extra], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.url = re.search(r"http://[\d.:]+", line).group(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


HELLO = [{"role": "user", "content": "How do I install a package?"}]


def error_of(call):
    try:
        call()
    except openai.APIStatusError as e:
        return e
    return None


def check_chat(client, model):
    whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0, seed=1)
    text = whole.choices[0].message.content
    check("openai chat", isinstance(text, str) and whole.usage.completion_tokens > 0 and whole.choices[0].finish_reason in ("stop", "length"), whole)
    stream = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0, seed=1, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    check("openai chat stream equals whole", streamed == text, (streamed, text))
    check("openai stream usage", chunks[-1].usage.total_tokens == whole.usage.total_tokens and not chunks[-1].choices, chunks[-1])
    check("openai stream role first, one id", chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1)
    both = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, temperature=1, seed=5, n=2)
    again = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, temperature=1, seed=5, n=2)
    check("openai n and seed", [c.message.content for c in both.choices] == [c.message.content for c in again.choices] and len(both.choices) == 2)
    first = text.strip()[4:8] or "\n"
    stopped = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0, stop=[first])
    check("openai stop", first not in stopped.choices[0].message.content and stopped.choices[0].finish_reason == "stop", stopped.choices[0])
    parts = client.chat.completions.create(model=model, messages=[{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}], max_tokens=24, temperature=0)
    check("openai content as parts", parts.choices[0].message.content == text)
    logprobs = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    check("openai chat logprobs", len(logprobs) == 4 and all(t.logprob == max(x.logprob for x in t.top_logprobs) and len(t.top_logprobs) == 3 for t in logprobs), logprobs)


def check_completions(client, model):
    done = client.completions.create(model=model, prompt="The package manager", max_tokens=8, temperature=0, echo=True, logprobs=2)
    lp = done.choices[0].logprobs
    check("openai completion echo", done.choices[0].text.startswith("The package manager"), done.choices[0].text)
    check("openai completion logprobs", lp.token_logprobs[0] is None and all(math.isfinite(x) for x in lp.token_logprobs[1:]) and len(lp.tokens) == len(lp.top_logprobs) == len(lp.text_offset), lp)
    by_ids = client.completions.create(model=model, prompt=[[1, 400, 500], [1, 600]], max_tokens=1)
    check("openai token-id prompts", [c.index for c in by_ids.choices] == [0, 1])
    biased = client.completions.create(model=model, prompt="The", max_tokens=3, temperature=0, logit_bias={"400": 100})
    plain = client.completions.create(model=model, prompt="The", max_tokens=3, temperature=0)
    check("openai logit_bias", biased.choices[0].text != plain.choices[0].text)
    streamed = "".join(c.choices[0].text for c in client.completions.create(model=model, prompt="The", max_tokens=3, temperature=0, stream=True))
    check("openai completion stream equals whole", streamed == plain.choices[0].text)


def check_embeddings(client, model):
    texts = ["install a package", "install the package", "a poem on the sea"]
    vectors = [d.embedding for d in client.embeddings.create(model=model, input=texts).data]  # asks for base64
    plain = [d.embedding for d in client.embeddings.create(model=model, input=texts, encoding_format="float").data]
    check("openai embeddings, base64 as floats", all(abs(a - b) < 1e-6 for u, v in zip(vectors, plain) for a, b in zip(u, v)))
    check("openai embeddings have length 1", all(abs(sum(x * x for x in v) - 1) < 1e-5 for v in vectors))
    dot = lambda u, v: sum(a * b for a, b in zip(u, v))
    check("openai embeddings: alike texts are closer", dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]))


class Unit(enum.Enum):
    celsius = "celsius"
    fahrenheit = "fahrenheit"


class Place(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=12, description="The city")
    latitude: float = pydantic.Field(ge=-90, le=90)


class Weather(pydantic.BaseModel):
    """The weather at a place."""

    place: Place
    unit: Unit
    days: int = pydantic.Field(ge=1, le=14)
    hours: list[int] = pydantic.Field(max_length=3)
    note: typing.Optional[typing.Annotated[str, pydantic.Field(max_length=8)]] = None


class Sum(pydantic.BaseModel):
    a: typing.Literal[1, 2, 3]
    b: bool


def accumulated(chunks):
    """The tool calls of a stream, put together as clients do it."""
    calls = {}
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            call = calls.setdefault(part.index, {"id": None, "name": "", "arguments": ""})
            call["id"] = part.id or call["id"]
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
    return list(calls.values())


def check_structured(client, model):
    parsed = client.chat.completions.parse(model=model, messages=HELLO, response_format=Weather, temperature=0, max_tokens=300)
    check("openai parse into a pydantic model", isinstance(parsed.choices[0].message.parsed, Weather), parsed.choices[0])
    many = client.chat.completions.parse(model=model, messages=HELLO, response_format=Weather, temperature=1.5, n=8, seed=2, max_tokens=300)
    check("openai parse, eight drawn", all(isinstance(c.message.parsed, Weather) for c in many.choices))
    with client.chat.completions.stream(model=model, messages=HELLO, response_format=Weather, temperature=0, max_tokens=300) as stream:
        for _ in stream:
            pass
        check("openai stream into a pydantic model", stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed)
    grammar = client.chat.completions.create(model=model, messages=HELLO, extra_body={"grammar": 'root ::= [0-9]{4} "-" [0-9]{2}'}).choices[0]
    check("openai with a grammar", re.fullmatch(r"\d{4}-\d\d", grammar.message.content) and grammar.finish_reason == "stop", grammar)
    form = client.chat.completions.create(model=model, messages=HELLO, response_format={"type": "json_object"}, max_tokens=40, temperature=0).choices[0]
    check("openai json_object", form.message.content.startswith("{"), form)
    refused = error_of(lambda: client.chat.completions.create(model=model, messages=HELLO, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}))
    check("openai schema that cannot be kept to is a 400 that names the keyword", isinstance(refused, openai.BadRequestError) and "uniqueItems" in str(refused), refused)


def check_tools(client, model):
    tools = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Sum)]
    kinds = {"Weather": Weather, "Sum": Sum}
    ask = dict(model=model, messages=HELLO, tools=tools, temperature=0, max_tokens=400, parallel_tool_calls=False)
    message = client.chat.completions.parse(**ask, tool_choice="required").choices[0].message
    call = message.tool_calls[0]
    check("openai tools: a required call parses", isinstance(call.function.parsed_arguments, kinds[call.function.name]), message)
    chunks = list(client.chat.completions.create(**ask, tool_choice="required", stream=True))
    streamed = accumulated(chunks)
    check("openai tools: streamed is the same call", len(streamed) == 1 and (streamed[0]["name"], streamed[0]["arguments"]) == (call.function.name, call.function.arguments), streamed)
    check("openai tools: it comes in pieces, finish_reason last", len(chunks) > 4 and chunks[-1].choices[0].finish_reason == "tool_calls", chunks[-1])
    named = client.chat.completions.create(**ask, tool_choice={"type": "function", "function": {"name": "Sum"}}).choices[0]
    check("openai tools: a named call", named.message.tool_calls[0].function.name == "Sum" and Sum.model_validate_json(named.message.tool_calls[0].function.arguments), named)
    check("openai tools: ids of nine letters and digits", re.fullmatch("[a-zA-Z0-9]{9}", named.message.tool_calls[0].id))
    several = client.chat.completions.create(**{**ask, "parallel_tool_calls": True, "max_tokens": 900}, tool_choice="required").choices[0]
    whole = several.message.tool_calls if several.finish_reason == "tool_calls" else several.message.tool_calls[:-1]
    check("openai tools: several calls", all(kinds[c.function.name].model_validate_json(c.function.arguments) for c in whole), several)
    after = HELLO + [message.model_dump(exclude_none=True, exclude={"parsed"}), {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"degrees": 21})}]
    told = client.chat.completions.create(**{**ask, "messages": after, "max_tokens": 8}, tool_choice="none").choices[0]
    check("openai tools: results are taken", isinstance(told.message.content, str), told)
    free = client.chat.completions.create(**{**ask, "max_tokens": 8}, tool_choice="auto").choices[0]
    check("openai tools: words when nothing must be called", free.message.content is not None and not free.message.tool_calls, free)


def check_errors(client, model):
    check("openai models", [m.id for m in client.models.list()] == [model] and client.models.retrieve(model).id == model)
    unknown = error_of(lambda: client.chat.completions.create(model="gpt-9", messages=HELLO))
    check("openai unknown model is 404", isinstance(unknown, openai.NotFoundError), unknown)
    bad = error_of(lambda: client.chat.completions.create(model=model, messages=HELLO, extra_body={"top_k": "many"}))
    check("openai wrong parameter is a 400 that names it", isinstance(bad, openai.BadRequestError) and bad.body["param"] == "top_k", bad)
    long = error_of(lambda: client.completions.create(model=model, prompt="word " * 3000, max_tokens=1))
    check("openai long prompt is a 400 with numbers", isinstance(long, openai.BadRequestError) and "2048 positions" in str(long), long)


def check_parallel(client, model):
    def text(i):
        return client.completions.create(model=model, prompt=f"Package number {i} is", max_tokens=40, temperature=0).choices[0].text

    alone = [text(i) for i in range(12)]
    together = [None] * 12
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, text(i))) for i in range(12)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    check("twelve at once equal alone", alone == together)


def check_ollama(url, model):
    client = ollama.Client(host=url)
    check("ollama list", client.list().models[0].model == model)
    check("ollama ps", client.ps().models[0].model == model)
    check("ollama show", "llama.context_length" in client.show(model).modelinfo)
    whole = client.chat(model=model, messages=HELLO, options={"temperature": 0, "num_predict": 20})
    pieces = list(client.chat(model=model, messages=HELLO, options={"temperature": 0, "num_predict": 20}, stream=True))
    check("ollama chat stream equals whole", "".join(p.message.content for p in pieces) == whole.message.content)
    check("ollama final figures", pieces[-1].done and pieces[-1].eval_count > 0 and pieces[-1].prompt_eval_count > 0, pieces[-1])
    check("ollama embed", abs(sum(x * x for x in client.embed(model=model, input="a text").embeddings[0]) - 1) < 1e-5)
    generated = client.generate(model=model, prompt="The package", raw=True, options={"temperature": 0, "num_predict": 5})
    check("ollama generate", generated.done_reason == "length" and generated.response, generated)
    form = client.chat(model=model, messages=HELLO, format=Weather.model_json_schema(), options={"num_predict": 300, "seed": 3})
    check("ollama format: a schema", isinstance(Weather.model_validate_json(form.message.content), Weather), form)
    streamed = "".join(p.message.content or "" for p in client.chat(model=model, messages=HELLO, format=Sum.model_json_schema(), stream=True))
    check("ollama format, streamed", isinstance(Sum.model_validate_json(streamed), Sum), streamed)
    check("ollama format: json", client.generate(model=model, prompt="x", format="json", options={"num_predict": 10}).response.startswith("{"))

    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
          a: the first
          b: the second
        """
        return a + b

    told = client.chat(model=model, messages=HELLO + [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]}, {"role": "tool", "tool_name": "add", "content": "3"}],
                       tools=[add], options={"num_predict": 6})
    check("ollama tools are taken", told.message.role == "assistant" and told.done, told)
    try:
        client.chat(model="other", messages=HELLO)
        check("ollama unknown model", False)
    except ollama.ResponseError as e:
        check("ollama unknown model is 404", e.status_code == 404, e)


def main():
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(folder, "demo.gguf")
        subprocess.run([DUET, "convert", str(ROOT / "models/demo"), "-q", "Q4_K_M", "-o", model], check=True, capture_output=True)
        with Server(model) as server:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
            check_chat(client, "demo")
            check_completions(client, "demo")
            check_embeddings(client, "demo")
            check_structured(client, "demo")
            check_tools(client, "demo")
            check_errors(client, "demo")
            check_parallel(client, "demo")
            check_ollama(server.url, "demo")
        with Server(model, "--template", "mistral-v1") as server:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
            check_tools(client, "demo")
        with Server(model, "--api-key", "secret") as server:
            wrong = error_of(lambda: openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list())
            check("wrong key is 401", isinstance(wrong, openai.AuthenticationError), wrong)
            check("right key", openai.OpenAI(base_url=server.url + "/v1", api_key="secret").models.list().data[0].id == "demo")
            check("health needs no key", httpx.get(server.url + "/health").json() == {"status": "ok"})
    sys.exit(failures > 0)


main()
