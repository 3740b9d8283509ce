#!/usr/bin/env python3
"""The web page of `duet serve` in headless Chromium, on the demo model. By hand, or `scripts/test --page`.

Needs the PyPI package selenium and Debian's chromium and chromium-driver; nothing is downloaded. SCREENSHOTS
names a folder for pictures to be looked at; CHROMIUM and CHROMEDRIVER other programs."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

try:
    from selenium import webdriver
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError as e:
    print(f"SKIP: {e}")
    sys.exit(77)

CHROMIUM = os.environ.get("CHROMIUM", shutil.which("chromium"))
DRIVER = os.environ.get("CHROMEDRIVER", shutil.which("chromedriver"))
if not CHROMIUM or not DRIVER:
    print("SKIP: chromium and chromium-driver are not installed")
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUET = os.environ.get("DUET", str(ROOT / "build/release/duet"))
PICTURES = os.environ.get("SCREENSHOTS")
failures = 0


def check(name, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'PASS' if ok else 'FAIL'} {name}{'' if ok else ': ' + str(detail)}", flush=True)


def wait_for(condition, seconds=30):
    """The first true value of condition(), or its last value."""
    end = time.time() + seconds
    while True:
        try:
            value = condition()
        except (NoSuchElementException, StaleElementReferenceException):
            value = None
        if value or time.time() > end:
            return value
        time.sleep(0.05)


class Server:
    def __init__(self, model, *extra):
        self.process = subprocess.Popen([DUET, "serve", model, "--port", "0", "--ctx", "2048", *extra], stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "XDG_CONFIG_HOME": tempfile.gettempdir() + "/none"})
        line = self.process.stdout.readline()
        self.url = re.search(r"http://[\d.:]+", line).group(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


class Page:
    def __init__(self, url, profile, width=1280, height=860, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking",
                         f"--user-data-dir={profile}", f"--window-size={width},{height}", *(["--force-dark-mode"] if dark else [])):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.resize(width, height)
        self.driver.get(url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.driver.quit()

    def resize(self, width, height):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})

    def prefer(self, scheme):
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def ready(self):
        return wait_for(lambda: self.one("#model").text != "")

    def busy(self):
        return self.one("#stop").is_displayed()

    def send(self, text, wait=True):
        self.one("#message").send_keys(text.replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL), Keys.ENTER)
        if wait:
            self.idle()

    def idle(self):
        return wait_for(lambda: not self.busy() and self.one("#send").is_displayed(), 60)

    def answers(self):
        return [e.text for e in self.all(".message.assistant .body")]

    def questions(self):
        return [e.text for e in self.all(".message.user .body")]

    def stats(self):
        return self.all(".message.assistant .stats")[-1].text

    def set(self, **fields):
        self.one("#open-settings").click()
        wait_for(lambda: self.one("#settings").is_displayed())
        for name, value in fields.items():
            field = self.one(f"#set-{name}")
            field.clear()
            field.send_keys(str(value))
        self.one('#settings button[value="save"]').click()
        return wait_for(lambda: not self.one("#settings").is_displayed(), 3)

    def picture(self, name):
        if PICTURES:
            pathlib.Path(PICTURES).mkdir(parents=True, exist_ok=True)
            time.sleep(0.6)
            self.driver.save_screenshot(f"{PICTURES}/{name}.png")

    def errors(self):
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]


def put_conversation(page, messages, title="A conversation"):
    """Stored as the page stores it, then shown."""
    versions = lambda m: [{"text": m[1], **(m[2] if len(m) > 2 else {})}]
    stored = {"id": "made", "title": title, "updated": int(time.time() * 1000), "system": "", "messages": [{"role": m[0], "versions": versions(m), "at": 0} for m in messages]}
    page.js("""localStorage.setItem('duet.conversation.made', arguments[0]);
               const list = JSON.parse(localStorage.getItem('duet.conversations') ?? '[]').filter(c => c.id !== 'made');
               localStorage.setItem('duet.conversations', JSON.stringify([{id: 'made', title: arguments[1], updated: Date.now()}, ...list]));
               sessionStorage.setItem('duet.current', 'made');""", json.dumps(stored), title)
    page.driver.refresh()
    page.ready()


# ---- what it does ------------------------------------------------------------------------------

def check_chat(page):
    check("the page opens on an empty conversation, with the box focused", page.ready() and page.one("#empty").is_displayed() and page.js("return document.activeElement.id") == "message")
    page.set(temperature=0, max_tokens=24)
    page.send("How do I install a package?")
    check("an answer comes", len(page.answers()) == 1 and len(page.answers()[0]) > 0, page.answers())
    check("it says how many tokens and how fast", re.search(r"\b24 tokens · [\d.]+ tok/s", page.stats()) and "cut off at the limit" in page.stats(), page.stats())
    check("the box is empty and focused again", page.one("#message").get_attribute("value") == "" and page.js("return document.activeElement.id") == "message")
    stored = page.js("return JSON.parse(localStorage.getItem('duet.conversation.' + sessionStorage.getItem('duet.current'))).messages[1].versions[0].text")
    spoken = page.one("#live").get_attribute("textContent")
    check("screen readers are told", spoken == "Answer: " + stored, (spoken, stored))
    first = page.answers()[0]
    page.send("And how do I remove\nit again?")
    check("a second turn, of two lines", page.questions()[1] == "And how do I remove\nit again?" and len(page.answers()) == 2)
    page.driver.refresh()
    page.ready()
    check("reload keeps the conversation", page.answers()[:1] == [first] and len(page.questions()) == 2)
    check("and the settings", page.js("return JSON.parse(localStorage.getItem('duet.settings')).max_tokens") == 24)
    return first


def check_regenerate(page):
    before = page.answers()[-1]
    page.set(temperature=1.5)
    page.all('[data-action="again"]')[-1].click()
    page.idle()
    check("answering again keeps both answers", page.one(".versions").text.replace("\n", " ") == "2 of 2" and len(page.answers()) == 2, page.one(".versions").text)
    after = page.answers()[-1]
    page.one('[data-action="before"]').click()
    check("the one before can be seen", page.answers()[-1] == before and before != after, (before, after))
    page.set(temperature=0)


def check_edit(page, first):
    page.all('.message.user [data-action="edit"]')[0].click()
    area = page.one(".edit textarea")
    check("an edited message starts with its text", area.get_attribute("value") == "How do I install a package?")
    area.clear()
    area.send_keys("Which files are configuration?", Keys.CONTROL, Keys.ENTER)
    page.idle()
    check("editing a message asks again from there", page.questions() == ["Which files are configuration?"] and len(page.answers()) == 1 and page.answers()[0] != first, page.questions())
    page.one('.message.assistant [data-action="edit"]').click()
    area = page.one(".edit textarea")
    area.clear()
    area.send_keys("Those in **/etc**.")
    page.one('.edit button[type="submit"]').click()
    check("an answer can be edited", page.answers() == ["Those in /etc."] and page.one(".message.assistant .body strong").text == "/etc" and "edited" in page.stats())
    page.one('.message.user [data-action="edit"]').click()
    page.one(".edit textarea").send_keys("nonsense", Keys.ESCAPE)
    check("Escape leaves a message as it was", page.questions() == ["Which files are configuration?"])


def check_settings(page):
    page.set(temperature=0, max_tokens=5, seed=7)
    page.one("#new-chat").click()
    page.send("Count to ten.")
    check("the limit of tokens takes effect", page.stats().startswith("5 tokens"), page.stats())
    page.one("#new-chat").click()
    page.set(temperature=1, max_tokens=16, seed=7)
    page.send("Say something.")
    one = page.answers()[0]
    page.one('[data-action="again"]').click()
    page.idle()
    check("a seed gives the same answer again", page.answers() == [one], (page.answers(), one))
    page.one("#new-chat").click()
    page.set(temperature=0, seed="", system="Answer in one word, always, whatever is asked.")
    page.js("window.asked = null; const f = window.fetch; window.fetch = (u, o) => { if (o?.body) window.asked = JSON.parse(o.body); return f(u, o); };")
    page.send("Hello")
    asked = page.js("return window.asked")
    check("the system prompt is sent", asked["messages"][0] == {"role": "system", "content": "Answer in one word, always, whatever is asked."}, asked)
    check("so is the sampling", asked["temperature"] == 0 and asked["max_tokens"] == 16 and "seed" not in asked and asked["stream"] is True, asked)
    page.one("#open-settings").click()
    wait_for(lambda: page.one("#settings").is_displayed())
    page.one("#set-top_p").send_keys("7")
    page.one('#settings button[value="save"]').click()
    check("what is out of bounds is refused", page.one("#settings").is_displayed() and "Top p" in page.one("#sampling-wrong").text)
    page.one("#settings").send_keys(Keys.ESCAPE)
    wait_for(lambda: not page.one("#settings").is_displayed())
    page.set(system="", top_p="", max_tokens=24)


def check_stop(page, server):
    page.one("#new-chat").click()
    page.set(max_tokens=1500, temperature=1.2)
    grew = []
    # The demo model would end by itself.
    page.js("""const send = window.fetch; window.fetch = (u, o) => send(u, o?.body ? {...o, body: JSON.stringify({...JSON.parse(o.body), ignore_eos: true})} : o);""")
    for way in ("button", "Escape"):
        page.send("Tell me a very long story about packages.", wait=False)
        started = wait_for(lambda: page.answers() and len(page.answers()[-1]) > 10, 20)
        length = len(page.answers()[-1])
        wait_for(lambda: len(page.answers()[-1]) > length, 5)
        grew.append(started and len(page.answers()[-1]) > length)
        if way == "button":
            page.one("#stop").click()
        else:
            page.one("#message").send_keys(Keys.ESCAPE)
        page.idle()
        check(f"{way} stops the answer and keeps what there is", len(page.answers()[-1]) >= length and "stopped" in page.stats(), page.stats())
        slots = lambda: json.load(urllib.request.urlopen(server.url + "/slots"))
        check(f"the server has stopped too ({way})", wait_for(lambda: not any(s["is_processing"] for s in slots()), 10))
    check("answers grow as they are written", all(grew), grew)
    page.driver.refresh()
    page.ready()
    page.set(max_tokens=24, temperature=0)


def check_conversations(page):
    n = len(page.all("#conversations .item"))
    page.one("#new-chat").click()
    page.send("A conversation of its own")
    check("a new conversation is listed first", len(page.all("#conversations .item")) == n + 1 and page.one("#conversations .item .open").text == "A conversation of its own")
    page.all("#conversations .item .open")[1].click()
    check("another can be opened", page.questions() != ["A conversation of its own"] and len(page.questions()) > 0)
    page.driver.refresh()
    page.ready()
    check("reload stays in it", page.questions() != ["A conversation of its own"] and len(page.questions()) > 0)
    page.one("#conversations .item .delete").click()
    wait_for(lambda: page.one("#confirm").is_displayed())
    page.one("#confirm-yes").click()
    check("one can be deleted", wait_for(lambda: len(page.all("#conversations .item")) == n) and "A conversation of its own" not in page.one("#conversations").text)


HOSTILE = [
    "<img src=x onerror=\"window.hacked=1\">", "<script>window.hacked=1</script>", "[x](javascript:window.hacked=1)", "[x](JaVaScRiPt:window.hacked=1)",
    "![x](https://evil.example/x.png)", "<a href=\"javascript:window.hacked=1\">x</a>", "```html\n<script>window.hacked=1</script>\n```", "`<svg onload=window.hacked=1>`",
    "| <img src=x onerror=window.hacked=1> | b |\n|---|---|\n| <iframe srcdoc='<script>parent.hacked=1</script>'> | c |", "<javascript:window.hacked=1>",
    "# <b onclick=window.hacked=1>h</b>", "> <style>body{display:none}</style>", "[x](data:text/html,<script>window.hacked=1</script>)", "[x](https://example.org/\" onmouseover=\"window.hacked=1)",
    "- <input autofocus onfocus=window.hacked=1>", "**<math><mtext></mtext></math>**", "```<img src=x onerror=window.hacked=1>\nx\n```",
]


def check_hostile(page):
    text = "\n\n".join(HOSTILE)
    put_conversation(page, [("user", text), ("assistant", text)], title=HOSTILE[0])
    time.sleep(0.3)
    check("nothing in messages runs", page.js("return window.hacked") is None)
    check("nothing in messages becomes an element", page.js("""return document.querySelectorAll('.messages script, .messages img, .messages iframe, .messages style, .messages math, .messages b, '
          + '.messages svg[onload], .messages [onerror], .messages [onclick], .messages [onfocus], .messages [onmouseover], .messages input:not([type=checkbox])').length""") == 0)
    links = page.js("return [...document.querySelectorAll('.messages a')].map(a => a.protocol)")
    check("links lead to the web only", set(links) <= {"https:", "http:", "mailto:"}, links)
    check("the user's text is shown as it is", page.js("return document.querySelector('.message.user .body').textContent") == text)
    check("the policy lets no inline script run", page.js("""const s = document.createElement('script'); s.textContent = 'window.hacked = 2'; document.body.append(s); return window.hacked""") is None)
    page.send("<img src=x onerror=window.hacked=3> what is this?")
    check("nor what is typed", page.js("return window.hacked") is None and page.questions()[-1].startswith("<img src=x"))
    page.js("localStorage.setItem('duet.conversations', '{\"broken\":'); localStorage.setItem('duet.settings', '[1'); localStorage.setItem('duet.conversation.made', '{\"id\":\"made\",\"messages\":[null,{\"role\":\"user\"}]}')")
    page.driver.refresh()
    check("damaged storage is no obstacle", page.ready() and page.one("#empty").is_displayed())
    page.js("localStorage.clear()")
    page.driver.get_log("browser")  # what the policy has refused


MARKDOWN = """Here is **how to install** a package, with *some* `inline code`, a [link](https://www.debian.org/doc/) and https://example.org/a_b_c.

## Steps

1. Update the list of packages:
   ```bash
   # as root
   apt-get update && apt-get install -y "hello"
   ```
2. Look at what it brought
   - the program `hello`
   - its manual
3. Done

> The first rule is to read the manual.
> It helps.

| Package | Size | Section |
|:--------|-----:|---------|
| hello   | 56 KiB | devel |
| hello-traditional | 32 KiB | devel |

```python
def greet(name: str, times: int = 2) -> str:
    \"\"\"Says hello.\"\"\"
    return "\\n".join(f"Hello, {name}!" for _ in range(times))  # polite
```

---

- [x] installed
- [ ] understood snake_case_names and 2 * 3 * 4
"""


def check_markdown(page):
    put_conversation(page, [("user", "How do I install a package, and what does that do?"), ("assistant", MARKDOWN, {"stats": {"tokens": 212, "rate": 6.13, "promptTokens": 30, "promptRate": 41.2, "hitRate": 0.934, "reason": "stop"}})],
                     title="How do I install a package?")
    count = lambda selector: len(page.all(".message.assistant .body " + selector))
    found = {s: count(s) for s in ("> p", "strong", "em", "h4", "ol > li", "ol ul > li", "figure.code", "blockquote", "table", "tbody tr", "hr", "li.task", "a")}
    wanted = {"> p": 1, "strong": 1, "em": 1, "h4": 1, "ol > li": 3, "ol ul > li": 2, "figure.code": 2, "blockquote": 1, "table": 1, "tbody tr": 2, "hr": 1, "li.task": 2, "a": 2}
    check("markdown becomes structure", found == wanted, (found, wanted))
    check("code keeps its lines", page.js("return document.querySelector('ol figure code').textContent") == '# as root\napt-get update && apt-get install -y "hello"')
    check("and has colours", count(".hl-k") > 2 and count(".hl-s") > 2 and count(".hl-c") > 1)
    check("names with underscores stay", "snake_case_names and 2 * 3 * 4" in page.answers()[0])
    check("the hit rate is shown", page.stats() == "212 tokens · 6.1 tok/s · prompt 41.2 tok/s · experts 93 % in memory", page.stats())


def check_streaming_markdown(page):
    """Text that grows piece by piece ends up as the same nodes as text rendered at once."""
    same = page.driver.execute_async_script("""
      const done = arguments[1], text = arguments[0];
      import('/page/markdown.js').then(({renderInto}) => {
        const whole = document.createElement('div'), grown = document.createElement('div');
        renderInto(whole, text);
        for (let i = 1; i <= text.length; i += 3) renderInto(grown, text.slice(0, i));
        renderInto(grown, text);
        const start = performance.now(), long = document.createElement('div');
        for (const nasty of ['*'.repeat(20000), '[('.repeat(10000), '`'.repeat(20000) + 'a', '**a '.repeat(5000), '> '.repeat(3000) + 'a', '- '.repeat(3000), '_a'.repeat(9000), 'https://' + 'a.'.repeat(9000), '|'.repeat(9000) + '\\n|-'])
          renderInto(long, nasty);
        done([whole.innerHTML === grown.innerHTML, performance.now() - start]);
      });""", MARKDOWN)
    check("grown text is the same as whole text", same[0])
    check("hostile markdown takes no long time", same[1] < 3000, same[1])


def check_router(page):
    if not page.one("#router").is_displayed():
        page.one("#toggle-router").click()
    check("the router has a cell for each expert of each layer", wait_for(lambda: len(page.all("#router-grid .cell")) > 0) and len(page.all("#router-grid .cell")) == 8 * len(page.all("#router-grid .label")))
    page.send("Which packages are installed?")
    check("cells light up for the last token: two a layer", wait_for(lambda: len(page.all("#router-grid .last")) == 2 * len(page.all("#router-grid .label"))), len(page.all("#router-grid .last")))
    label = page.one("#router-grid").get_attribute("aria-label")
    check("it is said in words too", wait_for(lambda: "expert 8" in page.one("#router-grid").get_attribute("aria-label")), label)


def check_accessible(page):
    unnamed = page.js("""return [...document.querySelectorAll('button, input, textarea')].filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 80))""")
    check("every control has a name", unnamed == [], unnamed)
    check("ids are unique, regions named", page.js("const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length === new Set(ids).size && !!document.querySelector('nav[aria-label], main')"))
    contrast = page.driver.execute_script("""
      const lum = c => { const v = c.match(/[\\d.]+/g).slice(0,3).map(x => { x /= 255; return x <= .04045 ? x/12.92 : ((x+.055)/1.055)**2.4; }); return .2126*v[0]+.7152*v[1]+.0722*v[2]; };
      const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)|transparent/.test(c)) return c; } return 'rgb(255,255,255)'; };
      const bad = [];
      for (const e of document.querySelectorAll('p, span, li, button, h1, h2, label, td, th, small, figcaption, code, a')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility() || e.closest('.hidden, .skip')) continue;
        const a = lum(getComputedStyle(e).color), b = lum(back(e)), ratio = (Math.max(a,b)+.05)/(Math.min(a,b)+.05);
        if (ratio < 4.5 && !e.disabled) bad.push(e.className + ' ' + e.textContent.slice(0,30) + ' ' + ratio.toFixed(2));
      }
      return bad;""")
    return contrast


def check_keyboard(page):
    page.one("#new-chat").click()
    page.one("#message").send_keys(Keys.SHIFT, Keys.TAB)
    seen = []
    page.js("document.body.focus(); document.activeElement.blur()")
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(page.js("const e = document.activeElement; return e.id || e.getAttribute('name') || e.dataset.action || e.className"))
    reached = {"new-chat", "theme", "open-settings", "toggle-router", "message"}
    check("all of the frame can be reached with the keyboard", reached <= set(seen), reached - set(seen))
    outline = page.js("const b = document.getElementById('new-chat'); b.focus(); return getComputedStyle(b).outlineStyle")
    check("focus can be seen", outline == "solid", outline)


def check_key(profile, model):
    with Server(model, "--template", "chatml", "--api-key", "open sesame") as server, Page(server.url, profile) as page:
        check("with --api-key the page asks for it", wait_for(lambda: page.one("#key-dialog").is_displayed()))
        page.picture("key")
        page.one("#key").send_keys("wrong", Keys.ENTER)
        check("a wrong key is asked again", wait_for(lambda: page.one("#key-title").text == "The key is wrong"))
        page.one("#key").send_keys("open sesame", Keys.ENTER)
        check("the right one opens", page.ready())
        page.set(max_tokens=6, temperature=0)
        page.send("Hello")
        check("and answers come", len(page.answers()) == 1 and page.stats().startswith("6 tokens"), page.answers())
        page.driver.refresh()
        check("reload keeps it in this tab", page.ready())
        check("it is not stored for longer unasked", page.js("return localStorage.getItem('duet.key')") is None)


def check_server_gone(profile, model):
    with Page("about:blank", profile) as page:
        with Server(model, "--template", "chatml") as server:
            page.driver.get(server.url)
            page.ready()
        page.send("Is anybody there?")
        check("a server that is gone is said so", wait_for(lambda: "does not answer" in page.one(".failed").text), page.all(".failed"))
        check("with a way to try again", page.one('.failed [data-action="again"]').text == "Try again")
        page.picture("gone")


def check_streamed(profile, model):
    with Server(model, "--template", "chatml", "--slots", "3") as server, Page(server.url, profile) as page:
        page.ready()
        page.set(max_tokens=40, temperature=0.8, seed=3)
        page.one("#toggle-router").click()
        page.send("How do I install a package from the command line?")
        check("the hit rate of streamed experts is shown", re.search(r"experts \d+ % in memory", page.stats()), page.stats())
        held = wait_for(lambda: len(page.all("#router-grid .cell:not(.absent)")) == 3 * len(page.all("#router-grid .label")))
        check("cells show what is in memory", held, len(page.all("#router-grid .cell:not(.absent)")))
        page.picture("streamed")


def looks(page):
    """Pictures, and contrast in both colours."""
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        bad = check_accessible(page)
        check(f"text has contrast in {scheme} colours", bad == [], bad)
        page.picture(scheme)
    page.prefer("light")
    page.one('input[name="theme"][value="dark"]').find_element(By.XPATH, "./..").click()
    check("the switch makes it dark whatever the system says", page.js("return document.documentElement.dataset.theme") == "dark")
    page.one('input[name="theme"][value="auto"]').find_element(By.XPATH, "./..").click()
    page.one("#open-settings").click()
    page.picture("settings")
    page.one("#settings").send_keys(Keys.ESCAPE)
    page.one("#close-router").click()
    page.resize(390, 800)
    check("made narrow at its end it stays there", wait_for(lambda: page.js("const s = document.getElementById('scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight") < 2))
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        page.picture("phone-" + scheme)
    page.prefer("light")
    wide = page.js("return document.documentElement.scrollWidth")
    check("nothing is wider than a phone", wide <= 390, wide)
    page.one("#open-sidebar").click()
    check("the list opens over the page", wait_for(lambda: page.one("#new-chat").is_displayed()))
    page.picture("phone-list")
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.one("#toggle-router").click()
    check("the router lies over the rest of a phone's page", page.one("#scrim").is_displayed())
    page.picture("phone-router")
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    check("Escape closes it", wait_for(lambda: not page.one("#router").is_displayed() and not page.one("#scrim").is_displayed()))
    page.resize(1280, 860)


def main():
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/demo-q4_k_m.gguf"
        subprocess.run([DUET, "convert", str(ROOT / "models/demo"), "-q", "Q4_K_M", "-o", model], check=True, stderr=subprocess.DEVNULL)
        with Server(model, "--template", "chatml") as server, Page(server.url, f"{folder}/profile") as page:
            page.picture("empty") if page.ready() else None
            first = check_chat(page)
            check_regenerate(page)
            check_edit(page, first)
            check_settings(page)
            check_stop(page, server)
            check_conversations(page)
            check_keyboard(page)
            check("no errors on the console", page.errors() == [], page.errors())
            check_hostile(page)
            page.driver.refresh()
            page.ready()
            for text in ("What is a package?", "Which shells are there?", "Write a unit file for me"):
                page.one("#new-chat").click()
                page.set(max_tokens=24, temperature=0)
                page.send(text)
            check_markdown(page)
            check_streaming_markdown(page)
            check_router(page)
            looks(page)
        check_key(f"{folder}/profile2", model)
        check_server_gone(f"{folder}/profile3", model)
        check_streamed(f"{folder}/profile4", model)
    print(f"{failures} failed")
    sys.exit(1 if failures else 0)


main()
