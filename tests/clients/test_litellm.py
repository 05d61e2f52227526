"""LiteLLM, as proxies and agents use it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from server.harness import DEADLINE_S, Process

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices
litellm = pytest.importorskip("litellm", reason="make test-clients installs it", exc_type=ImportError)
MESSAGES = [{"role": "user", "content": "Write a loop"}]


def ask(server: Process, **options: Any) -> Any:
    return litellm.completion(
        model="hosted_vllm/embedded", api_base=server.url + "/v1", api_key="none", messages=MESSAGES, timeout=DEADLINE_S, num_retries=0,
        **({"max_tokens": 24, "temperature": 0, "seed": 1} | options),
    )  # fmt: skip


def test_chat(server: Process) -> None:
    answer = ask(server)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_stream_says_the_same(server: Process) -> None:
    whole = ask(server).choices[0].message.content
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert any(getattr(chunk, "usage", None) for chunk in chunks)


def test_fields_of_vllm(server: Process) -> None:
    answer = ask(server, extra_body={"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 24})
    assert answer.usage.completion_tokens == 24


def test_errors_have_their_type(server: Process) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(server, temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(server, max_tokens=1_000_000)


def test_text_completion(server: Process) -> None:
    answer = litellm.text_completion(
        model="hosted_vllm/embedded", api_base=server.url + "/v1", api_key="none", prompt="def f(", max_tokens=8, temperature=0,
    )  # fmt: skip
    assert answer.choices[0].text
