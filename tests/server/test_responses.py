"""/v1/responses with the official OpenAI client, unchanged, against a real ``quire serve`` on the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Process, Server, http, named_events, wait_clean, wait_until
from server.sdk_types import check_responses

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def client(real: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as made:
        yield made


def fields(extra: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    body = {"seed": 3, "ignore_eos": True} | (extra or {})
    return {"model": "embedded", "max_output_tokens": 30, "input": "import os\n", "extra_body": body} | changes


def streamed(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every event of a stream, seen to be what the client's own types say."""
    answer = http.post(url + PATH, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    return check_responses(named_events(answer.text))


def test_response(client: openai.OpenAI, real: Process) -> None:
    answer = client.responses.create(**fields(instructions="# code", temperature=0, metadata={"a": "b"}, store=True, user="me"))
    Response.model_validate(answer.to_dict())
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.model, answer.metadata, answer.instructions) == ("response", "embedded", {"a": "b"}, "# code")
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 30
    assert answer.usage.total_tokens == answer.usage.input_tokens + 30
    chat = {"messages": [{"role": "system", "content": "# code"}, {"role": "user", "content": "import os\n"}], "temperature": 0}
    same = http.post(real.url + "/v1/chat/completions", json=chat | {"max_tokens": 30, "ignore_eos": True}).json()
    assert answer.output_text == same["choices"][0]["message"]["content"], "the same conversation"
    assert answer.usage.input_tokens == same["usage"]["prompt_tokens"]


def test_stream_says_what_the_whole_answer_says(client: openai.OpenAI, real: Process) -> None:
    client.responses.create(**fields())  # from here on the prompt is cached
    whole = client.responses.create(**fields())
    found = streamed(real.url, {"max_output_tokens": 30, "input": "import os\n", "seed": 3, "ignore_eos": True})
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event["delta"] for event in found[4:-4]) == whole.output_text == found[-4]["text"]
    final = found[-1]["response"]
    assert final["output"] == [found[-2]["item"]]
    assert final["status"] == final["output"][0]["status"] == "incomplete"
    assert final["output"][0]["content"] == [found[-3]["part"]]
    assert {event["item_id"] for event in found[3:-2]} == {final["output"][0]["id"]}
    assert whole.usage is not None
    assert final["usage"] == whole.usage.to_dict()
    assert found[0]["response"]["id"] == final["id"]
    assert found[0]["response"]["status"] == "in_progress"


def test_a_response_that_ends_by_itself(client: openai.OpenAI, real: Process) -> None:
    text = client.responses.create(**fields()).output_text
    stop = {"stop": [text[12:15]]}
    whole = client.responses.create(**fields(stop))
    assert whole.status == "completed"
    assert whole.output_text == text[: text.index(stop["stop"][0])]
    assert whole.output[0].to_dict()["status"] == "completed"
    with client.responses.stream(**fields(stop)) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == whole.output_text
    assert (
        streamed(real.url, {"input": "import os\n", "seed": 3, "stop": [text[0]]})[-1]["response"]["output"][0]["content"][0]["text"] == ""
    )


def test_the_clients_own_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(**fields())
    text = "".join(event.delta for event in client.responses.create(**fields(), stream=True) if event.type == "response.output_text.delta")
    assert text == whole.output_text


def test_logprobs(client: openai.OpenAI, real: Process) -> None:
    answer = client.responses.create(**fields(include=["message.output_text.logprobs"], top_logprobs=2))
    (item,) = answer.output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 30
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == part.text
    body = {"input": "import os\n", "max_output_tokens": 30, "seed": 3, "ignore_eos": True, "top_logprobs": 2}
    found = streamed(real.url, body)
    told = [entry for event in found if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert told == [entry.to_dict() for entry in part.logprobs] == found[-4]["logprobs"]


def test_a_conversation_is_the_same_prompt_in_every_form(client: openai.OpenAI) -> None:
    def count(**changes: Any) -> int:
        usage = client.responses.create(**fields(max_output_tokens=1, **changes)).usage
        assert usage is not None
        return usage.input_tokens

    plain = count(input="x = 1")
    for item in (
        {"role": "user", "content": "x = 1"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x = 1"}]},
    ):
        assert count(input=[item]) == plain
    first = client.responses.create(**fields())
    turns: Any = [{"role": "user", "content": "import os\n"}, *first.output, {"role": "user", "content": "more"}]
    assert count(input=turns) > count(input=[turns[0], turns[2]])


class Answer(BaseModel):
    kind: Literal["a module", "a package"]
    good: bool


def test_the_answer_follows_a_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="embedded", input="import os\n", text_format=Answer, max_output_tokens=1500)
    assert isinstance(parsed.output_parsed, Answer)
    assert parsed.status == "completed"
    with client.responses.stream(model="embedded", input="import os\n", text_format=Answer, max_output_tokens=1500) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Answer)
    anything = client.responses.create(**fields({"ignore_eos": False}, text={"format": {"type": "json_object"}}))
    assert anything.output_text.startswith("{")
    bad: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "banana"}}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema") as refused:
        client.responses.create(**fields(text=bad))
    assert refused.value.param == "text.format.schema"


def test_nothing_is_kept(client: openai.OpenAI) -> None:
    made = client.responses.create(**fields(store=True))
    for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="this server keeps none"):
            call(made.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        client.responses.create(**fields(previous_response_id=made.id))


def test_what_codex_sends_is_taken(client: openai.OpenAI) -> None:
    developer: Any = [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]}]
    user: Any = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "import os"}]}]
    answer = client.responses.create(
        **fields(input=[*developer, *user]), instructions="You are a coding agent.", tool_choice="auto",
        parallel_tool_calls=False, reasoning={"effort": "medium", "summary": "auto"}, store=False, include=["reasoning.encrypted_content"],
        prompt_cache_key="0198-aaaa", text={"verbosity": "low"}, truncation="auto", tools=[{"type": "web_search"}],
    )  # fmt: skip
    assert answer.tools == [], "the model is told of no tool that this server can't run, and the response says so"
    assert answer.status == "incomplete"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"input": None}, "input", "input must be a string or a list of items, got null"),
        ({"input": []}, "input", "at least one"),
        ({"input": ["x"]}, "input[0]", "must be an object"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "must be system, developer, user or assistant"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]", "reads text only"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content", "must be a list of parts"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": []}]}]},
            "input[0].output[0]",
            "reads text only",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "send the item itself"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0]", 'of type "computer_call_output"'),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "must be a string"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be"),
        ({"max_output_tokens": 10_000}, "max_output_tokens", "lower max_output_tokens to at most"),
        ({"max_output_tokens": 1.5}, "max_output_tokens", "must be an integer"),
        ({"temperature": 1e999}, "temperature", "temperature must be"),
        ({"top_logprobs": 21}, "top_logprobs", "top_logprobs must be"),
        ({"truncation": "middle"}, "truncation", "must be auto or disabled"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format", "text.format must be"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "with a schema"),
        ({"tools": [{"type": "custom", "name": "apply_patch"}]}, "tools[0]", "knows tools of type function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "must be a string"),
        ({"tool_choice": "required"}, "tool_choice", "there is none"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "tool_choice must be"),
        ({"conversation": "conv_1"}, "conversation", "conversation is not supported"),
        ({"background": True}, "background", "background is not supported"),
        ({"max_tokens": 5}, "max_tokens", "unknown field"),
        ({"metadata": {"a": 5}}, "metadata.a", "must be a string"),
    ],
)
def test_what_is_wrong_is_named(fake: Server, change: dict[str, Any], param: str, message: str) -> None:
    body = json.dumps({"max_output_tokens": 5, "input": "a"} | change)
    answer = http.post(fake.url + PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert re.search(message, error["message"]), error
    assert error["param"] == param


def test_a_broken_engine_ends_a_stream_with_an_event(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size))
    try:
        server.backend.go.clear()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
            stream = iter(client.responses.create(**fields(model="fake"), stream=True))
            assert next(stream).type == "response.created"
            server.backend.broken = True
            server.backend.go.set()
            *_, last = stream
        assert last.type == "response.failed"
        assert last.response.status == "failed"
        assert last.response.error is not None
        assert last.response.error.code == "server_error"
        assert "/secret" not in last.response.error.message
    finally:
        server.stop()


def test_hanging_up_frees_the_blocks(fake: Server) -> None:
    fake.backend.delay_s = 0.01
    fake.backend.go.clear()
    steps = fake.engine.stats().steps
    with http.stream("POST", fake.url + PATH, json={"input": "a", "max_output_tokens": 400, "ignore_eos": True, "stream": True}):
        wait_until(lambda: fake.engine.stats().running == 1, "it runs")
    fake.backend.go.set()
    wait_clean(fake.url)
    fake.backend.delay_s = 0.0
    assert fake.engine.stats().steps - steps < 300, "it did not go on to the end"
