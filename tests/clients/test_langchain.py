"""LangChain's ChatOpenAI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.harness import DEADLINE_S, Process

langchain_openai = pytest.importorskip("langchain_openai", reason="make test-clients installs it", exc_type=ImportError)


def model(server: Process, **options: Any) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model="embedded", timeout=DEADLINE_S, max_retries=0,
        **({"max_tokens": 24, "temperature": 0, "seed": 1} | options),
    )  # fmt: skip


def test_invoke_stream_and_batch(server: Process) -> None:
    chat = model(server, stream_usage=True)
    whole = chat.invoke("Write a loop")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 24
    assert "cache_read" in whole.usage_metadata["input_token_details"]
    pieces = list(chat.stream("Write a loop"))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == whole.usage_metadata["output_tokens"]
    assert [answer.content for answer in chat.batch(["Write a loop"] * 3)] == [whole.content] * 3


def test_async(server: Process) -> None:
    async def run() -> str:
        return "".join([piece.content async for piece in model(server).astream("Write a loop")])

    assert asyncio.run(run()) == model(server).invoke("Write a loop").content


def test_logprobs(server: Process) -> None:
    answer = model(server, logprobs=True, top_logprobs=2).invoke("Write a loop")
    content = answer.response_metadata["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert len(content) == answer.usage_metadata["output_tokens"]
