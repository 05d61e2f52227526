"""Answers with very many values are written on another thread, in small parts: the JSON is the same."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.server.openai.chunks import MANY_VALUES, json_bytes, written
from server.harness import Server, http

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(), inner, max_size=5), max_leaves=80)


@given(value=VALUES)
def test_the_same_json(value: Any) -> None:
    assert asyncio.run(written(MANY_VALUES, lambda: value)) == json_bytes(value)


def test_many_values_leave_the_event_loop_alone() -> None:
    threads: list[str] = []

    def make() -> list[int]:
        threads.append(threading.current_thread().name)
        return [1, 2]

    async def both() -> None:
        assert await written(MANY_VALUES - 1, make) == await written(MANY_VALUES, make) == b"[1,2]"

    asyncio.run(both())
    assert threads[0] == "MainThread" != threads[1]


def test_an_answer_with_many_log_probabilities(fake: Server) -> None:
    """In each form: as many as were asked for, and those of a short answer are among them."""
    fields = {"seed": 1, "max_tokens": 300, "ignore_eos": True}
    tops = {"prompt": "abc", "logprobs": 20, "prompt_logprobs": 20}
    long = http.post(fake.url + "/v1/completions", json=fields | tops).json()["choices"][0]
    short = http.post(fake.url + "/v1/completions", json=fields | tops | {"max_tokens": 9}).json()["choices"][0]
    assert long["prompt_logprobs"] == short["prompt_logprobs"]
    for name, values in short["logprobs"].items():
        assert long["logprobs"][name][:9] == values
    assert len(long["logprobs"]["tokens"]) == 300
    chat = {"messages": [{"role": "user", "content": "abc"}], "logprobs": True, "top_logprobs": 20}
    long = http.post(fake.url + "/v1/chat/completions", json=fields | chat).json()["choices"][0]["logprobs"]["content"]
    short = http.post(fake.url + "/v1/chat/completions", json=fields | chat | {"max_tokens": 9}).json()["choices"][0]["logprobs"]["content"]
    assert (len(long), long[:9]) == (300, short)
