#!/usr/bin/env python3
"""`duet chat` in tmux, on the demo model: keys are sent, the captured screen is judged. By hand, or `scripts/test --terminal`.

Needs tmux. Environment: DUET = the duet binary. Exit 0 pass, 1 fail, 77 cannot run here."""
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

if not shutil.which("tmux"):
    print("SKIP: tmux is not installed")
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
SOCKET = f"duet-chat-{os.getpid()}"
failures = 0


def check(name, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'PASS' if ok else 'FAIL'} {name}{'' if ok else ': ' + str(detail)}", flush=True)


def tmux(*args):
    return subprocess.run(["tmux", "-L", SOCKET, "-f", "/dev/null", *args], check=True, capture_output=True, text=True).stdout


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while True:
        value = condition()
        if value or time.time() > end:
            return value
        time.sleep(0.05)


def keys(*names):
    tmux("send-keys", "-t", "chat", *names)


def typed(text):
    tmux("send-keys", "-t", "chat", "-l", text)


def screen(back=0):
    """Rows as they stand; `back` rows of what has scrolled away too."""
    return tmux("capture-pane", "-p", "-t", "chat", *(["-S", str(-back)] if back else [])).rstrip("\n").split("\n")


def joined():
    """Lines, those that the terminal has wrapped put together."""
    return tmux("capture-pane", "-p", "-J", "-t", "chat", "-S", "-400").rstrip("\n").split("\n")


def last_line():
    return screen()[-1]


def at_prompt():
    return last_line().rstrip() == ">>>"


def resize(columns, rows=24):
    tmux("resize-window", "-t", "chat", "-x", str(columns), "-y", str(rows))
    time.sleep(0.6)


def edited():
    """What stands from the last `>>> ` on, rows put together."""
    rows = screen()
    starts = [i for i, row in enumerate(rows) if row.startswith(">>> ")]
    width = int(tmux("display", "-p", "-t", "chat", "#{window_width}"))
    return "".join(row.ljust(width) for row in rows[starts[-1]:]).rstrip() if starts else None


def copies():
    return sum(r.count("word00") for r in screen(400))


def picture():
    return "\n".join([""] + screen())


LONG = " ".join(f"word{i:02d}" for i in range(24))  # 167 columns


def main(folder):
    saved, model = os.path.join(folder, "saved.json"), os.path.join(folder, "demo.gguf")
    subprocess.run([DUET, "convert", str(ROOT / "models/demo"), "-q", "Q4_K_M", "-o", model], check=True, capture_output=True)
    command = f"trap : INT; {shlex.quote(DUET)} chat {shlex.quote(model)} --template chatml --ctx 4096 --ignore-eos --temp 0 -n 3900; echo left with $?; sleep 1000"
    environment = [f"-eXDG_STATE_HOME={folder}/state", f"-eXDG_CONFIG_HOME={folder}/config", "-eLC_ALL=C.UTF-8"]
    tmux("new-session", "-d", "-s", "chat", "-x", "80", "-y", "24", *environment, "sh", "-c", command)
    check("the prompt comes", wait_for(at_prompt), picture())

    # Ctrl-C while an answer is written
    typed("Tell me a long story about packages.")
    keys("Enter")
    rows = lambda: [r for r in screen(400) if r]
    started = wait_for(lambda: len(rows()) > 4 and not at_prompt() and not last_line().startswith(">>>"))
    keys("C-c")
    begin = time.time()
    back = wait_for(at_prompt, 20)
    check("Ctrl-C stops the answer, the prompt comes back", started and back, picture())
    print(f"     after {time.time() - begin:.2f} s")
    stats = [r for r in joined() if re.search(r"tok/s", r)]
    count = re.search(r"(\d+) tok", stats[-1]) if stats else None
    check("before it came to its end", count and 0 < int(count.group(1)) < 3900 and "stop: interrupted" in stats[-1], stats)
    print("    ", stats[-1] if stats else "")
    check("and not the program", not any("left with" in r for r in screen(400)))

    # Several lines; how they were taken is read from the saved conversation
    typed("/set n-predict 12")
    keys("Enter")
    wait_for(at_prompt)
    keys("C-l")
    wait_for(lambda: len(screen()) == 1 and at_prompt())
    typed('"""first line')
    keys("Enter")
    check('after """ the prompt is another', wait_for(lambda: last_line().rstrip() == "...", 10), picture())
    for line in ("", "/exit is no command here"):
        typed(line) if line else None
        keys("Enter")
        time.sleep(0.2)
    check("lines in it are not obeyed", last_line().rstrip() == "..." and not any("left with" in r for r in screen()), picture())
    typed('the last"""')
    keys("Enter")
    check("the answer to several lines comes", wait_for(lambda: at_prompt() and any("12 tok" in r for r in screen())), picture())
    typed("/save " + saved)
    keys("Enter")
    wait_for(lambda: os.path.exists(saved) and at_prompt())
    messages = json.load(open(saved))["messages"]
    check("both turns are kept, the lines as typed", [m["role"] for m in messages] == ["user", "assistant"] * 2 and messages[2]["content"] == "first line\n\n/exit is no command here\nthe last", messages)
    check("the stopped answer too", len(messages[1]["content"]) > 0)

    # A long line and another width; the prompt in the middle of the screen, then in its last row
    for place in ("middle", "bottom"):
        keys("C-l")
        wait_for(lambda: at_prompt() and len(screen()) == 1)
        for _ in range(2 if place == "middle" else 6):
            typed("/help")
            keys("Enter")
            time.sleep(0.1)
        wait_for(at_prompt)
        typed(LONG)
        check(f"{place}: a long line wraps", wait_for(lambda: edited() == ">>> " + LONG, 10), picture())
        for width in (50, 40, 100, 64, 80):
            resize(width)
            check(f"{place}: {width} columns: redrawn, once", edited() == ">>> " + LONG and copies() == 1, picture())
        keys("C-u") if place == "middle" else None
    resize(50)
    keys("C-a")
    typed("First ")
    check("Ctrl-A and text at the start", wait_for(lambda: edited() == ">>> First " + LONG, 10), picture())
    resize(80)
    check("80 columns, cursor near the start: redrawn, once", edited() == ">>> First " + LONG and copies() == 1, picture())
    keys("C-e")
    typed(" last.")
    check("Ctrl-E and text at the end", wait_for(lambda: edited() == f">>> First {LONG} last.", 10), picture())
    keys("Enter")
    wait_for(lambda: at_prompt() and any("12 tok" in r for r in screen()))
    typed("/save " + saved + "2")
    keys("Enter")
    wait_for(lambda: os.path.exists(saved + "2") and at_prompt())
    check("the line is sent as it was shown", json.load(open(saved + "2"))["messages"][-2]["content"] == f"First {LONG} last.")

    resized_corners()

    # Leaving
    typed("half a line")
    keys("C-c")
    check("Ctrl-C at the prompt drops the line", wait_for(lambda: at_prompt() and any("Ctrl-C again" in r for r in screen()), 10), picture())
    keys("C-d")
    check("Ctrl-D leaves with 0", wait_for(lambda: any("left with 0" in r for r in screen()), 20), picture())


def resized_corners():
    """Each case with the prompt below other text; and as the first row, after Ctrl-L. What tmux moves into its history when it narrows is not counted."""
    middle = ("C-a",) + ("C-f",) * 83
    cases = (("as long as the window", "x" * 72, 80, 50, ()), ("twice as long as the new window", "a" * 92, 80, 50, ()), ("one less", "b" * 91, 80, 50, ()), ("one more", "c" * 93, 80, 50, ()),
             ("cursor in the middle", LONG, 80, 50, middle), ("cursor in the middle, wider", LONG, 50, 90, middle), ("cursor at the start", LONG, 80, 50, ("C-a",)), ("cursor at the start, wider", LONG, 50, 90, ("C-a",)),
             ("wide characters", "日本語" * 20, 80, 45, ()), ("wide characters, wider", "日本語" * 20, 45, 80, ()), ("accents", "é" * 120, 80, 50, ()), ("wide characters, odd columns", "a" + "日本語" * 40, 81, 33, ()))
    n = 0
    for place in ("below", "top"):
        for name, text, width_before, width, move in cases:
            n += 1
            mark = f"q{n:02d} "
            keys("C-e", "C-u")
            resize(width_before)
            keys("C-l")
            wait_for(lambda: at_prompt() and len(screen()) == 1, 5)
            if place == "below":
                typed("/set n-predict 12")
                keys("Enter")
                time.sleep(0.3)
            typed(mark + text)
            time.sleep(0.5)
            keys(*move) if move else None
            time.sleep(0.4)
            before = screen()
            resize(width)
            rows = screen()
            shown = "".join(rows[max(i for i, row in enumerate(rows) if row.startswith(">>> ")):]).replace(" ", "")
            check(f"{place}: {name}: as it was", shown == (">>>" + mark + text).replace(" ", ""), "\n" + "\n".join(before) + "\n-- then" + picture())
    keys("C-e", "C-u")
    resize(80)
    keys("C-l")
    time.sleep(0.3)


with tempfile.TemporaryDirectory() as folder:
    try:
        main(folder)
    finally:
        subprocess.run(["tmux", "-L", SOCKET, "kill-server"], capture_output=True)
print(f"{failures} failed")
sys.exit(1 if failures else 0)
