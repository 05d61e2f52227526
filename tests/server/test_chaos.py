"""Small runs of benchmarks/chaos.py and benchmarks/soak.py, without their bounds on time and memory."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

import chaos
import soak
from serving_process import serving


def test_thirty_streams_and_three_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "MAX_RECOVERY_S", float("inf"))
    with serving("--kv-memory", "64MiB") as server:
        wrong, figures = chaos.chaos(server, 30, kills=3, stops=0, seed=1)
        assert not wrong
        assert figures["kills"] == 3


def test_the_check_sees_what_is_wrong() -> None:
    call = chaos.calls(3)
    call[0].status = call[2].status = "done"
    other = chaos.calls(3)
    assert chaos.wrong_with(call[0], other[0]) is not None, "lost"
    other[0].status = "done"
    assert chaos.wrong_with(call[0], other[0]) is None
    other[0].choices[0] = {"text": "x", "tokens": [1], "ends": ["length"], "logprobs": []}
    assert chaos.wrong_with(call[0], other[0]) is not None, "changed"
    tokens = other[2].body["max_tokens"]
    for count, ends in ((tokens + 1, ["length"]), (tokens, ["length", "length"]), (tokens, [])):
        other[2].status, other[2].choices[0] = "done", {"text": "", "tokens": [1] * count, "ends": ends, "logprobs": []}
        assert chaos.wrong_with(call[2], other[2]) is not None


def test_sixty_connections_that_hang_up() -> None:
    with serving("--kv-memory", "16MiB") as server:
        counts, memory = asyncio.run(soak.soak(server, 60, 3, 0.3, seed=1))
        assert not soak.check(server, counts, memory, growth_mib=float("inf"))
        assert counts["left"] > 0
        assert counts["done"] > 0
