"""quire chat, as a process: piped, at a terminal, and against a server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, EMBEDDED, PacedBackend, Server, wait_until

COMMAND = [sys.executable, "-P", "-m", "quire.cli.main", "chat"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tokenizer = Tokenizer.load(EMBEDDED)
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    yield server
    server.stop()


def chat(stdin: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=2 * DEADLINE_S)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_conversation_with_a_model_in_this_process(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    said = ["import os", "/system answer in Python", '"""', "/etc/hosts", '"""', "/clear", '"""', "def f(x):", "    return", '"""',
            "/regenerate", f"/save {kept}", f"/save {kept}", "/nothing", "/clear", "/regenerate", "/help",
            "/exit", "never said"]  # fmt: skip
    code, out, err = chat("\n".join(said), "--max-tokens", "8", "--temperature", "0", "--kv-memory", "32MiB")
    first, second, third = (each["content"] for each in json.loads(kept.read_text())["messages"])
    assert (first, second) == ("answer in Python", "def f(x):\n    return"), "the conversation begins again with a new system message"
    assert third
    assert out.count(third) == 2, "answered, and again"
    assert err.count("[8 tokens") == 4
    assert "tokens/s, the first after" in err
    for words in ("File exists", "there is no command /nothing", "nothing was answered yet", "/regenerate    "):
        assert words in err
    assert code == 1, "something failed"


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    for path in EMBEDDED.iterdir():
        if path.is_file() and path.name != "tokenizer_config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    code, out, err = chat("hello\n", str(tmp_path))
    assert (code, out) == (2, "")
    assert "has no chat template" in err
    assert err.count("\n") == 1


def test_a_conversation_with_a_server(server: Server, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    code, _, err = chat(f"hello\nand then\n/save {kept}\n", "--url", server.url, "--max-tokens", "5", "--system", "be brief")
    assert code == 0, err
    messages = json.loads(kept.read_text())["messages"]
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert err.count("[5 tokens") == 2
    code, _, err = chat("x " * 4000 + "\nhello\n", "--url", server.url, "--max-tokens", "5")
    assert "the context" in err
    assert "[5 tokens" in err, "a message that does not fit is taken back, and the next one answered"
    assert code == 1


@pytest.mark.parametrize(("arguments", "words"), [
    (("--url", "ftp://x"), "is not the address of a server"),
    (("--url", "http://127.0.0.1:1"), "Connection refused. Is it running?"),
    (("--url", "http://127.0.0.1:1", "--threads", "2"), "leave out threads"),
    (("--temperature", "-1"), "temperature must be"),
    (("no/such/folder",), "no/such/folder"),
])  # fmt: skip
def test_wrong_use(arguments: tuple[str, ...], words: str) -> None:
    code, out, err = chat("hello\n", *arguments)
    assert code in (1, 2)
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_terminal(server: Server) -> None:
    """A paste of several lines is one message; Ctrl-C stops an answer and nothing else; Ctrl-D leaves."""
    server.backend.delay_s = 0.05
    master, slave = pty.openpty()
    process = subprocess.Popen([*COMMAND, "--url", server.url, "--temperature", "0"], stdin=slave, stdout=slave, stderr=slave,
                               start_new_session=True, env={**os.environ, "TERM": "xterm"},
                               preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))  # fmt: skip
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([master], [], [], DEADLINE_S)[0], f"waited for {text!r}, and saw {shown!r}"
            shown += os.read(master, 1000)
        shown = shown.partition(text)[2]

    try:
        read_until(b"/help lists the commands")
        read_until(b"> ")
        os.write(master, b"\x1b[200~/first line\rsecond line\x1b[201~\r")
        wait_until(lambda: server.client.in_flight == 1, "it is being answered")
        os.write(master, b"\x03")
        read_until(b"; stopped]")
        wait_until(lambda: server.client.in_flight == 0, "the server works no more on it")
        server.backend.delay_s = 0.0
        read_until(b"> ")
        os.write(master, b"again\r")
        read_until(b"the first after")
        read_until(b"> ")
        for _ in range(120):
            os.write(master, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
                break
        assert process.poll() == 0
    finally:
        server.backend.delay_s = 0.0
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
