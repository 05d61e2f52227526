"""An engine behind HTTP: all requests at once, each over a connection of its own, whole answers and no streams.

Whole answers measure the engines: at 64 streams the client would take a good part of the machine that it shares with them.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_engines.process import Answer, Child, PeerFailed, Request, shown

START_S = 900
"""A compiled vLLM takes minutes to start."""
ANSWER_S = 3600


class Served:
    """A server process. ``PORT`` in its command is replaced by a free one."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environ: dict[str, str],
        logs: Path,
        *,
        path: str,
        body: Callable[[list[int], int], dict[str, Any]],
        read: Callable[[dict[str, Any]], tuple[list[int], int]],
        settings: dict[str, Any],
    ) -> None:
        """``path``, ``body``: where a request goes and what it says; ``read``: its answer → token ids and the count it reports."""
        self.name = name
        self.settings = {"command": shown(command, environ), **settings}
        self._command, self._environ, self._log = command, environ, logs / f"{name}.log"
        self._path, self._body, self._read = path, body, read
        self._child: Child | None = None
        self._port = 0

    def start(self) -> None:
        """Until it answers. Raises PeerFailed."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._child = Child([str(self._port) if part == "PORT" else part for part in self._command], self._environ, self._log)
        deadline = time.monotonic() + START_S
        while not self._ready():
            if (code := self._child.process.poll()) is not None:
                raise self._child.failure(f"{self.name} ended with code {code} before it was ready")
            if time.monotonic() > deadline:
                self.stop()
                raise PeerFailed(f"{self.name} was not ready after {START_S} s; see {self._log}")
            time.sleep(0.1)

    def run(self, requests: list[Request]) -> Answer:
        """All at once. The clock runs from the moment when all threads are there until the last answer. Raises PeerFailed."""
        answers: list[dict[str, Any] | Exception | None] = [None] * len(requests)
        barrier = threading.Barrier(len(requests) + 1)

        def ask(index: int) -> None:
            prompt, length = requests[index]
            data = json.dumps(self._body(prompt, length)).encode()
            barrier.wait()
            try:
                answers[index] = self._post(data)
            except Exception as e:  # reported below, with the name of the engine
                answers[index] = e

        threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        outputs = []
        for (_, length), answer in zip(requests, answers, strict=True):
            if not isinstance(answer, dict):
                raise PeerFailed(f"{self.name}: a request failed: {answer}; see {self._log}")
            tokens, reported = self._read(answer)
            if reported != length or len(tokens) != length:
                raise PeerFailed(f"{self.name}: {len(tokens)} tokens, and {reported} in its usage, where {length} were asked for")
            outputs.append(tokens)
        return Answer(seconds, requests, outputs)

    def hold(self) -> None:
        """Stop all of its processes where they are: an idle engine must not take time from the one that is measured."""
        if self._child is not None:
            self._child.signal(signal.SIGSTOP)

    def release(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._child = None

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/v1/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not there yet; 503 while a model is loaded is an OSError too
            return False

    def _post(self, data: bytes) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self._port}{self._path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                made: dict[str, Any] = json.load(answer)
                return made
        except urllib.error.HTTPError as e:
            raise PeerFailed(f"HTTP {e.code}: {e.read(500).decode(errors='replace')}") from None


def completion_body(prompt: list[int], length: int) -> dict[str, Any]:
    """For /v1/completions of Quire and vLLM, which take token ids and give them back."""
    return {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def read_completion(answer: dict[str, Any]) -> tuple[list[int], int]:
    return answer["choices"][0]["token_ids"], answer["usage"]["completion_tokens"]


def llama_body(prompt: list[int], length: int) -> dict[str, Any]:
    """For llama-server's own /completion."""
    return {"prompt": prompt, "n_predict": length, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}


def read_llama(answer: dict[str, Any]) -> tuple[list[int], int]:
    return answer["tokens"], answer["tokens_predicted"]
