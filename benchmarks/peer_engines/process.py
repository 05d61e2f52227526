"""A child process that is started, held while another engine is measured, let go again, and stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

Request = tuple[list[int], int]
"""Prompt tokens, and how many tokens to generate."""
GRACE_S = 20


class MissingPeer(Exception):
    """An engine that is not installed. The message says how it gets installed."""


class PeerFailed(Exception):
    """An engine that ended, refused a request or gave a wrong answer."""


class Answer:
    """What one run took, and what came out."""

    __slots__ = ("outputs", "requests", "seconds")

    def __init__(self, seconds: float, requests: list[Request], outputs: list[list[int]]) -> None:
        self.seconds = seconds
        self.requests = requests
        """Those that were run: an engine may take only the first ones."""
        self.outputs = outputs
        """Token ids, in the order of ``requests``."""

    @property
    def output_tokens(self) -> int:
        return sum(length for _, length in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt, _ in self.requests)


class Peer(Protocol):
    """An engine under measurement."""

    name: str
    settings: dict[str, Any]
    """How it runs: for the report."""

    def start(self) -> None: ...
    def run(self, requests: list[Request]) -> Answer: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...
    def stop(self) -> None: ...


class Child:
    """A process, and all that it starts, in a session of its own: they are held, let go and ended together."""

    def __init__(self, command: list[str], environ: dict[str, str], log: Path, *, pipes: bool = False) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as file:
            file.write(f"$ {shown(command, environ)}\n".encode())
            file.flush()
            self.process: subprocess.Popen[str] = subprocess.Popen(
                command, env={**os.environ, **environ}, start_new_session=True, text=True, stderr=file,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL, stdout=subprocess.PIPE if pipes else file,
            )  # fmt: skip

    @property
    def stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Ask, wait, then insist: also for what the process leaves behind."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def failure(self, what: str) -> PeerFailed:
        """With the end of what it wrote, which says why."""
        end = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return PeerFailed("\n    ".join([f"{what}; the end of {self._log}:", *end]))


def shown(command: list[str], environ: dict[str, str]) -> str:
    """As it would be typed; of a PATH, what was put in front of it."""
    path = os.environ.get("PATH", "")
    short = {name: value.replace(path, "$PATH") if name == "PATH" and path else value for name, value in environ.items()}
    return " ".join([*(f"{name}={value}" for name, value in short.items()), shlex.join(command)])
