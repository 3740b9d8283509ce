#!/usr/bin/env python3
"""Load on `duet serve`: streaming clients for some time, each text compared with the same request alone.

serve_load.py MODEL [--clients 64] [--seconds 600] [--tokens 64] [--sweep] [--serve-args "--parallel 8"] [--peer "COMMAND"]
Prints tok/s, time to first token (p50, p99), errors, texts that differ, memory of the server after warm-up
and at the end. Exit code 1 on any error or difference. "without start and end": of the last two thirds of the time, in which all
clients were busy. With --sweep: tok/s at 1, 8 and 32 clients; with --peer as well
for another server, begun anew for each number, first or second in turns; {clients} and {port} in its command are
replaced, e.g. --peer "llama-server -m MODEL --port {port} -np {clients} -c 16384 -t 2".
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
WORDS = "the package manager installs a program from its source and checks what it needs before anything is changed on disk".split()


def prompt_of(i):
    words = random.Random(i)
    return f"{i}: " + " ".join(words.choice(WORDS) for _ in range(12 + i % 40))


def stream(url, i, n_tokens, stamps=None):
    """The text of a greedy completion; stamps gets the time of each event."""
    host = urllib.parse.urlparse(url).netloc
    connection = http.client.HTTPConnection(host, timeout=300)
    body = {"prompt": prompt_of(i), "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read(200)}")
    text = ""
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(event["error"])
        if stamps is not None:
            stamps.append(time.monotonic())
        text += event["choices"][0]["text"]
    connection.close()
    return text


class Load:
    def __init__(self, url, n_prompts, n_tokens):
        self.url, self.n_prompts, self.n_tokens = url, n_prompts, n_tokens
        self.lock = threading.Lock()
        self.first, self.n_done, self.errors, self.texts, self.streams = [], 0, [], {}, []

    def client(self, number, until):
        i = number
        while time.monotonic() < until:
            begin, stamps = time.monotonic(), []
            try:
                text = stream(self.url, i % self.n_prompts, self.n_tokens, stamps)
                with self.lock:
                    self.first.append(stamps[0] - begin)
                    self.streams.append(stamps)
                    self.n_done += 1
                    self.texts.setdefault(i % self.n_prompts, set()).add(text)
            except Exception as e:  # every failure counts
                with self.lock:
                    self.errors.append(repr(e))
            i += 7

    def tokens_between(self, begin, end):
        """Events may hold several tokens: of each stream the share of its events."""
        return sum(self.n_tokens * sum(begin <= at < end for at in stamps) / len(stamps) for stamps in self.streams)

    def run(self, n_clients, seconds):
        begin = time.monotonic()
        threads = [threading.Thread(target=self.client, args=(n, begin + seconds)) for n in range(n_clients)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        took = time.monotonic() - begin
        steady = self.tokens_between(begin + seconds / 3, begin + seconds) / (seconds * 2 / 3)
        first = sorted(self.first) or [0]
        print(f"{n_clients} clients: {self.n_done} streams in {took:.1f} s, {self.n_done * self.n_tokens / took:.1f} tok/s (without start and end {steady:.1f}), "
              f"first token p50 {first[len(first) // 2] * 1e3:.0f} ms, p99 {first[len(first) * 99 // 100] * 1e3:.0f} ms, {len(self.errors)} errors", flush=True)


def wait_until_up(url):
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection(urllib.parse.urlparse(url).netloc, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.2)
    sys.exit(f"error: nothing healthy at {url}")


class Server:
    """A server process; stop() says whether it ended well."""
    def __init__(self, command, url=None):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE if url is None else subprocess.DEVNULL,
                                        stderr=None if url is None else subprocess.DEVNULL, text=True)
        try:
            self.url = url or re.search(r"http://[\d.:]+", self.process.stdout.readline()).group(0)
            wait_until_up(self.url)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    @classmethod
    def duet(cls, a):
        return cls([DUET, "serve", a.model, "--port", "0", *a.serve_args.split()])

    @classmethod
    def peer(cls, a, n_clients):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return cls(a.peer.format(clients=n_clients, port=port).split(), f"http://127.0.0.1:{port}")

    def stop(self):
        self.process.terminate()
        return self.process.wait(60) == 0


def sweep(a):
    """Whether all went well."""
    good = True
    for turn, n in enumerate((1, 8, 32)):
        for ours in [True] if not a.peer else [True, False] if turn % 2 == 0 else [False, True]:
            server = Server.duet(a) if ours else Server.peer(a, n)
            try:
                print("duet: " if ours else "peer: ", end="")
                load = Load(server.url, 1000, a.tokens)
                load.run(n, a.seconds)
                good &= not load.errors
            finally:
                good &= server.stop() or not ours
    return good


def soak(a):
    """Whether all went well."""
    server = Server.duet(a)
    try:
        n_prompts = 100
        Load(server.url, n_prompts, a.tokens).run(a.clients, min(a.seconds / 5, 30))
        before = rss(server.process.pid)
        load = Load(server.url, n_prompts, a.tokens)
        load.run(a.clients, a.seconds)
        after = rss(server.process.pid)
        different = [i for i, texts in load.texts.items() if texts != {stream(server.url, i, a.tokens)}]
        print(f"memory {before:.0f} MiB after warm-up, {after:.0f} MiB at the end; {len(different)} of {len(load.texts)} texts differ from the same request alone")
        print("\n".join(load.errors[:5]))
        good = not load.errors and not different and after <= before * 1.05 + 8
    finally:
        stopped = server.stop()
    return good and stopped


def rss(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text()).group(1)) / 1024


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--seconds", type=float, default=600)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--sweep", action="store_true")
    p.add_argument("--serve-args", default="", help="more options of duet serve")
    p.add_argument("--peer", default="", help="command of another server, for --sweep")
    a = p.parse_args()
    if a.peer and not a.sweep:
        p.error("--peer goes with --sweep")
    sys.exit(0 if (sweep(a) if a.sweep else soak(a)) else 1)


main()
