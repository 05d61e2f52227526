"""quire top: printed once, live in a terminal, without a server, with keys, on narrow terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quire.cli.top_screen import Style, screen
from quire.server.http.keys import read_keys
from quire.server.page.view import View
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, EMBEDDED, PACKAGE, Gate, PacedBackend, Process, Server, http, wait_until

KEY = "sk-alice-0123456789"
COMMAND = [sys.executable, "-P", "-m", "quire.cli.main", "top"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QUIRE_")}
    return kept | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8", **more}


def top(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment(**more), timeout=DEADLINE_S, check=False)


@contextmanager
def busy(url: str, headers: dict[str, str] | None = None) -> Iterator[None]:
    """Four samples run."""
    body = {"prompt": "import os\n" * 12, "n": 4, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with http.stream("POST", url + "/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()  # what is dropped is closed
        next(lines)
        yield
        lines.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED)


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[alice]\nkey = "{KEY}"\n')
    file.chmod(0o600)
    made = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys=read_keys(str(file)))
    yield made
    made.stop()


def test_printed_once_where_there_is_no_terminal(server: Server) -> None:
    server.backend.delay_s = 0.05  # 20 seconds, which a busy machine may take to show it
    try:
        with busy(server.url, {"Authorization": f"Bearer {KEY}"}):
            done = top("--url", server.url, "--api-key", KEY, COLUMNS="72")
    finally:
        server.backend.delay_s = 0.0
    assert done.returncode == 0, done.stderr
    assert "4 running" in done.stdout
    assert "\x1b" not in done.stdout, "no colours in a pipe"
    assert all(len(line) <= 72 for line in done.stdout.splitlines())
    assert done.stdout.count("running\n") >= 4
    assert "▓" in done.stdout, "shared blocks are on the map"
    assert "output - tokens/s" not in done.stdout, "rates are known"


def test_the_key_may_be_in_the_environment_and_a_wrong_one_is_told(server: Server) -> None:
    done = top("--url", server.url, QUIRE_API_KEY=KEY)
    assert done.returncode == 0
    for arguments, words in ((("--api-key", "sk-wrong-0123456789"), "not one that the server knows"), ((), "asks for an API key")):
        done = top("--url", server.url, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert "sk-wrong" not in done.stderr


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("http://127.0.0.1:1", 1, "no server answers at http://127.0.0.1:1"), ("ftp://127.0.0.1", 2, "is not an address"),
        ("http://", 2, "is not an address"), ("http://127.0.0.1:99999", 2, "is not an address"),
        ("http://exa mple:80", 1, "no server answers at http://exa mple:80"), (f"http://{'a' * 70}.com", 1, "no server answers"),
        ("http://127.0.0.1:1/\u00e9 x", 1, "no server answers"),
    ],
)  # fmt: skip
def test_no_server_there(url: str, code: int, words: str) -> None:
    done = top("--url", url)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["k\u00e9y-0123456789", "key-012345\n6789", "key-012345 6789"])
def test_a_key_that_no_header_can_bring(key: str) -> None:
    done = top("--url", "http://127.0.0.1:1", "--api-key", key)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "the API key has" in done.stderr
    assert "0123" not in done.stderr


def test_a_url_that_cannot_be_asked_for_is_told_live() -> None:
    terminal = Terminal(f"http://{'a' * 70}.com")
    try:
        terminal.wait("no server answers")
        os.write(terminal.master, b"q")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()


def test_something_else_is_there(fake_http: str) -> None:
    done = top("--url", fake_http)
    assert done.returncode == 1
    assert "is it a Quire server?" in done.stderr


@pytest.fixture
def fake_http(tmp_path: Path) -> Iterator[str]:
    import functools
    import http.server

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


class Terminal:
    """``quire top`` at a pseudo-terminal; ``text`` is all that it wrote."""

    def __init__(self, url: str, rows: int = 24, columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [*COMMAND, "--url", url],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(TERM="xterm-256color"),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )
        self.slave = slave
        self.text = ""

    def wait(self, words: str) -> None:
        end = time.monotonic() + DEADLINE_S
        start = len(self.text)
        while words not in self.text[start:]:
            assert time.monotonic() < end, f"waited for ever for {words!r} in {self.text[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")

    def end(self) -> int:
        code = self.process.wait(DEADLINE_S)
        assert termios.tcgetattr(self.slave)[3] == self.before[3], "the terminal is as it was"
        while select.select([self.master], [], [], 0.2)[0]:
            self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        os.close(self.master)
        os.close(self.slave)
        assert self.text.endswith("\x1b[?25h\x1b[?1049l"), "the screen is as it was"
        return code


def test_live_through_the_death_of_an_engine_and_of_the_server(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    process = Process("--kv-memory", "32MiB", environment=gate.environment)
    terminal = Terminal(process.url)
    try:
        terminal.wait("running")
        with gate.closed():
            os.kill(process.engine_pid, signal.SIGKILL)
            terminal.wait("SIGKILL")
        terminal.wait("running, 1 restart")
        process.stop()
        terminal.wait("no server answers")
        process = Process("--kv-memory", "32MiB", "--port", process.url.rpartition(":")[2])
        terminal.wait("\x1b[32mrunning\x1b[0m")
        os.write(terminal.master, b"q")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()
        process.kill()


@pytest.mark.parametrize("how", ["key", signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_signals_leave_the_terminal_as_it_was(how: str | signal.Signals) -> None:
    terminal = Terminal("http://127.0.0.1:1")
    try:
        terminal.wait("no server answers")
        if isinstance(how, str):
            os.write(terminal.master, b"\x03")
        else:
            terminal.process.send_signal(how)
        assert terminal.end() == 128 + (signal.SIGINT if isinstance(how, str) else how)
    finally:
        terminal.process.kill()


def test_every_width_and_plain_text(server: Server) -> None:
    from quire.cli.top import pictures

    view = View()
    server.backend.delay_s = 0.05
    with busy(server.url, {"Authorization": f"Bearer {KEY}"}):
        for picture in pictures(server.url, KEY):
            view.apply(picture)
            if view.sequences:
                break
    server.backend.delay_s = 0.0
    for width in (1, 40, 61, 80, 200):
        for height in (None, 5, 24, 100):
            lines = screen(view, server.url, width, height, Style(False, False))
            assert all(len(line) <= max(width, 40) for line in lines)
            assert "".join(lines).isascii()
    wait_until(lambda: server.client.in_flight == 0, "it has ended")
