#!/usr/bin/env python3
"""How soon `duet serve` starts the second turn of a long conversation, against the first prompt's time.

serve_turns.py MODEL [--tokens 4064] [--new 32] [--limit 5] [--serve-args "--parallel 2"]
At once, after another client spoke, and after a restart with --cache-dir. Prompts are token ids, so that a synthetic
model will do. Prints times to the first token; exit code 1 when a second turn takes --limit percent of the first
prompt's time or more, or when its tokens are not those of a server that has kept nothing.
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))


class Server:
    def __init__(self, model, *extra):
        self.process = subprocess.Popen([DUET, "serve", model, "--port", "0", *extra], stdout=subprocess.PIPE, text=True)
        self.host = urllib.parse.urlparse(re.search(r"http://[\d.:]+", self.process.stdout.readline()).group(0)).netloc

    def ask(self, ids, n=8):
        """(seconds to the first token, tokens taken from earlier requests, generated ids)"""
        connection = http.client.HTTPConnection(self.host, timeout=600)
        begin = time.monotonic()
        body = {"prompt": ids, "n_predict": n, "temperature": 0, "ignore_eos": True, "stream": True, "return_tokens": True}
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        first, out, last = None, [], {}
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                if last["tokens"] and first is None:
                    first = time.monotonic() - begin
                if not last["stop"]:
                    out += last["tokens"]
        connection.close()
        return first, last["timings"]["cache_n"], out

    def stop(self):
        begin = time.monotonic()
        self.process.terminate()
        code = self.process.wait(120)
        return time.monotonic() - begin, code


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--tokens", type=int, default=4064)
    p.add_argument("--new", type=int, default=32)
    p.add_argument("--limit", type=float, default=5, help="percent of the first prompt's time")
    p.add_argument("--vocabulary", type=int, default=4000, help="ids are below this")
    p.add_argument("--serve-args", default="--parallel 2", help="more options of duet serve")
    p.add_argument("--compare", action="store_true", help="also evaluate the second turn from nothing, and compare its tokens")
    a = p.parse_args()
    pick = random.Random(1)
    ids = lambda n: [pick.randrange(300, a.vocabulary) for _ in range(n)]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        options = ["--ctx", str(a.tokens + 10 * a.new), "--cache-dir", os.path.join(folder, "cache"), *a.serve_args.split()]
        server = Server(a.model, *options)
        conversation = ids(a.tokens)
        whole, _, answer = server.ask(conversation)
        print(f"first prompt, {a.tokens} tokens: {whole * 1e3:.0f} ms to the first token, {a.tokens / whole:.1f} tok/s", flush=True)

        def turn(name):
            nonlocal conversation, answer, failed
            conversation = conversation + answer + ids(a.new)
            seconds, n_cached, answer = server.ask(conversation)
            failed |= seconds >= a.limit / 100 * whole or n_cached < a.tokens
            print(f"{name}: {seconds * 1e3:.0f} ms = {seconds / whole * 100:.2f} % ({len(conversation)} tokens, {n_cached} of them kept)", flush=True)

        turn("second turn")
        other, _, _ = server.ask(ids(256))
        print(f"another client, 256 tokens: {other * 1e3:.0f} ms")
        turn("turn after another client spoke")
        took, code = server.stop()
        size = sum(f.stat().st_size for f in pathlib.Path(folder, "cache").iterdir())
        print(f"server ended after {took:.2f} s, code {code}; {size / 2**20:.1f} MiB kept = {size / len(conversation) / 1024:.2f} KiB per token", flush=True)
        server = Server(a.model, *options)
        server.ask(ids(8), 1)  # the model's pages are there
        turn("turn after a restart")
        server.stop()
        if a.compare:
            server = Server(a.model, "--ctx", str(a.tokens + 10 * a.new), *a.serve_args.split())
            same = server.ask(conversation)[2] == answer
            failed |= not same
            print(f"tokens after the restart are those of a server that has kept nothing: {same}")
            server.stop()
    sys.exit(1 if failed or code != 0 else 0)


main()
