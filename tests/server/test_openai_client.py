"""The official OpenAI client, unchanged, against a real ``quire serve`` on the embedded model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.harness import DEADLINE_S, Process, http, wait_clean

PROMPT = "def fibonacci(n):\n"
HELLO: Any = [{"role": "system", "content": "You complete code."}, {"role": "user", "content": "import os\n"}]


@pytest.fixture(scope="module")
def client(real: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "embedded"
    assert client.models.retrieve("embedded").id == "embedded"
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError, match="'embedded'"):
        client.models.retrieve("gpt-5")


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=20, temperature=0, n=1, user="me")
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.text
    assert choice.logprobs is None
    assert answer._request_id


def test_completion_stream(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "embedded", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 7}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason


def test_default_of_max_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="embedded", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    nearly_full = client.completions.create(model="embedded", prompt=[100] * 2040, extra_body={"ignore_eos": True})
    assert nearly_full.usage is not None
    assert nearly_full.usage.completion_tokens == 8, "a default gives way to the context"


def test_prompt_forms(client: openai.OpenAI, real: Process) -> None:
    ids = http.post(real.url + "/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    fields: dict[str, Any] = {"model": "embedded", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(prompt=PROMPT, **fields).choices[0].text
    for prompt in ([PROMPT], ids, [ids]):
        assert client.completions.create(prompt=prompt, **fields).choices[0].text == text
    both = client.completions.create(prompt=[PROMPT, "import "], n=2, **fields).choices
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    assert both[0].text == both[1].text == text
    assert client.completions.create(prompt=ids, echo=True, **fields).choices[0].text == PROMPT + text


def test_completion_logprobs(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3).choices[0]
    assert choice.logprobs is not None
    tokens, values, tops = choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
    assert tokens is not None
    assert values is not None
    assert tops is not None
    assert len(tokens) == len(values) == len(tops) == 10
    assert "".join(tokens) == choice.text
    assert choice.logprobs.text_offset == [sum(map(len, tokens[:i])) for i in range(10)]
    for token, value, top in zip(tokens, values, tops, strict=True):
        assert 3 <= len(top) <= 4
        assert value == top[token] == max(top.values()), "greedy: the token is the most likely one, to the last bit"
    none = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=2, temperature=0, logprobs=0).choices[0]
    assert none.logprobs is not None
    assert none.logprobs.token_logprobs == values[:2]


def test_seed_and_stop(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "embedded", "prompt": PROMPT, "max_tokens": 60, "temperature": 1.0}
    text = client.completions.create(seed=1, **fields).choices[0].text
    assert client.completions.create(seed=1, **fields).choices[0].text == text
    assert client.completions.create(seed=2, **fields).choices[0].text != text
    assert client.completions.create(**fields).choices[0].text != client.completions.create(**fields).choices[0].text
    stop = text[10:13]
    cut = client.completions.create(seed=1, stop=["never in it", stop], **fields)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    kept = client.completions.create(seed=1, stop=stop, extra_body={"include_stop_str_in_output": True}, **fields)
    assert kept.choices[0].text == text[: text.index(stop)] + stop
    chunks = client.completions.create(seed=1, stop=stop, stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.choices[0].text


def test_chat(client: openai.OpenAI) -> None:
    cold = {"cache_salt": "nobody has computed this"}
    answer = client.chat.completions.create(model="embedded", messages=HELLO, max_completion_tokens=12, temperature=0, n=1, extra_body=cold)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    parts: Any = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in HELLO]
    same = client.chat.completions.create(model="embedded", messages=parts, max_tokens=12, temperature=0)
    assert same.choices[0].message.content == choice.message.content


def test_chat_fills_the_context_by_default(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="embedded", messages=HELLO, seed=1, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


def test_chat_stream(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "embedded", "messages": HELLO, "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    """The client's own accumulator understands the chunks."""
    fields: dict[str, Any] = {"model": "embedded", "messages": HELLO, "max_tokens": 40, "seed": 3}
    stop = (client.chat.completions.create(**fields).choices[0].message.content or "")[20:22]
    with client.chat.completions.stream(**fields, stop=stop) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == client.chat.completions.create(**fields, stop=stop).choices[0].message.content


def test_chat_logprobs(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "embedded", "messages": HELLO, "max_tokens": 8, "seed": 5, "logprobs": True, "top_logprobs": 4}
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 8
    for entry in content:
        assert len(entry.top_logprobs) == 4
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
        assert entry.bytes is not None
    joined = bytes(byte for entry in content for byte in entry.bytes or ()).decode("utf-8", "replace")
    assert joined == choice.message.content
    chunks = client.chat.completions.create(**fields, stream=True)
    streamed = [entry for chunk in chunks for c in chunk.choices if c.logprobs for entry in c.logprobs.content or ()]
    assert streamed == content
    plain = client.chat.completions.create(**{**fields, "top_logprobs": None}).choices[0].logprobs
    assert plain is not None
    assert plain.content is not None
    assert [entry.top_logprobs for entry in plain.content] == [[]] * 8


def test_continue_final_message(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "import os\n"}, {"role": "assistant", "content": "import sys\nimport "}]
    extra = {"continue_final_message": True, "return_token_ids": True}
    answer = client.chat.completions.create(model="embedded", messages=messages, max_tokens=5, temperature=0, extra_body=extra)
    ids = (answer.model_extra or {})["prompt_token_ids"]
    direct = client.completions.create(model="embedded", prompt=ids, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == direct.choices[0].text


def test_extras_of_vllm(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "embedded", "prompt": PROMPT, "max_tokens": 10, "temperature": 1.0, "seed": 1}
    greedy = client.completions.create(**{**fields, "temperature": 0}).choices[0].text
    assert client.completions.create(**fields, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**fields, extra_body={"min_p": 1.0}).choices[0].text == greedy
    ids = client.completions.create(**fields, extra_body={"return_token_ids": True}).choices[0].model_extra or {}
    stopped = client.completions.create(**fields, extra_body={"stop_token_ids": [ids["token_ids"][4]], "return_token_ids": True}).choices[0]
    assert stopped.finish_reason == "stop"
    assert (stopped.model_extra or {})["stop_reason"] == ids["token_ids"][4]


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"prompt 4 .*|max_tokens 5,000") as long:
        client.completions.create(model="embedded", prompt=PROMPT, max_tokens=5000)
    assert long.value.param == "max_tokens"
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="embedded", messages=HELLO, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )


def test_async_client(real: Process) -> None:
    """Sixty-four at once through the async client, half of them streams, give what one at a time gives."""

    async def everyone() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:

            async def one(number: int) -> str:
                fields: dict[str, Any] = {"model": "embedded", "prompt": f"x{number} = ", "max_tokens": 5 + number, "seed": number}
                if number % 2:
                    return (await client.completions.create(**fields)).choices[0].text
                return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**fields, stream=True)])

            together = await asyncio.gather(*map(one, range(64)))
            return list(together), [await one(number) for number in range(0, 64, 8)]

    together, alone = asyncio.run(everyone())
    assert together[::8] == alone
    wait_clean(real.url)


def test_async_cancel(real: Process) -> None:
    """A cancelled task closes its connection; the server lets go of what it held."""

    async def cancelled() -> None:
        async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:

            async def one(stream: bool) -> None:
                extra = {"ignore_eos": True}
                if not stream:
                    await client.completions.create(model="embedded", prompt="a", max_tokens=2000, extra_body=extra)
                    return
                async for _ in await client.completions.create(
                    model="embedded", prompt="a", max_tokens=2000, stream=True, extra_body=extra
                ):
                    pass

            tasks = [asyncio.ensure_future(one(number % 2 == 0)) for number in range(8)]
            await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancelled())
    wait_clean(real.url)


def test_tokenize_and_detokenize(real: Process) -> None:
    with httpx.Client(base_url=real.url, timeout=DEADLINE_S) as http:
        made = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
        assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
        assert made["max_model_len"] == 2048
        assert "".join(made["token_strs"]) == "<|endoftext|>" + PROMPT
        assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": PROMPT}
        chat = http.post("/tokenize", json={"messages": HELLO}).json()
        asked = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}).json()
        assert chat["count"] == asked["usage"]["prompt_tokens"]
        assert chat["token_strs"] is None
        long = http.post("/tokenize", json={"prompt": "word " * 100_000}).json()
        assert long["count"] >= 100_000, "longer than the context, and off the event loop"


def test_version_and_documentation(real: Process) -> None:
    import quire

    with httpx.Client(base_url=real.url, timeout=DEADLINE_S) as http:
        assert http.get("/version").json() == {"version": quire.__version__}
        document = http.get("/openapi.json").json()
        assert "/v1/chat/completions" in document["paths"]
        fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
        assert {"prompt", "temperature", "top_k"} <= set(fields)
        assert http.get("/docs").status_code == 200


def test_what_a_request_leaves_out_is_the_models_own(client: openai.OpenAI) -> None:
    def text(**fields: Any) -> str:
        return client.completions.create(model="embedded", prompt=PROMPT, max_tokens=24, seed=3, **fields).choices[0].text

    assert text() == text(temperature=0.7, top_p=0.9) != text(temperature=1, top_p=1)
