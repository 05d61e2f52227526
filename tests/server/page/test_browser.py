"""The page in headless Chromium, on a real server: what people see while requests run, share, copy, and while the engine dies."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quire.models import embedded
from sample_models import GEMMA3, write_model
from server.browser import DOWN, ENTER, ESCAPE, MISSING, RIGHT, TAB, Browser
from server.harness import Gate, Process, http, wait_until

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

KEY = "sk-alice-0123456789"
HEAD = (
    "import os\nimport sys\n\n\nclass Server:\n    def __init__(self, host, port):\n        self.host = host\n        self.port = port\n\n"
)
STATE = "document.querySelector('#engine').dataset.state"
PIXELS = """
    const map = document.querySelector('#map'), copy = new OffscreenCanvas(map.width, map.height);
    const context = copy.getContext('2d', {willReadFrequently: true});
    context.drawImage(map, 0, 0);
    const {data} = context.getImageData(0, 0, map.width, map.height);
    const style = getComputedStyle(document.documentElement), counts = {};
    for (const kind of ['owned', 'shared', 'cached', 'free', 'mine']) {
        const hex = style.getPropertyValue('--' + kind).trim(), [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += data[i] === r && data[i + 1] === g && data[i + 2] === b;
        counts[kind] = count;
    }
    return counts;
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def server(gate: Gate) -> Iterator[Process]:
    process = Process("--kv-memory", "32MiB", "--max-num-seqs", "16", environment=gate.environment)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.stop()


@pytest.fixture
def browser(window: Browser, server: Process) -> Iterator[Browser]:
    """The page, open and connected, in the size that it has to be good at."""
    window.complaints(), window.requests()
    window.size(1280, 800)
    window.media(prefers_color_scheme="dark")
    window.open(server.url + "/")
    window.wait(f"{STATE} === 'running'", "the page shows a running engine")
    yield window
    assert not window.complaints()
    elsewhere = [url for url in window.requests() if not url.startswith((server.url + "/", "data:"))]
    assert not elsewhere, "the page asked somebody else"


@contextmanager
def load(server: Process, clients: int = 6) -> Iterator[None]:
    """Requests all the time, some with samples, of prompts that begin alike."""
    done = threading.Event()

    def ask(i: int) -> None:
        while not done.is_set():
            body = {"prompt": f"{HEAD}    # {i}\n", "n": 4 if i % 2 else 1, "max_tokens": 160 + 40 * (i % 5), "ignore_eos": True}
            assert http.post(server.url + "/v1/completions", json=body).status_code == 200

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask, i) for i in range(clients)]
        try:
            yield
        finally:
            done.set()
    for call in asked:
        call.result()


def pixels(browser: Browser) -> dict[str, int]:
    """How much of the map has which colour."""
    counts: dict[str, int] = browser.run(PIXELS)
    return counts


def keep(browser: Browser, root: Path, name: str, after: float = 0) -> None:
    """A picture for the documentation, where it is asked for."""
    if os.environ.get("QUIRE_KEEP_SCREENSHOTS"):
        time.sleep(after)
        browser.screenshot(root / "docs" / "images" / f"{name}.png")


def test_the_map_shows_what_happens(browser: Browser, server: Process, root: Path) -> None:
    before = pixels(browser)
    assert before["owned"] == before["shared"] == 0
    assert before["free"] > 0
    with load(server):
        wait_until(lambda: pixels(browser)["owned"] > 1000 and pixels(browser)["shared"] > 100, "blocks are owned and shared")
        first = browser.run("return document.querySelector('#map').toDataURL()")
        wait_until(lambda: browser.run("return document.querySelector('#map').toDataURL()") != first, "the map changes")
        browser.wait("document.querySelectorAll('.sequence').length >= 6", "sequences are listed")
        browser.wait("document.querySelector('#numbers .value').innerText.match(/[1-9]/)", "tokens/s are shown")
        assert "running" in browser.text("#queue")
        keep(browser, root, "page-dark", after=12)
        # Whoever looks at a sequence sees its blocks.
        shared = pixels(browser)

        def looked_at() -> bool:
            """Sequences end all the time, the one that is looked at too: then it is the next one's turn."""
            if browser.run("return !!document.querySelector('.sequence .table:not([hidden])')?.innerText.includes('→')"):
                return pixels(browser)["cached"] < shared["cached"] or shared["cached"] == 0
            with contextlib.suppress(AssertionError):  # it ended between being found and being clicked
                browser.click(".sequence")
            return False

        wait_until(looked_at, "the block table is shown, and other blocks are dimmed")
        browser.media(prefers_color_scheme="light")
        browser.wait("getComputedStyle(document.body).backgroundColor === 'rgb(244, 242, 236)'", "the page is light")
        wait_until(lambda: pixels(browser)["owned"] > 0, "and so is the map")
        browser.move("#map", 12, 12)
        browser.wait("!document.querySelector('#tip').hidden", "a block is described")
        assert "Block 0" in browser.text("#tip")
        keep(browser, root, "page-light")
    browser.wait("document.querySelector('#queue').innerText === '0 running'", "all of it ends")
    wait_until(lambda: (now := pixels(browser))["owned"] == now["shared"] == 0 and now["cached"] > 0, "and stays cached")


def test_fading_marks_do_not_draw_the_map_all_the_time(browser: Browser, server: Process) -> None:
    """What the page draws is taken from a server on the same machine."""
    browser.run("""
        const clear = CanvasRenderingContext2D.prototype.clearRect;
        window.drawn = 0;
        CanvasRenderingContext2D.prototype.clearRect = function (...where) { window.drawn += 1; return clear.apply(this, where); };
    """)
    with load(server):
        wait_until(lambda: pixels(browser)["owned"] > 0, "the map is drawn")
        browser.run("window.drawn = 0; window.began = performance.now()")
        time.sleep(3)
        drawn, seconds = browser.run("return [window.drawn, (performance.now() - window.began) / 1000]")
    assert 0 < drawn < 10 * seconds


def test_the_prompt_streams_and_its_blocks_are_marked(browser: Browser, root: Path) -> None:
    browser.type("#prompt-text", HEAD + "    def connect(self):\n")
    browser.type("#n", "4")
    browser.type("#max-tokens", "1200")
    browser.click("#send")
    browser.wait("document.querySelectorAll('.answer').length === 4", "a box for each sample")

    def marked() -> bool:
        now = pixels(browser)
        if browser.run("return document.querySelector('#stop').hidden"):  # it has ended before it was seen
            browser.click("#send")
        return now["shared"] > 0 and now["mine"] > 0

    wait_until(marked, "the samples' blocks are marked, and share the prompt's")
    browser.wait("document.querySelector('#stop').hidden", "the stream ends")
    timing = browser.text("#timing")
    assert "first token" in timing
    assert "tokens/s" in timing
    for i in range(1, 5):
        assert "ended by" in browser.text(f".answer:nth-child({i}) h3")
        assert len(browser.text(f".answer:nth-child({i}) pre")) > 300
    keep(browser, root, "page-prompt")

    browser.run("document.querySelector('[value=chat]').click()")
    browser.type("#n", "1")
    browser.type("#max-tokens", "1500")
    browser.click("#send")

    def stopped() -> bool:
        if browser.run("return document.querySelector('#stop').hidden"):
            if browser.text("#timing").startswith("stopped"):
                return True
            browser.click("#send")  # it has ended before it was stopped
        elif browser.run("return document.querySelector('.answer pre')?.innerText.length > 5"):
            with contextlib.suppress(AssertionError):  # it ended between being looked at and being clicked
                browser.click("#stop")
        return False

    wait_until(stopped, "a chat answers, and is stopped")
    browser.wait("document.querySelector('#queue').innerText === '0 running'", "its memory is free")

    browser.type("#n", "0")
    browser.run("document.querySelector('#prompt').noValidate = true")
    browser.type("#prompt-text", "")
    browser.run("document.querySelector('[value=completion]').click()")
    browser.click("#send")
    browser.wait("document.querySelector('#timing').classList.contains('bad')", "the server's error is shown")
    assert "prompt" in browser.text("#timing")
    assert any("400" in line for line in browser.complaints())  # Chromium logs the status; it is no error of the page


def test_what_a_model_thinks_is_shown_before_its_answer(browser: Browser) -> None:
    browser.run("""
        const deltas = [{ role: "assistant", content: "" }, { reasoning: "2 and 2 " }, { reasoning: "make 4" }];
        const usage = { prompt_tokens: 4, completion_tokens: 6, prompt_tokens_details: { cached_tokens: 0 } };
        const event = (delta) => `data: ${JSON.stringify({ id: "x", choices: [{ index: 0, delta }], usage })}\n\n`;
        const real = fetch;
        window.fetch = async () => {
            window.fetch = real;
            return new Response(new ReadableStream({
                start(stream) {
                    const send = (delta) => stream.enqueue(new TextEncoder().encode(event(delta)));
                    deltas.forEach(send);
                    window.answer = () => (send({ content: "Four." }), stream.close());
                },
            }));
        };
        document.querySelector("[value=chat]").click();
    """)
    browser.click("#send")
    browser.wait("document.querySelector('.answer .thought')?.innerText === '2 and 2 make 4'", "the thought is shown while it comes")
    browser.wait("document.querySelector('#timing').innerText.includes('first token')", "and is counted from its first token")
    browser.run("window.answer()")
    browser.wait("document.querySelector('#stop').hidden", "the stream ends")
    assert browser.text(".answer pre").split("\n") == ["2 and 2 make 4", "Four."]
    browser.run("document.querySelector('[value=completion]').click()")


def test_a_killed_engine_is_shown_and_then_gone(browser: Browser, server: Process, gate: Gate, root: Path) -> None:
    browser.type("#prompt-text", HEAD)
    browser.type("#n", "4")
    browser.type("#max-tokens", "1900")
    browser.click("#send")
    browser.wait("document.querySelector('.answer pre')?.innerText.length > 150", "it streams")
    with gate.closed():
        os.kill(server.engine_pid, signal.SIGKILL)
        browser.wait(f"{STATE} === 'restarting'", "the death is shown")
        assert "SIGKILL" in browser.text("#overlay")
        keep(browser, root, "page-killed")
    browser.wait(f"{STATE} === 'running'", "the next engine is shown")
    browser.wait("document.querySelector('#overlay').hidden", "the death is gone")
    assert "1 restart" in browser.text("#engine")
    assert "what was in flight goes on" in browser.text("#happened")
    browser.wait("document.querySelector('#stop').hidden", "the stream goes on to its end")
    assert "first token" in browser.text("#timing")


def test_what_happened_is_told_once(browser: Browser) -> None:
    """Pictures without an engine to look at leave what was seen last."""
    told = browser.run("""
        return import("/page/feed.js").then(({ View }) => {
            const view = new View(), happened = { preemptions: ["preempted"], copied: [1], evicted: [2] };
            view.facts = { kv: {}, ...happened };
            view.apply({ engine: { state: "busy" } });
            const { preemptions, copied, evicted } = view.facts;
            return [view.known, preemptions, copied, evicted];
        });
    """)
    assert told == [True, [], [], []]


@contextmanager
def impatient(browser: Browser) -> Iterator[None]:
    """What the page waits long for comes soon."""
    browser.run("window.patient = setTimeout; window.setTimeout = (f, ms) => patient(f, ms >= 30000 ? 1500 : ms)")
    yield
    browser.run("window.setTimeout = window.patient")


def test_a_silent_connection_counts_as_lost(browser: Browser, server: Process) -> None:
    with impatient(browser):
        time.sleep(0.5)  # the next picture begins the wait
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            browser.wait(f"{STATE} === 'away'", "nothing is heard")
            assert "nothing heard for 40 s" in browser.text("#overlay")
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        browser.wait(f"{STATE} === 'running'", "it is heard again")


def test_the_focus_stays_where_other_rows_go(browser: Browser) -> None:
    focused = browser.run("""
        return import("/page/requests.js").then(({ Selection, Sequences }) => {
            const numbers = { index: 0, blocks: [1], tokens: 1, most: 9, computed: 1, prompt: 1, waits_for: null };
            const make = (id) => ({ key: id, id: `${id}-0`, ...numbers });
            const view = { facts: { running: 3, waiting: 0, waiting_for: {} }, sequences: ["a", "b", "c"].map(make) };
            const shown = new Sequences(view, new Selection()), list = document.createElement("ul");
            document.querySelector("#sequences").replaceWith(list);
            list.id = "sequences";
            shown.show();
            const row = list.children[2].firstChild;
            let lost = 0;
            row.focus();
            row.addEventListener("blur", () => (lost += 1));
            view.sequences.shift();
            shown.show();
            return [document.activeElement === row, lost, list.children.length];
        });
    """)
    assert focused == [True, 0, 2]


def test_a_tab_that_nobody_looks_at_leaves_its_connection(browser: Browser, server: Process) -> None:
    hide = """
        Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    """
    with impatient(browser):
        browser.requests()
        browser.run(hide, True)
        time.sleep(2.5)
        before = browser.run("return document.querySelector('#map-summary').innerText")
        with load(server, 2):
            time.sleep(1)
            assert browser.run("return document.querySelector('#map-summary').innerText") == before
            assert not any("/page/events" in url for url in browser.requests())
            browser.run(hide, False)
            wait_until(lambda: any("/page/events" in url for url in browser.requests()), "it connects again")
            wait_until(lambda: browser.run("return document.querySelector('#map-summary').innerText") != before, "and shows what is new")
    browser.run("delete document.hidden")


def test_without_storage_and_in_forced_colours(window: Browser, server: Process) -> None:
    blocked = """
        const blocked = { get() { throw new Error("blocked"); } };
        Object.defineProperties(window, { localStorage: blocked, sessionStorage: blocked });
    """
    added = window.command("Page.addScriptToEvaluateOnNewDocument", source=blocked)
    try:
        window.open(server.url + "/")
        window.wait(f"{STATE} === 'running'", "the page shows a running engine")
        window.click("#theme")
        assert window.text("#theme") == "Light"
    finally:
        window.command("Page.removeScriptToEvaluateOnNewDocument", **added)
    window.media(forced_colors="active")
    seen = window.run("return [...document.querySelectorAll('#legend i')].map((e) => getComputedStyle(e).backgroundColor)")
    window.media()
    assert len(set(seen)) > 2, "the legend has colours"
    window.run("document.querySelector('#temperature').value = 0.65")
    assert window.run("return document.querySelector('#temperature').validity.valid")


def test_with_the_keyboard_alone(browser: Browser) -> None:
    seen: list[str] = []
    for _ in range(30):
        browser.press(TAB)
        seen.append(browser.run("const e = document.activeElement; return e.id || e.className || e.tagName"))
        if "send" in seen:
            break
    for wanted in ("theme", "map", "prompt-text", "n", "temperature", "max-tokens", "send"):
        assert wanted in seen, f"{wanted} can't be reached: {seen}"
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    browser.run("document.querySelector('#map').focus()")
    browser.press(RIGHT)
    browser.press(RIGHT)
    browser.press(DOWN)
    spoken = browser.text("#spoken")
    assert spoken.startswith("Block ")
    assert not browser.run("return document.querySelector('#tip').hidden")
    browser.press(ESCAPE)
    assert browser.run("return document.querySelector('#tip').hidden")
    browser.run("document.querySelector('#theme').focus()")
    colours = set()
    for _ in range(3):
        browser.press(ENTER)
        colours.add(
            browser.run("return [document.querySelector('#theme').innerText, getComputedStyle(document.body).backgroundColor].join()")
        )
    assert colours == {"Light,rgb(244, 242, 236)", "Dark,rgb(13, 17, 23)", "Auto,rgb(13, 17, 23)"}
    names: list[Any] = browser.run("""
        const named = (e) => e.getAttribute('aria-label') || e.innerText || e.labels?.length || e.title;
        const controls = [...document.querySelectorAll('button, input, textarea, a, [tabindex]')];
        return controls.filter((e) => e.offsetParent && !named(e)).map((e) => e.outerHTML);
    """)
    assert not names, "controls without a name"


def test_on_a_phone_nothing_is_cut_off(browser: Browser, server: Process, root: Path) -> None:
    browser.size(390, 844, mobile=True)
    with load(server, 3):
        wait_until(lambda: pixels(browser)["owned"] > 0, "the map is shown")
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        keep(browser, root, "page-phone", after=4)
        browser.run("document.querySelector('#map').scrollIntoView()")
        browser.tap("#map", 12, 12)
        browser.wait("document.querySelector('#tip').innerText.startsWith('Block')", "the block is described")
        assert not browser.run("return document.querySelector('#tip').hidden"), "and stays so when the finger leaves"
    low = browser.run("""
        const controls = [...document.querySelectorAll('button, input')].filter((e) => e.offsetParent);
        return controls.filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.id);
    """)
    assert not low, "controls beyond the edge"


def test_a_key_is_asked_for_and_kept_in_the_tab_only(window: Browser, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{KEY}"\n')
    file.chmod(0o600)
    process = Process("--kv-memory", "32MiB", "--api-keys", str(file))
    try:
        window.open(process.url + "/")
        window.wait("document.querySelector('#key-dialog').open", "the page asks for the key")
        window.type("#key", "sk-wrong-0123456789")
        window.press(ENTER)
        window.wait("document.querySelector('#key-dialog').open && document.querySelector('#key').value === ''", "it asks again")
        window.type("#key", "sk-älice-0123456789")
        window.press(ENTER)
        assert window.run("return document.querySelector('#key').validationMessage").startswith("A key has no spaces")
        assert window.run("return document.querySelector('#key-dialog').open")
        window.type("#key", KEY)
        window.press(ENTER)
        window.wait(f"{STATE} === 'running'", "the page shows the engine")
        window.type("#prompt-text", "def f(")
        window.click("#send")
        window.wait("document.querySelector('#timing').innerText.includes('first token')", "the prompt box uses the key")
        assert window.run("return [Object.values(sessionStorage).includes(arguments[0]), document.cookie]", KEY) == [True, ""]
        assert window.run("return Object.values(localStorage).includes(arguments[0])", KEY) is False
        process.process.send_signal(signal.SIGTERM)
        window.wait(f"{STATE} === 'away' || {STATE} === 'stopping'", "a stopped server is shown")
    finally:
        process.kill()


@contextmanager
def behind_a_path(url: str) -> Iterator[str]:
    """A reverse proxy that has the server under a path of its own, as companies have it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith("/models/quire/"):
                self.send_error(404)
                return
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            path, sent = self.path.removeprefix("/models/quire"), {"content-type": "application/json", "accept": "*/*"}
            with contextlib.suppress(OSError), http.stream(self.command, url + path, content=content, headers=sent) as answer:
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers["content-type"])
                self.end_headers()
                for part in answer.iter_bytes():
                    self.wfile.write(part)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}/models/quire/"
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_the_page_behind_a_path(window: Browser, server: Process) -> None:
    with behind_a_path(server.url) as url:
        window.complaints(), window.requests()
        window.open(url)
        window.wait(f"{STATE} === 'running'", "the page shows the engine")
        window.type("#prompt-text", "def f(")
        window.click("#send")
        window.wait("document.querySelector('#timing').innerText.includes('first token')", "the prompt is answered")
        assert not window.complaints()
        assert not [asked for asked in window.requests() if not asked.startswith((url, "data:"))]
        window.open("about:blank")


def test_a_pool_of_many_blocks_is_shown_in_proportion(window: Browser) -> None:
    process = Process("--kv-memory", "1GiB", "--block-size", "4")
    try:
        window.open(process.url + "/")
        window.wait(f"{STATE} === 'running'", "the page shows the engine")
        assert (
            http.post(process.url + "/v1/completions", json={"prompt": HEAD * 4, "max_tokens": 300, "ignore_eos": True}).status_code == 200
        )
        window.wait("document.querySelector('#scale').innerText.includes('were never used')", "only what was used is shown")
        window.click("#extent")
        window.wait("/Each square is \\d+ blocks/.test(document.querySelector('#scale').innerText)", "squares of several blocks")
        window.move("#map", 3, 3)
        window.wait("/^Blocks 0 to \\d+/.test(document.querySelector('#tip').innerText)", "several blocks are described")
    finally:
        process.kill()


def test_blocks_of_several_groups_of_layers(window: Browser, tmp_path: Path) -> None:
    """Layers that see everything beside others with a window: a square is a block of one group, a table has one of each side by side."""
    ours = {"vocab_size": 4096, "num_hidden_layers": 6, "sliding_window_pattern": 3, "sliding_window": 64, "eos_token_id": 0}
    folder = write_model(tmp_path / "model", GEMMA3 | ours)
    for name in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(Path(embedded.__file__).parent / name, folder / name)
    process = Process(str(folder), "--kv-memory", "3MiB", "--max-model-len", "1024", "--max-num-seqs", "8")
    squares = [(x, y) for y in range(12, 200, 24) for x in range(12, 600, 24)] * 20
    said: list[str] = []

    def pointed_at(*wanted: str) -> bool:
        """Blocks change all the time; so one after the other is looked at."""
        window.move("#map", *squares.pop())
        said.append(window.text("#tip"))
        return all(any(re.search(each, text) for text in said) for each in wanted)

    def looked_at() -> bool:
        with contextlib.suppress(AssertionError):  # it ended between being found and being clicked
            window.click(".sequence")
        table = window.run("return document.querySelector('.sequence .table:not([hidden])')?.innerText")
        return bool(table and re.match(r"block table of 3 groups of layers: \d+/·/· → .*\d+/\d+/\d+$", table))

    try:
        window.complaints()
        window.size(1280, 800)
        window.open(process.url + "/")
        window.wait(f"{STATE} === 'running'", "the page shows the engine")
        with load(process, 3):
            window.wait(
                "/ in use, each for 16 tokens in 1 of 3 groups of layers/.test(document.querySelector('#map-summary').innerText)",
                "what a block is",
            )
            wait_until(looked_at, "a table is shown whose beginning its window has left")
            everything, last = (
                r"block \d+ of \d+, for layers that see everything \(group 1 of 3\)",
                r"see the last 64 tokens \(group 3 of 3\)",
            )
            wait_until(lambda: pointed_at(everything, last), "blocks of both kinds of layers are described")
        wait_until(lambda: pointed_at("cached\n.*, where all that its windows show is there too"), "and what is cached")
        assert not window.complaints()
    finally:
        process.kill()
