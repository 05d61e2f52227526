"""Calls that are insisted on: a grammar allows nothing else, also for a model that has never seen a tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from server.harness import DEADLINE_S, Process, Server, http, wait_clean
from server.scripted import TEMPLATES, serve_scripted
from server.test_tools import CHAT, USER, ask, streamed

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "Paris", 'New "York" {City}']},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"type": "array", "items": {"enum": ["C", "F"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "days", "units"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": CITY, "now": NOTHING}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request: pytest.FixtureRequest) -> Iterator[Server]:
    """On a fake backend, which says anything that is allowed."""
    server = serve_scripted(request.param)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def embedded() -> Iterator[Process]:
    process = Process("--tool-parser", "hermes", "--kv-memory", "64MiB")
    yield process
    process.kill()


def check(calls: list[tuple[str, str]]) -> None:
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_required_and_named(family: Server) -> None:
    for choice, parallel in (("required", False), (NAMED, True)):
        fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 300}
        for seed in range(3):
            (made,) = ask(family, seed=seed, **fields)["choices"]
            message = made["message"]
            if made["finish_reason"] == "length":
                assert message["reasoning"], "a model that thinks may do so for as long as it likes"
                continue
            assert (made["finish_reason"], message["content"]) == ("tool_calls", None)
            check([(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]])
            assert len(message["tool_calls"]) == 1
            assert choice == "required" or message["tool_calls"][0]["function"]["name"] == "get_weather"
            whole, _ = streamed(family, seed=seed, **fields)
            assert [call[1:] for call in whole["calls"]] == [
                [c["function"]["name"], c["function"]["arguments"]] for c in message["tool_calls"]
            ]
            assert whole["content"] == ""
    wait_clean(family.url)


def test_calls_or_the_form_of_the_answer(family: Server) -> None:
    """What agents with a typed result send: neither keeps the other from coming."""
    answer = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": answer, "strict": True}}
    forms: list[Any] = [{"response_format": format}, {"structured_outputs": {"json": answer, "disable_any_whitespace": True}}]
    seen = set()
    for seed in range(60):
        (made,) = ask(family, seed=seed, tools=TOOLS, **forms[seed % 2], parallel_tool_calls=False, max_tokens=300)["choices"]
        message = made["message"]
        if made["finish_reason"] == "length":
            continue
        seen.add(made["finish_reason"])
        if made["finish_reason"] == "tool_calls":
            assert message["content"] is None
            check([(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]])
        else:
            assert "tool_calls" not in message
            jsonschema.validate(json.loads(message["content"]), answer)
    assert seen == {"tool_calls", "stop"}
    wait_clean(family.url)


def test_the_embedded_model_calls_functions(embedded: Process) -> None:
    fields: dict[str, Any] = {"model": "embedded", "messages": [USER], "tools": TOOLS, "max_tokens": 200, "temperature": 1.5}
    with openai.OpenAI(base_url=embedded.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
        for seed in range(4):
            answer = client.chat.completions.create(**fields, seed=seed, tool_choice="required", parallel_tool_calls=False, n=2)
            for choice in answer.choices:
                assert choice.finish_reason == "tool_calls"
                check([(call.function.name, call.function.arguments) for call in choice.message.tool_calls])
        answer = client.chat.completions.create(**fields, seed=1, tool_choice=NAMED)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        with client.chat.completions.stream(**fields, seed=1, tool_choice=NAMED) as stream:
            again = stream.get_final_completion().choices[0]
        assert again.message.tool_calls is not None
        assert [c.function.arguments for c in again.message.tool_calls] == [call.function.arguments]
        old = client.chat.completions.create(
            model="embedded", messages=[USER], max_tokens=200, seed=2,  # type: ignore[arg-type, list-item]
            functions=[tool["function"] for tool in TOOLS], function_call={"name": "get_weather"},
        ).choices[0]  # fmt: skip
        assert old.finish_reason == "function_call"  # type: ignore[comparison-overlap]
        assert old.message.function_call is not None
        check([(old.message.function_call.name, old.message.function_call.arguments)])
    wait_clean(embedded.url)


def test_many_functions(embedded: Process) -> None:
    """Descriptions are most of a schema, and no part of the grammar."""
    text = {"type": "string", "enum": ["a", "b"], "description": "something" * 10, "title": "A"}
    parameters = {"type": "object", "properties": {f"p{i}": text for i in range(8)}, "required": ["p0"], "additionalProperties": False}
    parameters["properties"] |= {"description": text, "title": text}  # type: ignore[operator]
    tools = [{"type": "function", "function": {"name": f"function_{i}", "parameters": parameters}} for i in range(128)]
    body = {"messages": [USER], "tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    answer = http.post(embedded.url + CHAT, json=body)
    assert answer.status_code == 200, answer.text
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


def test_what_cannot_be_insisted_on(embedded: Process) -> None:
    bad = {"type": "object", "properties": {"a": {"not": {"const": 1}}}}
    for parameters, more, param in (
        ({"$ref": "#/$defs/absent"}, {}, "tools"),
        (bad, {"strict": True}, "tools"),
    ):
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters} | more}]
        body = {"messages": [USER], "tools": tools, "tool_choice": "required"}
        answer = http.post(embedded.url + CHAT, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        assert "<tool_call>" not in answer.text, "a grammar that nobody has written is not shown"
    answer = http.post(embedded.url + CHAT, json={"messages": [USER], "tools": TOOLS, "tool_choice": "required", "beam_width": 2})
    assert answer.status_code == 400
    assert "beam search" in answer.json()["error"]["message"]
