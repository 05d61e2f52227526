"""The server while its engine loads, and while its engine does not move: what it answers then, and to whom."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.harness import DEADLINE_S, Gate, Process, engine_pid, free_port, health, http, is_gone, start_process, wait_until

KEY = "sk-alice-0123456789"


@contextmanager
def loading(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, Gate]]:
    """A server whose engine can't begin to load before the gate opens: the process, its URL, the gate."""
    port, gate = free_port(), Gate(folder)
    url = f"http://127.0.0.1:{port}"
    gate.close()
    process = start_process("--port", str(port), "--kv-memory", "16MiB", *arguments, environment=gate.environment)
    try:

        def listens() -> bool:
            try:
                return bool(health(url))
            except httpx.TransportError:
                return False

        wait_until(listens, "it listens")
        yield process, url, gate
    finally:
        process.kill()
        process.communicate()
        gate.open()


def test_what_is_said_while_loading(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[alice]\nkey = "{KEY}"\n')
    keys.chmod(0o600)
    with loading(tmp_path, "--api-keys", str(keys)) as (process, url, gate):
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
        gate.open()
        wait_until(lambda: http.get(url + "/ready").status_code == 200, "it has loaded")
        assert http.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=bearer).status_code == 200
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Quire "), "the banner comes when it is ready"


def test_it_can_be_stopped_while_it_loads(tmp_path: Path) -> None:
    for how in (signal.SIGTERM, signal.SIGINT):
        with loading(tmp_path) as (process, _, _):
            engine = engine_pid(process.pid)
            process.send_signal(how)
            assert process.communicate(timeout=DEADLINE_S) == ("", "")
            assert process.returncode == 0
            wait_until(lambda engine=engine: is_gone(engine), "its engine has gone too")


def test_the_first_process_of_a_container_can_be_stopped_before_it_serves(tmp_path: Path) -> None:
    """Nothing ends it but what it has a handler for."""
    first = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*first, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs namespaces of processes")
    config = tmp_path / "quire.toml"
    os.mkfifo(config)
    process = start_process("--config", str(config), under=first)
    writer: list[int] = []

    def reads() -> bool:
        try:
            writer.append(os.open(config, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads
            return False
        return True

    try:
        wait_until(reads, "it reads its configuration")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        assert process.communicate(timeout=DEADLINE_S) == ("", "")
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        for descriptor in writer:
            os.close(descriptor)
        process.kill()
        process.communicate()


def test_an_engine_that_dies_after_somebody_has_asked(tmp_path: Path) -> None:
    with loading(tmp_path) as (process, _, _):
        os.kill(engine_pid(process.pid), signal.SIGKILL)
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
