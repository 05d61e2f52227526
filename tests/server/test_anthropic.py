"""The official Anthropic client, unchanged, against a real ``quire serve`` on the embedded model; what it can't ask for, by hand."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic.types import Message
from pydantic import BaseModel

from quire.server.http.keys import Caller, Keys
from server.harness import DEADLINE_S, PacedBackend, Process, Server, http, named_events, wait_clean, wait_until
from server.sdk_types import check_messages

HELLO: Any = [{"role": "user", "content": "import os\n"}]
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def client(real: Process) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real.url, api_key="none", timeout=DEADLINE_S, max_retries=0) as made:
        yield made


def fields(extra: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    body = {"seed": 3, "ignore_eos": True} | (extra or {})
    return {"model": "embedded", "max_tokens": 30, "messages": HELLO, "extra_body": body} | changes


GREEDY = {"temperature": 0}


def streamed(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every event of a stream, seen to be what the client's own types say."""
    answer = http.post(url + PATH, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return check_messages(named_events(answer.text))


def text_of(message: Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_message(client: anthropic.Anthropic, real: Process) -> None:
    answer = client.messages.create(**fields(GREEDY, system="# code"))
    Message.model_validate(answer.to_dict())
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "embedded")
    assert (answer.stop_reason, answer.stop_sequence, answer.usage.output_tokens) == ("max_tokens", None, 30)
    assert answer._request_id
    chat = {"messages": [{"role": "system", "content": "# code"}, *HELLO], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    same = http.post(real.url + "/v1/chat/completions", json=chat).json()
    assert text_of(answer) == same["choices"][0]["message"]["content"], "the same conversation"


def test_stream_says_what_the_whole_answer_says(client: anthropic.Anthropic, real: Process) -> None:
    client.messages.create(**fields())  # from here on the prompt is cached
    whole = client.messages.create(**fields())
    found = streamed(real.url, {"max_tokens": 30, "messages": HELLO, "seed": 3, "ignore_eos": True})
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = found[0]["message"]
    assert (start["type"], start["role"], start["content"], start["stop_reason"]) == ("message", "assistant", [], None)
    assert start["usage"]["input_tokens"] == whole.usage.input_tokens
    assert "".join(event["delta"]["text"] for event in found[2:-3]) == text_of(whole)
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 30


def test_the_clients_own_stream(client: anthropic.Anthropic) -> None:
    client.messages.create(**fields())
    with client.messages.stream(**fields()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = client.messages.create(**fields())
    assert text == text_of(final) == text_of(whole)
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    with client.beta.messages.stream(**fields(), betas=["interleaved-thinking-2025-05-14"]) as beta:
        assert "".join(beta.text_stream) == text


def test_stop_sequences(client: anthropic.Anthropic, real: Process) -> None:
    text = text_of(client.messages.create(**fields()))
    stop = text[10:13]
    answer = client.messages.create(**fields(stop_sequences=["never in it", stop]))
    assert text_of(answer) == text[: text.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    found = streamed(real.url, {"max_tokens": 30, "messages": HELLO, "seed": 3, "stop_sequences": [stop]})
    assert found[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    first = client.messages.create(**fields(stop_sequences=[text[0]]))
    assert text_of(first) == "", "a block without text, and not no block"


def test_a_model_that_ends_by_itself(fake: Server) -> None:
    chat = {"messages": HELLO, "max_tokens": 20, "seed": 1, "return_token_ids": True}
    choice = http.post(fake.url + "/v1/chat/completions", json=chat).json()["choices"][0]
    body = {"messages": HELLO, "max_tokens": 20, "seed": 1, "stop_token_ids": [choice["token_ids"][9]]}
    ended = http.post(fake.url + PATH, json=body).json()
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("end_turn", None)
    assert choice["message"]["content"].startswith(ended["content"][0]["text"])
    assert streamed(fake.url, body)[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_counted_is_what_is_used(client: anthropic.Anthropic) -> None:
    conversation: dict[str, Any] = {
        "system": [{"type": "text", "text": "Complete code, and nothing else. " * 10, "cache_control": {"type": "ephemeral"}}],
        "messages": [
            *HELLO,
            {"role": "assistant", "content": "import re"},
            {"role": "user", "content": [{"type": "text", "text": "x = "}]},
        ],
    }
    counted = client.messages.count_tokens(model="embedded", **conversation).input_tokens
    first = client.messages.create(**fields(**conversation)).usage
    again = client.messages.create(**fields(**conversation)).usage
    for usage in (first, again):
        assert usage.cache_read_input_tokens is not None
        assert usage.input_tokens + usage.cache_read_input_tokens == counted
        assert usage.cache_creation_input_tokens == 0
    assert again.cache_read_input_tokens == counted - 1, "all but the last token, which is always computed"


def test_a_billing_header_does_not_keep_the_rest_from_the_cache(client: anthropic.Anthropic) -> None:
    """Claude Code puts it first into the system prompt, and changes it with every request."""

    def blocks(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    def count(system: Any) -> int:
        return client.messages.count_tokens(model="embedded", messages=HELLO, system=system).input_tokens

    long = "You write programs in Python. " * 8
    header = "x-anthropic-billing-header: cc_version=2.1.{}; cc_entrypoint=cli; cch={};"
    plain = count(blocks(long))
    assert count(long) == plain
    for system in (blocks(header, long), header + "\n" + long, blocks(header + "\n" + long), blocks(header, header, long)):
        assert count(system) == plain
    assert count(blocks(long, header)) > plain, "only what comes first"
    assert count(blocks("about " + header, long)) > plain
    client.messages.create(**fields(system=blocks(header.format(0, "0000"), long)))
    usage = client.messages.create(**fields(system=blocks(header.format(17, "f00d"), long))).usage
    assert usage.cache_read_input_tokens == plain - 1


class Answer(BaseModel):
    kind: Literal["a module", "a package"]
    good: bool


def test_the_answer_follows_a_schema(client: anthropic.Anthropic) -> None:
    parsed = client.messages.parse(model="embedded", max_tokens=1500, messages=HELLO, output_format=Answer)
    assert isinstance(parsed.parsed_output, Answer)
    assert parsed.stop_reason == "end_turn"
    with client.messages.stream(model="embedded", max_tokens=1500, messages=HELLO, output_format=Answer) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Answer)
    bad: Any = {"format": {"type": "json_schema", "schema": {"type": "banana"}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
        client.messages.create(**fields(output_config=bad))


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic, real: Process) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "import sys\nimport "}]
    answer = client.messages.create(**fields(GREEDY, messages=begun))
    chat = {"messages": begun, "continue_final_message": True, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    same = http.post(real.url + "/v1/chat/completions", json=chat).json()
    assert text_of(answer) == same["choices"][0]["message"]["content"]


def test_what_claude_code_sends_is_taken(client: anthropic.Anthropic) -> None:
    answer = client.beta.messages.create(
        **fields({"speed": "standard"}), betas=["claude-code-20250219", "context-management-2025-06-27"],
        metadata={"user_id": "user_1_account__session_2"}, service_tier="auto", cache_control={"type": "ephemeral"},
        thinking={"type": "adaptive"}, output_config={"effort": "medium"}, tools=[],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )  # fmt: skip
    assert answer.stop_reason == "max_tokens"
    assert client.messages.create(**fields(thinking={"type": "enabled", "budget_tokens": 1024})).usage.output_tokens == 30


def test_more_tokens_than_the_context_has_room_for(client: anthropic.Anthropic, real: Process) -> None:
    """Clients ask for as much as their model could do; they are told when it was the context that ended an answer."""
    long: Any = [{"role": "user", "content": "word " * 2000}]
    prompt = client.messages.count_tokens(model="embedded", messages=long).input_tokens
    assert prompt < 2048
    answer = client.messages.create(**fields(messages=long, max_tokens=32_000))
    assert (answer.stop_reason, answer.usage.output_tokens) == ("model_context_window_exceeded", 2048 - prompt)
    assert (
        streamed(real.url, {"messages": long, "max_tokens": 2049 - prompt, "ignore_eos": True})[-2]["delta"]["stop_reason"]
        == answer.stop_reason
    )
    assert client.messages.create(**fields(messages=long, max_tokens=2048 - prompt)).stop_reason == "max_tokens"
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2047 maximum: the prompt has"):
        client.messages.create(**fields(messages=[{"role": "user", "content": "word " * 4000}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens must be an integer, got null"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": "many"}, "max_tokens must be an integer"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role must be user, assistant or system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be a string or a list of blocks, got null"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\].content must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}]}]},
            r'messages\[0\].content\[0\] is of type "image": this model reads text only',
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, r"content\[0\].text must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id must be a string"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "input must be an object"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            "the last message uses tools",
        ),
        ({"system": 5}, "system must be a string or a list of blocks"),
        ({"temperature": 1e999}, "temperature must be"),
        ({"stop_sequences": [""]}, "stop_sequences must hold non-empty strings"),
        ({"stop_sequences": ["x"] * 10_000}, "stop_sequences has 10000 entries"),
        ({"thinking": {"type": "deep"}}, "thinking.type must be"),
        ({"output_config": {"format": {"type": "yaml"}}}, "output_config.format must be of type json_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\] is of type"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type must be"),
        ({"container": "c"}, "container is not supported"),
        ({"safeguards": [{"type": "dangerous_tool_use"}]}, "safeguards is not supported"),
        ({"max_token": 5}, "did you mean max_tokens"),
    ],
)
def test_what_is_wrong_is_named(fake: Server, change: dict[str, Any], message: str) -> None:
    body = json.dumps({"max_tokens": 5, "messages": HELLO} | change)
    answer = http.post(fake.url + PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    told = answer.json()
    assert told.keys() == {"type", "error"}
    assert told["type"] == "error"
    assert told["error"].keys() == {"type", "message"}
    assert told["error"]["type"] == "invalid_request_error"
    assert re.search(message, told["error"]["message"]), told


def test_errors_are_the_clients_own(client: anthropic.Anthropic, real: Process) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**fields(model="claude-opus"))
    body: Any = missing.value.body
    assert body["error"]["type"] == "not_found_error"
    assert "--served-model-name" in body["error"]["message"]
    assert missing.value.request_id
    for method, path, status, kind in (
        ("GET", PATH, 405, "invalid_request_error"),
        ("POST", PATH + "/batches", 404, "not_found_error"),
        ("POST", PATH, 415, "invalid_request_error"),
    ):
        answer = http.request(method, real.url + path, content=b"{}")
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == kind
    large = http.post(real.url + PATH, json={"x": "y" * (9 << 20)})
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


def test_keys_limits_and_broken_engines(tokenizer: Any) -> None:
    key = "a key of at least sixteen"
    keys = Keys({hashlib.sha256(key.encode()).digest(): Caller("alice", max_concurrent=1)})
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), keys)
    try:
        options: dict[str, Any] = {"base_url": server.url, "timeout": DEADLINE_S, "max_retries": 0}
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            anthropic.Anthropic(api_key="wrong", **options).messages.create(**fields(model="fake"))
        client = anthropic.Anthropic(api_key=key, **options)
        assert client.messages.create(**fields(model="fake")).usage.output_tokens == 30
        server.backend.go.clear()
        with client.messages.create(**fields(model="fake"), stream=True) as stream:
            with pytest.raises(anthropic.RateLimitError, match="rate_limit_error"):
                client.messages.create(**fields(model="fake"))
            server.backend.broken = True
            server.backend.go.set()
            with pytest.raises(anthropic.APIStatusError) as broken:
                list(stream)
        told: Any = broken.value.body
        assert told["type"] == "error"
        assert told["error"]["type"] == "overloaded_error"
        assert "/secret" not in str(told)
        with pytest.raises(anthropic.InternalServerError, match="overloaded_error"):
            client.messages.create(**fields(model="fake"))
    finally:
        server.stop()


def test_hanging_up_frees_the_blocks(fake: Server) -> None:
    fake.backend.delay_s = 0.01
    fake.backend.go.clear()
    steps = fake.engine.stats().steps
    with http.stream("POST", fake.url + PATH, json={"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}):
        wait_until(lambda: fake.engine.stats().running == 1, "it runs")
    fake.backend.go.set()
    wait_clean(fake.url)
    fake.backend.delay_s = 0.0
    assert fake.engine.stats().steps - steps < 300, "it did not go on to the end"
