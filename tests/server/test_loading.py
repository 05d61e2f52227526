"""The server while its engine loads, and while its engine does not move: what it answers then, and to whom."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.harness import DEADLINE_S, Process, engine_pid, health, http, start_process, wait_until

KEY = "sk-alice-0123456789"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


@contextmanager
def loading(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A server whose engine is stopped in the middle of loading: the process, its URL, the engine's process id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start_process("--port", str(port), "--kv-memory", "16MiB", *arguments)
    engine = None
    try:
        engine = engine_pid(process.pid)
        # The front waits in the middle of the fork for the program to be there.
        wait_until(lambda: b"engine.process" in Path(f"/proc/{engine}/cmdline").read_bytes(), "the engine's program runs")
        os.kill(engine, signal.SIGSTOP)

        def listens() -> bool:
            try:
                return bool(health(url))
            except httpx.TransportError:
                return False

        wait_until(listens, "it listens")
        yield process, url, engine
    finally:
        process.kill()
        if engine is not None:
            with contextlib.suppress(ProcessLookupError):  # stopped, it would keep its end of our pipe open for ever
                os.kill(engine, signal.SIGKILL)
        process.communicate()


def test_what_is_said_while_loading(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[alice]\nkey = "{KEY}"\n')
    keys.chmod(0o600)
    with loading("--api-keys", str(keys)) as (process, url, engine):
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert health(url)["status"] == "loading"
        assert http.get(url + "/metrics").status_code == 200
        for method, path, headers in (("GET", "/ready", {}), ("GET", "/v1/models", bearer), ("POST", "/v1/completions", bearer)):
            answer = http.request(method, url + path, headers=headers)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-request-id"]
            assert answer.json()["error"]["code"] == "unavailable"
            assert re.search(r"is being loaded, for \d+ seconds", answer.json()["error"]["message"])
        for path in ("/v1/models", "/v1/completions", "/docs", "/nothing"):
            assert http.post(url + path, json={}).status_code == 401, "keys are asked for from the first moment"
        os.kill(engine, signal.SIGCONT)
        wait_until(lambda: http.get(url + "/ready").status_code == 200, "it has loaded")
        assert http.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=bearer).status_code == 200
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Quire "), "the banner comes when it is ready"


def test_it_can_be_stopped_while_it_loads() -> None:
    for how in (signal.SIGTERM, signal.SIGINT):
        with loading() as (process, _, engine):
            process.send_signal(how)
            assert process.communicate(timeout=DEADLINE_S) == ("", "")
            assert process.returncode == 0
            wait_until(lambda engine=engine: not Path(f"/proc/{engine}").exists(), "its engine has gone too")


def test_an_engine_that_dies_after_somebody_has_asked() -> None:
    with loading() as (process, _, engine):
        os.kill(engine, signal.SIGKILL)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (1, "")
        assert err.startswith("quire: the engine could not start: its process was killed by SIGKILL")
        assert err.count("\n") == 1


def test_a_banner_that_can_not_be_written_is_no_reason_not_to_serve() -> None:
    """A full disk, for example."""
    port = free_port()
    with open("/dev/full", "w") as full:
        process = start_process("--port", str(port), "--kv-memory", "16MiB", stdout=full)
    try:
        answers: list[Any] = []

        def ready() -> bool:
            try:
                answers.append(http.get(f"http://127.0.0.1:{port}/ready"))
            except httpx.TransportError:
                return False
            return bool(answers[-1].status_code == 200)

        wait_until(ready, "it serves")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert "standard output can't be written: No space left on device" in err
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_an_engine_that_does_not_move_is_not_ready() -> None:
    """From half of the time on after which it would be killed; nobody is lost when it goes on by itself."""
    process = Process("--kv-memory", "16MiB", "--engine-timeout", "8")
    try:
        os.kill(process.engine_pid, signal.SIGSTOP)
        assert http.get(process.url + "/ready").status_code == 200, "it has nothing to do"
        with httpx.stream("POST", process.url + "/v1/completions", json={"prompt": "a", "stream": True}, timeout=DEADLINE_S) as answer:
            wait_until(lambda: http.get(process.url + "/ready").status_code == 503, "it is seen")
            said = http.get(process.url + "/ready").json()["error"]["message"]
            assert re.search(r"has not finished a step for [4-7] seconds", said)
            os.kill(process.engine_pid, signal.SIGCONT)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert http.get(process.url + "/ready").status_code == 200
        assert health(process.url)["engine_restarts"] == 0
    finally:
        os.kill(process.engine_pid, signal.SIGCONT)
        process.kill()
