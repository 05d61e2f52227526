"""Servers to test against: one in this process on a fake backend, and real ``quire serve`` processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx

import quire
from core.fake_backend import FakeBackend
from quire.config import EngineConfig, ServerConfig
from quire.core.plan import StepPlan, StepResult
from quire.grammar.constraints import Constraints
from quire.outputs import TokenLogprobs
from quire.server.app import around, create_app
from quire.server.batches.runner import open_runner
from quire.server.batches.store import Store
from quire.server.context import Context
from quire.server.engine.client import EngineClient
from quire.server.engine.loop import EngineLoop, SteppedEngine
from quire.server.engine.messages import Died, FromEngine, Stop, ToEngine
from quire.server.engine.process import make_engine
from quire.server.http.keys import Keys
from quire.server.launch import open_socket
from quire.server.loading import Serving
from quire.server.page.feed import Feed
from quire.server.uvicorn_server import EngineServer
from quire.text.tokenizer import Tokenizer

PACKAGE = Path(quire.__file__).resolve().parent
EMBEDDED = PACKAGE / "models" / "embedded"
DEADLINE_S = 120.0
"""Nothing here takes this long; a wait beyond it is a failure, and not a slow machine."""

http = httpx.Client(timeout=DEADLINE_S, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
"""For requests of any thread: a connection each, and our own deadline. httpx's default of 5 seconds is too short for a busy machine."""


class PacedBackend(FakeBackend):
    """A fake backend that can be held, slowed down and broken, and that reports log-probabilities."""

    def __init__(self, *, num_blocks: int = 256, max_model_len: int = 512, vocab_size: int) -> None:
        super().__init__(num_blocks, 16, max_model_len, vocab_size)
        self.go = threading.Event()
        self.go.set()
        self.delay_s = 0.0
        self.broken = False
        self._steps: int | None = None

    def go_for(self, steps: int) -> None:
        """Go, and hold again after so many steps."""
        self._steps = steps
        self.go.set()

    def go_on(self) -> None:
        """Go, and do not hold again, were it that fewer steps have been made than ``go_for`` said."""
        self._steps = None
        self.go.set()

    def execute(self, plan: StepPlan) -> StepResult:
        assert self.go.wait(DEADLINE_S)
        if self._steps is not None:
            self._steps -= 1
            if self._steps == 0:
                self._steps = None
                self.go.clear()
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.broken:
            raise RuntimeError("the device is gone, says /secret/path")
        result = super().execute(plan)
        self.plans.clear()  # 200 clients make many
        sampled = [work for work in plan.work if work.sample for _ in range(1 + len(work.draft))]
        for i, work in enumerate(sampled):
            start = self.rows[work.row].start
            if result.logprobs[i] is not None and not start.num_candidates:
                value = -0.5 - result.tokens[i] % 16 / 64  # differs, and adds up without rounding
                top = [((result.tokens[i] + k) % self.spec.vocab_size, value - k) for k in range(start.params.logprobs or 0)]
                result.logprobs[i] = TokenLogprobs((value, 1), top)
        return result


class ThreadLink:
    """A link to an engine on a thread of this process, which is not replaced when it dies."""

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, receive: Callable[[FromEngine], None], has_work: Callable[[], bool]) -> None:
        self._receive = receive
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def stop(self, timeout: float) -> None:
        self.send(Stop())
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            EngineLoop(self._engine, self._inbox, lambda message: self._receive(message)).run()
        except Exception:
            self._receive(Died("the engine has stopped"))


class Server:
    """A server in this process, on a thread of its own."""

    def __init__(
        self, tokenizer: Tokenizer, backend: PacedBackend, keys: Keys | None = None, *, eos: tuple[int, ...] = (), **options: Any
    ) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        engine_options = {name: options.pop(name) for name in EngineConfig.__dataclass_fields__ if name in options}
        engine_config = EngineConfig(**engine_options)
        constraints = Constraints(lambda: tokenizer, backend.spec.vocab_size, eos)
        self.engine = make_engine(backend, engine_config, constraints)
        self.client = EngineClient(self.engine.limits, engine_config.max_waiting)
        config = ServerConfig(port=0, **options)
        self._socket = open_socket("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = config
        self.batches = batches = None if config.batch_dir is None else open_runner(Store(Path(config.batch_dir)), self.client, config)
        app = self.app = create_app(Context(self.client, tokenizer, config, "fake", eos, embedding_size=2, keys=keys, batches=batches))
        self.feed: Feed = app.state.feed
        started = threading.Event()
        serving = Serving(self.client, ThreadLink(self.engine), started.set, batches)
        outer = around(app, config, keys, self.client.meter.refuse)
        self._server = EngineServer(outer, lambda: serving, lambda: None, keep_alive_s=5, grace_s=2, max_connections=config.max_connections)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])), daemon=True)
        self._thread.start()
        assert started.wait(DEADLINE_S)

    def stop(self) -> None:
        self.backend.go.set()
        self._server.handle_exit(signal.SIGINT, None)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


class Gate:
    """While it is closed, no engine of a server that was started with it begins to load."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "gate"
        self.environment = {"QUIRE_TESTS_GATE": str(self._file), "PYTHONPATH": str(Path(__file__).parent / "gate")}

    def close(self) -> None:
        self._file.touch()

    def open(self) -> None:
        self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        self.close()
        try:
            yield
        finally:
            self.open()


class Process:
    """A real ``quire serve`` on the embedded model, or on another folder.

    stop_after: each of its engines stands still after so many steps, in the middle of whatever it does, until ``go_on``.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None, stop_after: int | None = None) -> None:
        if stop_after is not None:
            arguments, environment = (*arguments, *STOPPING), {**(environment or {}), **stops_after(stop_after)}
        self.process = start_process("--port", "0", *arguments, environment=environment)
        self.banner = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.banner += line
            if "Ctrl-C" in line:
                break
        match = re.search(r"http://[\w.\[\]:]+:(\d+)", self.banner)
        if match is None:
            raise AssertionError(f"no URL in the banner: {self.banner!r}; stderr: {self.process.communicate()[1]!r}")
        self.port = int(match[1])
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def engine_pid(self) -> int:
        """Of the engine's process; waits until there is one."""
        return engine_pid(self.process.pid)

    def wait_stopped(self) -> int:
        """Until an engine stands still; its process id."""
        return stopped_engine(self.process.pid)

    def go_on(self) -> None:
        """Let the engine that stands still, or will before long, go on."""
        os.kill(self.wait_stopped(), signal.SIGCONT)

    def go_on_until(self, done: Callable[[], bool]) -> None:
        """Let engines go on that stand still, if any does."""

        def look() -> bool:
            for pid in engines_of(self.process.pid):
                if state_of(pid) == "T":
                    os.kill(pid, signal.SIGCONT)
            return done()

        wait_until(look, "it has ended")

    def ask_while_stopped(self, ask: Callable[[], None], sequences: int) -> None:
        """Have the engine meet so many sequences at once: they are all in flight before it sees the first of them."""
        engine = self.engine_pid
        os.kill(engine, signal.SIGSTOP)
        ask()
        wait_until(lambda: in_flight(self.url) == sequences, f"{sequences} sequences are in flight")
        os.kill(engine, signal.SIGCONT)

    def stop(self, how: int = signal.SIGINT) -> tuple[int, str]:
        """(exit code, stderr)"""
        self.process.send_signal(how)
        _, stderr = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, stderr

    def kill(self) -> None:
        engines = engines_of(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        for pid in engines:
            with contextlib.suppress(ProcessLookupError):  # one that stands still would keep its end of our pipe open for ever
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def start_process(
    *arguments: str, stdout: Any = subprocess.PIPE, environment: dict[str, str] | None = None, under: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """under: a command that starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUIRE_")} | (environment or {})
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*under, sys.executable, "-P", "-m", "quire.cli.main", "serve", *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def engines_of(front: int) -> list[int]:
    """The engine's process of the server ``front``, which has other children too; none while it is away."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{front}/task").iterdir():  # whichever thread has started it
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread, or the process, has ended
                found.extend(int(pid) for pid in (task / "children").read_text().split() if is_engine(int(pid)) and not is_gone(int(pid)))
    return found


def engine_pid(front: int) -> int:
    """Of the engine's process of the server ``front``; waits until there is one."""
    found: list[int] = []

    def look() -> bool:
        found[:] = engines_of(front)
        return bool(found)

    wait_until(look, "the server has an engine")
    return found[0]


STOPPING = ("--kv-debug", "--speculation", "off")
"""Options of a server whose engine stops: without guesses, a token of a sequence takes a step."""


def stops_after(steps: int) -> dict[str, str]:
    """The environment of such a server."""
    return {"QUIRE_TEST_STOP_AFTER": str(steps)}


def stopped_engine(front: int) -> int:
    """Of the engine of ``front`` that stands still; waits until one does."""
    found = 0

    def look() -> bool:
        nonlocal found
        found = engine_pid(front)
        return state_of(found) == "T"

    wait_until(look, "the engine stands still")
    return found


def in_flight(url: str) -> int:
    """Sequences, by the front's own count: no engine is asked."""
    count: int = http.get(f"{url}/load").json()["server_load"]
    return count


def generated(url: str) -> float:
    """Tokens that were generated so far, by the front's count; it never falls."""
    found = re.search(r"^quire_generation_tokens_total(?:\{.*\})? (\S+)$", http.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def free_port() -> int:
    """Outside of the range from which connections get theirs: none of those may take it before a server does."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(min(low, 10_000), max(low, 11_000))))
            port: int = probe.getsockname()[1]
            return port


def is_engine(pid: int) -> bool:
    return b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes()


def is_gone(pid: int) -> bool:
    """The process has ended, whether its parent has noticed or not."""
    return state_of(pid) in ("Z", "")


def state_of(pid: int) -> str:
    """As proc(5) has it: "T" is stopped, "Z" has ended; empty where there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def health(url: str) -> dict[str, Any]:
    answer = http.get(f"{url}/health")
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    return value


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited for ever until {what}"
        time.sleep(0.01)


def wait_clean(url: str) -> None:
    """Until nothing runs, nothing waits and every block is free."""

    def clean() -> bool:
        now = health(url)
        return (now.get("running"), now.get("waiting"), now.get("kv_blocks_used")) == (0, 0, 0)  # none while the engine is away

    wait_until(clean, "every block is free")


def events(body: str) -> list[Any]:
    """The events of a stream; ``[DONE]`` as that string."""
    found = []
    for line in body.split("\n\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert not line or line.startswith(":"), f"not an event: {line!r}"
    return found


def named_events(body: str) -> list[dict[str, Any]]:
    """The data of a stream whose events have names, which are their types."""
    found = []
    for block in body.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@contextlib.contextmanager
def raw_request(port: int, path: str, body: object, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection on which a POST was sent; closed at the end, whatever has arrived."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    with socket.socket() as connection:
        connection.settimeout(DEADLINE_S)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", port))
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        yield connection
