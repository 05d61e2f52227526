"""transformers: one request at a time, in static batches, or with its continuous batching; called directly, without HTTP."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from peer_engines.process import Answer, Child, PeerFailed, Request


class Transformers:
    """``hf_side.py`` in the other Python. ``first``: it runs this many of the requests only; a rate does not need more."""

    def __init__(self, name: str, python: str, setup: dict[str, Any], logs: Path, *, first: int | None, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self._command = [python, str(Path(__file__).with_name("hf_side.py"))]
        self._setup, self._log, self._first = setup, logs / f"{name}.log", first
        self._child: Child | None = None

    def start(self) -> None:
        """Until the model is loaded. Raises PeerFailed."""
        environ = {"OMP_NUM_THREADS": str(self._setup["threads"]), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._child = Child(self._command, environ, self._log, pipes=True)
        self.settings = {**self.settings, **self._ask(self._setup)["versions"]}

    def run(self, requests: list[Request]) -> Answer:
        """Raises PeerFailed."""
        requests = requests[: self._first]
        made = self._ask(requests)
        for (_, length), output in zip(requests, made["outputs"], strict=True):
            if len(output) != length:
                raise PeerFailed(f"{self.name}: {len(output)} tokens where {length} were asked for")
        return Answer(made["seconds"], requests, made["outputs"])

    def hold(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGSTOP)

    def release(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._child = None

    def _ask(self, message: Any) -> dict[str, Any]:
        assert self._child is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._child.failure(f"{self.name} ended with code {self._child.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
