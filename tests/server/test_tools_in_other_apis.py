"""Tools, their results and reasoning in /v1/messages and /v1/responses, with the official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from quire.server.anthropic.conversation import chat_request as from_messages
from quire.server.anthropic.reply import Reply as MessagesReply
from quire.server.anthropic.schemas import CountTokensRequest
from quire.server.anthropic.tools import GivenTools as GivenMessagesTools
from quire.server.responses.conversation import chat_request as from_responses
from quire.server.responses.reply import Reply as ResponsesReply
from quire.server.responses.schemas import ResponsesRequest
from quire.server.responses.tools import GivenTools
from server.harness import DEADLINE_S, Server, http, named_events
from server.scripted import ScriptedBackend, serve_scripted
from server.sdk_types import check_messages, check_responses

USER: Any = {"role": "user", "content": "What is the weather in Köln?"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
COLOGNE = {"city": 'Köln "am" {Rhein}', "days": 3}
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": '
    + json.dumps(COLOGNE, ensure_ascii=False)
    + '}\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
THOUGHT = "<think>\nThe user asks for weather.\n</think>\n\n"
MESSAGES_TOOLS: Any = [
    {"name": "get_weather", "description": "The weather", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"name": "now", "input_schema": {"type": "object"}},
]
RESPONSES_TOOLS: Any = [
    {"type": "function", "name": "get_weather", "description": "The weather", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "web_search"},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = serve_scripted("thinking")
    yield made
    made.stop()


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
        yield client


def message_events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    body = {"max_tokens": 500, "stream": True} | fields
    return check_messages(named_events(http.post(server.url + "/v1/messages", json=body).text))


def response_events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    return check_responses(named_events(http.post(server.url + "/v1/responses", json={"stream": True} | fields).text))


def test_messages_the_whole_round(backend: ScriptedBackend, claude: anthropic.Anthropic) -> None:
    """Thinking, a sentence, two calls; their results; an answer."""
    backend.says = THOUGHT + "Let me see." + CALLS
    fields: dict[str, Any] = {"model": "fake", "max_tokens": 500, "tools": MESSAGES_TOOLS}
    first = claude.messages.create(messages=[USER], **fields)
    assert first.stop_reason == "tool_use"
    thinking, text, weather, now = first.content
    assert thinking.type == "thinking"
    assert thinking.thinking.strip() == "The user asks for weather."
    assert thinking.signature
    assert text.type == "text"
    assert text.text == "Let me see."
    assert weather.type == "tool_use"
    assert now.type == "tool_use"
    assert (weather.name, weather.input, now.name, now.input) == ("get_weather", COLOGNE, "now", {})
    assert weather.id != now.id
    backend.says = "It is 31 degrees."
    results: Any = [
        {"type": "tool_result", "tool_use_id": weather.id, "content": [{"type": "text", "text": '{"degrees": 31}'}]},
        {"type": "tool_result", "tool_use_id": now.id, "content": "no clock", "is_error": True},
        {"type": "text", "text": "And be brief."},
    ]
    turns: Any = [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    last = claude.messages.create(messages=turns, **fields)
    assert (last.stop_reason, [block.to_dict() for block in last.content]) == ("end_turn", [{"type": "text", "text": "It is 31 degrees."}])
    assert backend.prompt.count('"parameters"') == 2, "the template was given the tools"
    after = backend.prompt.split("Köln?")[1]
    assert '"arguments": {"city": "Köln' in after, "an object, not a text of JSON"
    assert after.index("<|tool|>") < after.index('{"degrees": 31}') < after.index("Error: no clock") < after.index("<|user|>And be brief.")


def test_messages_streams_what_the_whole_answer_says(server: Server, backend: ScriptedBackend, claude: anthropic.Anthropic) -> None:
    backend.says = THOUGHT + "Let me see." + CALLS
    fields: dict[str, Any] = {"messages": [USER], "tools": MESSAGES_TOOLS}
    whole = claude.messages.create(model="fake", max_tokens=500, **fields)
    with claude.messages.stream(model="fake", max_tokens=500, **fields) as stream:
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [
        block.to_dict() | ({"id": theirs.id} if block.type == theirs.type == "tool_use" else {})
        for block, theirs in zip(whole.content, final.content, strict=True)
    ]
    assert final.stop_reason == "tool_use"
    found = message_events(server, **fields)
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2, 3]
    assert [event["content_block"]["type"] for event in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert starts[2]["content_block"]["input"] == {}
    open_block = -1
    for event in found[1:-2]:  # one block at a time
        if event["type"] == "content_block_start":
            assert open_block == -1
            open_block = event["index"]
        assert event["index"] == open_block
        if event["type"] == "content_block_stop":
            open_block = -1
    pieces = [event["delta"]["partial_json"] for event in found if event.get("index") == 2 and "delta" in event]
    assert len(pieces) > 3, "arguments come as they are written"
    assert json.loads("".join(pieces)) == COLOGNE
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


def test_arguments_that_are_no_json_are_handed_back_as_they_are(backend: ScriptedBackend, claude: anthropic.Anthropic) -> None:
    """A tool that is called with nothing might do something."""
    for text in ('{"city": "Rome",}', '{"city": "\\x41"}', '{"days": 1e999}'):
        backend.says = f'<tool_call>\n{{"name": "get_weather", "arguments": {text}}}\n</tool_call>'
        (block,) = claude.messages.create(model="fake", max_tokens=300, messages=[USER], tools=MESSAGES_TOOLS).content
        assert block.type == "tool_use"
        assert block.input == {"INVALID_JSON": text}


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_runner_of_tools(backend: ScriptedBackend, claude: anthropic.Anthropic, stream: bool) -> None:
    """It asks for a conversation kept by the server first, and sends it whole where it is told that there is none."""
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather."""
        asked.append(city)
        backend.says = "It is warm."
        return "31 degrees"

    backend.says = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    run = claude.beta.messages.tool_runner(model="fake", max_tokens=300, messages=[USER], tools=[get_weather], stream=stream)  # type: ignore[call-overload]
    assert run.until_done().content[-1].text == "It is warm."
    assert asked == ["Rome"]
    assert "31 degrees" in backend.prompt


def test_messages_tool_choice(backend: ScriptedBackend, claude: anthropic.Anthropic) -> None:
    backend.says = CALLS
    fields: dict[str, Any] = {"model": "fake", "max_tokens": 500, "messages": [USER], "tools": MESSAGES_TOOLS}
    one = claude.messages.create(tool_choice={"type": "auto", "disable_parallel_tool_use": True}, **fields)
    assert [block.to_dict().get("name") for block in one.content] == ["get_weather"]
    assert one.stop_reason == "tool_use"
    none = claude.messages.create(tool_choice={"type": "none"}, **fields)
    assert [block.type for block in none.content] == ["text"]
    assert "get_weather" not in backend.prompt.split("<|user|>")[0]
    with pytest.raises(anthropic.BadRequestError, match="not among the tools"):
        claude.messages.create(tool_choice={"type": "tool", "name": "other"}, **fields)
    counted = claude.messages.count_tokens(model="fake", messages=[USER], tools=MESSAGES_TOOLS).input_tokens
    usage = claude.messages.create(**fields).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0), "tools are counted too"


def test_messages_thinking_is_what_the_template_is_told(backend: ScriptedBackend, claude: anthropic.Anthropic) -> None:
    backend.says = "Hello"
    for thinking, told in (
        ({"type": "disabled"}, True),
        ({"type": "adaptive"}, False),
        ({"type": "enabled", "budget_tokens": 1024}, False),
    ):
        answer = claude.messages.create(model="fake", max_tokens=50, messages=[USER], thinking=thinking)  # type: ignore[arg-type]
        assert answer.content[0].type == "text"
        assert backend.prompt.endswith("<think></think>") == told


def test_messages_a_call_that_is_cut_off(server: Server, backend: ScriptedBackend, claude: anthropic.Anthropic) -> None:
    backend.says = CALLS
    answer = claude.messages.create(model="fake", max_tokens=24, messages=[USER], tools=MESSAGES_TOOLS)
    assert answer.stop_reason == "max_tokens"
    with claude.messages.stream(model="fake", max_tokens=24, messages=[USER], tools=MESSAGES_TOOLS) as stream:
        final = stream.get_final_message()
    assert [block.to_dict().get("input") for block in answer.content] == [block.to_dict().get("input") for block in final.content]


def test_responses_the_whole_round(backend: ScriptedBackend, gpt: openai.OpenAI) -> None:
    backend.says = THOUGHT + "Let me see." + CALLS
    fields: dict[str, Any] = {"model": "fake", "tools": RESPONSES_TOOLS}
    turns: list[Any] = [USER]
    first = gpt.responses.create(input=turns, **fields)
    assert first.status == "completed"
    assert [tool.type for tool in first.tools] == ["function", "function"], "what the model was told of"
    reasoning, message, weather, now = first.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text.strip() == "The user asks for weather."
    assert message.type == "message"
    assert first.output_text == "Let me see."
    assert weather.type == "function_call"
    assert now.type == "function_call"
    assert (weather.name, json.loads(weather.arguments), now.name, now.arguments) == ("get_weather", COLOGNE, "now", "{}")
    assert weather.call_id != now.call_id
    backend.says = "It is 31 degrees."
    turns += [item.to_dict() for item in first.output]
    turns += [
        {"type": "function_call_output", "call_id": weather.call_id, "output": '{"degrees": 31}'},
        {"type": "function_call_output", "call_id": now.call_id, "output": [{"type": "input_text", "text": "12:00"}]},
    ]
    last = gpt.responses.create(input=turns, **fields)
    assert (last.output_text, len(last.output)) == ("It is 31 degrees.", 1)
    after = backend.prompt.split("Köln?")[1]
    assert after.count("<|assistant|>") == 2, "reasoning, message and calls are one message"
    assert after.index('"arguments": {"city": "Köln') < after.index('<|tool|>{"degrees": 31}') < after.index("<|tool|>12:00")


def test_responses_streams_what_the_whole_answer_says(server: Server, backend: ScriptedBackend, gpt: openai.OpenAI) -> None:
    backend.says = THOUGHT + "Let me see." + CALLS
    fields: dict[str, Any] = {"input": [USER], "tools": RESPONSES_TOOLS}
    whole = gpt.responses.create(model="fake", **fields)
    with gpt.responses.stream(model="fake", **fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 2
    assert final.output_text == whole.output_text
    parsed = [item.parsed_arguments for item in final.output if item.type == "function_call"]
    assert parsed[0] == COLOGNE, "the client's own parser of strict functions"
    found = response_events(server, **fields)
    items = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert items == found[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    for index, kind in ((0, "response.reasoning_text"), (2, "response.function_call_arguments")):
        mine = [event for event in found if event.get("output_index") == index]
        text = "".join(event["delta"] for event in mine if event["type"] == f"{kind}.delta")
        (done,) = (event for event in mine if event["type"] == f"{kind}.done")
        assert text == done["text" if index == 0 else "arguments"]
        assert len([event for event in mine if event["type"] == f"{kind}.delta"]) > 3


def test_responses_tool_choice_and_namespaces(backend: ScriptedBackend, gpt: openai.OpenAI) -> None:
    backend.says = CALLS
    fields: dict[str, Any] = {"model": "fake", "input": [USER], "tools": RESPONSES_TOOLS}
    allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}
    answer = gpt.responses.create(tool_choice=allowed, **fields)
    assert "get_weather" in backend.prompt, "the same prompt, which may be cached; only the calls are others"
    assert [item.name for item in answer.output if item.type == "function_call"] == ["now"]
    one = gpt.responses.create(parallel_tool_calls=False, **fields)
    assert [item.type for item in one.output] == ["function_call"]
    none = gpt.responses.create(tool_choice="none", **fields)
    assert [item.type for item in none.output] == ["message"]
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        gpt.responses.create(tool_choice={"type": "function", "name": "other"}, **fields)
    group: Any = [{"type": "namespace", "name": "clock", "description": "Time", "tools": [RESPONSES_TOOLS[1]]}, RESPONSES_TOOLS[0]]
    grouped = gpt.responses.create(model="fake", input=[USER], tools=group)
    calls = {item.name: item.namespace for item in grouped.output if item.type == "function_call"}
    assert calls == {"get_weather": None, "now": "clock"}


def test_what_is_wrong_with_a_tool_is_named_as_the_api_does(claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    for tool, message in (
        ({"name": "my tool", "input_schema": {}}, r"tools\[0\]\.name must be"),
        ({"name": "f", "input_schema": 5}, r"tools\[0\]\.input_schema must be an object, got 5"),
        ({"name": "f", "description": 5, "input_schema": {}}, r"tools\[0\]\.description must be a string"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=message):
            claude.messages.create(model="fake", max_tokens=5, messages=[USER], tools=[tool])  # type: ignore[list-item]
    for tool, param in (({"name": "my tool"}, "tools[0].name"), ({"name": "f", "parameters": 5}, "tools[0].parameters")):
        with pytest.raises(openai.BadRequestError) as refused:
            gpt.responses.create(model="fake", input="a", tools=[{"type": "function", **tool}])  # type: ignore[list-item]
        assert refused.value.param == param
        assert f"{param} must be" in refused.value.message


def test_pings_are_events_that_clients_skip() -> None:
    assert named_events(MessagesReply.ping.decode()) == [{"type": "ping"}]
    assert named_events(ResponsesReply.ping.decode()) == [], "a comment"


def test_conversations_of_anthropic_become_those_of_openai() -> None:
    def messages(*turns: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
        return from_messages(CountTokensRequest(messages=list(turns), **fields), GivenMessagesTools([])).messages

    def text(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    one, two = {"role": "user", "content": "one"}, {"role": "user", "content": text("two")}
    assert messages(one, two) == [{"role": "user", "content": text("one", "two")}], "turns of one role are one turn"
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking", "data": "x"}]
    uses = [{"type": "tool_use", "id": i, "name": "f", "input": {"ä": 1}} for i in "ab"]
    results = [{"type": "tool_result", "tool_use_id": i} for i in "ab"]
    made = messages(
        one,
        {"role": "assistant", "content": thinking},
        {"role": "assistant", "content": [*text("so"), *uses]},
        {"role": "user", "content": [*results, *text("two")]},
        {"role": "system", "content": "later"},
        system=text("first"),
    )
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": '{"ä": 1}'}} for i in "ab"]
    assert made == [
        {"role": "system", "content": text("first")},
        {"role": "user", "content": text("one")},
        {"role": "assistant", "content": text("so"), "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": text("two")},
        {"role": "system", "content": text("later")},
    ]


def test_conversations_of_responses_become_those_of_chat() -> None:
    def messages(input: Any, **fields: Any) -> list[dict[str, Any]]:
        return from_responses(ResponsesRequest(input=input, **fields), GivenTools([], None)).messages

    def text(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    developer, user = {"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "input_text", "text": "one"}]}
    assert messages("one") == [{"role": "user", "content": text("one")}]
    assert messages([developer, user])[0] == {"role": "developer", "content": text("be brief")}
    assert messages([developer, user], instructions="code")[:1] == [{"role": "system", "content": text("code", "be brief")}]
    call = {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "a", "name": "f", "arguments": "{}"}
    made = messages([
        user,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        call,
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        call | {"call_id": "b"},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        user,
    ])  # fmt: skip
    calls = {i: [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}}] for i in "ab"}
    assert made == [
        {"role": "user", "content": text("one")},
        {"role": "assistant", "content": [], "reasoning_content": "hm", "tool_calls": calls["a"]},
        {"role": "tool", "tool_call_id": "a", "content": text("1")},
        {"role": "assistant", "content": [], "tool_calls": calls["b"]},
        {"role": "tool", "tool_call_id": "b", "content": text("2")},
        {"role": "assistant", "content": text("so")},
        {"role": "user", "content": text("one")},
    ]
