"""/v1/embeddings on a real server, with the official client where it has the call."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import openai
import pytest

from server.harness import DEADLINE_S, Process, http

TEXTS = ["import os\n", "import sys\n", "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"]


@pytest.fixture(scope="module")
def client(real: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0)


def embed(url: str, **fields: Any) -> Any:
    answer = http.post(url + "/v1/embeddings", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(answer: Any) -> list[list[float]]:
    return [entry["embedding"] for entry in answer["data"]]


def test_with_the_official_client(client: openai.OpenAI, real: Process) -> None:
    """It asks for base64 by itself, and decodes it."""
    answer = client.embeddings.create(model="embedded", input=TEXTS)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert (answer.object, answer.model) == ("list", "embedded")
    found = [entry.embedding for entry in answer.data]
    assert found == vectors(embed(real.url, input=TEXTS))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    for vector in found:
        assert len(vector) == 256
        assert math.fsum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    assert found[0] != found[1]
    short = client.embeddings.create(model="embedded", input=TEXTS[2], dimensions=32, encoding_format="float").data[0].embedding
    assert len(short) == 32
    cut = found[2][:32]
    length = math.sqrt(math.fsum(x * x for x in cut))
    assert short == pytest.approx([x / length for x in cut], abs=1e-6)


def test_forms_of_input(real: Process) -> None:
    ids = [http.post(real.url + "/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    expected = vectors(embed(real.url, input=TEXTS))
    assert vectors(embed(real.url, input=ids)) == expected
    assert vectors(embed(real.url, input=TEXTS[0])) == expected[:1]
    assert vectors(embed(real.url, input=ids[1])) == expected[1:2]
    packed = embed(real.url, input=TEXTS[0], encoding_format="base64")["data"][0]["embedding"]
    assert list(struct.unpack("<256f", base64.b64decode(packed))) == expected[0]


def test_pooling_and_the_cache(real: Process) -> None:
    """The last token's state needs nothing of the others but their keys and values, which may come from the cache; a mean needs all."""
    text = "def area(width, height):\n    return width * height\n" * 5
    for pooling in ("last", "mean"):
        cold, warm = (embed(real.url, input=text, pooling=pooling, cache_salt=pooling) for _ in range(2))
        assert warm["data"] == cold["data"]
        usage = warm["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == (usage["prompt_tokens"] - 1 if pooling == "last" else 0)
    last, mean = (embed(real.url, input=text, pooling=pooling)["data"] for pooling in ("last", "mean"))
    assert last != mean
    assert embed(real.url, input=text)["data"] == last, "the default"
    one = [[17]]
    assert embed(real.url, input=one, pooling="mean")["data"] == embed(real.url, input=one, pooling="last")["data"]


def test_truncation(real: Process) -> None:
    ids = list(range(300, 340))
    whole, head, tail = (vectors(embed(real.url, input=[part])) for part in (ids, ids[:10], ids[-10:]))
    assert vectors(embed(real.url, input=[ids], truncate_prompt_tokens=10)) == tail
    assert vectors(embed(real.url, input=[ids], truncate_prompt_tokens=10, truncation_side="right")) == head
    assert vectors(embed(real.url, input=[ids], truncate_prompt_tokens=-1)) == whole
    answer = embed(real.url, input=[ids * 100], truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == 2048
