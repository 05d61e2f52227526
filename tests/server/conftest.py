from __future__ import annotations

from collections.abc import Iterator

import pytest

from quire.text.tokenizer import Tokenizer
from server.harness import EMBEDDED, PacedBackend, Process, Server
from server.scripted import ScriptedBackend


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED)


@pytest.fixture(scope="module")
def fake(tokenizer: Tokenizer) -> Iterator[Server]:
    """A server on a fake backend: every token is a hash of those before it."""
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), max_body_bytes=200_000, max_prompts_per_request=8)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def real() -> Iterator[Process]:
    """A ``quire serve`` process on the embedded model, with a small pool, so that requests wait and are preempted."""
    process = Process("--kv-memory", "32MiB", "--max-num-seqs", "32")
    yield process
    process.kill()


@pytest.fixture
def backend(server: Server) -> ScriptedBackend:
    """Of the module's own ``server``."""
    assert isinstance(server.backend, ScriptedBackend)
    return server.backend
