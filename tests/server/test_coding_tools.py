"""The requests that Claude Code 2.1, Codex 0.171 and opencode 1.18 send, in their shapes but in our words, and what becomes of them.

``tests/clients/test_coding_tools.py`` runs the tools themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.harness import Server, http, named_events
from server.scripted import ScriptedBackend, serve_scripted
from server.sdk_types import check_messages, check_responses

STRICT = """{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{%- if message.role == 'user' and not loop.first and loop.previtem.role == 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- endfor %}"""
BETAS = "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,mid-conversation-tool-changes-2026-07-01"
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module", params=["", STRICT], ids=["any-order", "strict"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """With a template that takes messages in any order, as Qwen3's does, and with one that is strict, as many are."""
    made = serve_scripted("thinking", template_end=request.param)
    yield made
    made.stop()


def claude(server: Server, *turns: dict[str, Any], tools: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Events of a request as Claude Code makes them."""
    reminder = {"type": "text", "text": "<system-reminder>\nCommits end with a line.\n</system-reminder>\n"}
    body = {
        "model": "fake", "max_tokens": 3000, "stream": True, "metadata": {"user_id": '{"device_id":"0","session_id":"1"}'},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.b94; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            {"role": "user", "content": [reminder, {"type": "text", "text": "What runs?"}]},
            {"role": "system", "content": [{"type": "text", "text": "# Environment\nTools by ToolSearch: CronList, Monitor"}]},
            *turns,
        ],
        "tools": tools, "thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, **fields,
    }  # fmt: skip
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": BETAS, "authorization": "Bearer none", "x-app": "cli"}
    answer = http.post(server.url + "/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return check_messages(named_events(answer.text))


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "description": f"What {name} does", "input_schema": NOTHING, **fields}


SEARCH, PLACEHOLDER = tool("ToolSearch"), tool("DeferredToolPlaceholder", defer_loading=True)


def used(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that a message uses, as blocks for the next request."""
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    return [block for block in blocks if block["type"] == "tool_use"]


def result(use: dict[str, Any], content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": use["id"], "content": content, **fields}


def test_claude_code_loads_a_tool_and_calls_it(server: Server, backend: ScriptedBackend) -> None:
    backend.says = "I look." + call("ToolSearch") + call("CronList")
    (search,) = used(claude(server, tools=[SEARCH, PLACEHOLDER]))
    assert search["name"] == "ToolSearch", "CronList is not loaded yet"
    assert "What ToolSearch does" in backend.prompt
    assert "DeferredToolPlaceholder" not in backend.prompt, "the model is not told of what it may not call"
    assert "billing" not in backend.prompt
    before = backend.prompt
    turns = [
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, search]},
        {"role": "user", "content": [result(search, [{"type": "tool_reference", "tool_name": "CronList"}])]},
    ]
    backend.says = call("CronList") + call("Monitor")
    loaded = [tool("CronList", defer_loading=True), SEARCH, tool("Monitor", defer_loading=True), PLACEHOLDER]
    events = claude(server, *turns, tools=loaded)
    assert [block["name"] for block in used(events)] == ["CronList"], "and not Monitor, of which no message has spoken"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert backend.prompt.startswith(before), "nothing before the tool's result is another, so all of it is in the cache"
    told = json.loads(backend.prompt.split("<function>")[1].split("</function>")[0])
    assert told == {"name": "CronList", "description": "What CronList does", "parameters": NOTHING}
    assert "What Monitor does" not in backend.prompt


def test_claude_code_tools_that_come_and_go(server: Server, backend: ScriptedBackend) -> None:
    def change(kind: str, **tool: Any) -> dict[str, Any]:
        return {"role": "system", "content": [{"type": kind, "tool": tool}]}

    backend.says = call("Read") + call("late") + call("named")
    coming = (
        change("tool_addition", type="tool_definition", definition=tool("late")),
        change("tool_addition", type="tool_reference", name="named"),
    )
    given = [tool("Read"), tool("named", defer_loading=True)]
    assert [use["name"] for use in used(claude(server, *coming, tools=given))] == ["Read", "late", "named"]
    listed, spoken = backend.prompt.split("# Environment")
    assert "What late does" not in listed
    assert spoken.index("What late does") < spoken.index("What named does")
    going = (
        *coming,
        change("tool_removal", type="tool_reference", name="late"),
        change("tool_removal", type="tool_reference", name="Read"),
    )
    assert [use["name"] for use in used(claude(server, *going, tools=given))] == ["named"]
    assert "The tool late is no longer available." in backend.prompt


def test_only_tools_that_come_later(server: Server, backend: ScriptedBackend) -> None:
    """A template without tools does not tell the model how to call one."""
    backend.says = call("named")
    assert used(claude(server, tools=[tool("named", defer_loading=True)])) == []
    addition = {"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": "named"}}]}
    assert [use["name"] for use in used(claude(server, addition, tools=[tool("named", defer_loading=True)]))] == ["named"]
    assert "What named does" in backend.prompt.split("# Environment")[0]


@pytest.mark.parametrize(("turn", "message"), [
    ({"role": "user", "content": [result({"id": "a"}, [{"type": "tool_reference", "tool_name": "x"}])]}, "the tool 'x', which is not"),
    ({"role": "user", "content": [result({"id": "a"}, [{"type": "tool_reference"}])]}, "tool_name must be a string"),
    ({"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "mcp_toolset_reference"}}]}, "tool must refer to a tool"),
    ({"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "tool_definition"}}]}, "definition must be an object"),
    ({"role": "system", "content": [{"type": "tool_removal", "tool": {"type": "tool_definition"}}]}, "tool must refer to a tool"),
    ({"role": "system", "content": [{"type": "image"}]}, "of type text, tool_addition and tool_removal"),
])  # fmt: skip
def test_what_is_wrong_with_a_tool_that_comes_later(server: Server, turn: dict[str, Any], message: str) -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}, turn], "tools": [SEARCH]}
    answer = http.post(server.url + "/v1/messages", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_tool_that_must_be_called_has_to_be_there(server: Server) -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}], "tools": [PLACEHOLDER], "tool_choice": {"type": "any"}}
    answer = http.post(server.url + "/v1/messages", json=body)
    assert (answer.status_code, "no message has spoken of one" in answer.text) == (400, True)


def test_claude_code_reads_a_picture_and_a_document(server: Server, backend: ScriptedBackend) -> None:
    """The model has asked for them, and is told. A user who sends one is told instead."""
    backend.says = "I can't see it."
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    uses = [{"type": "tool_use", "id": name, "name": "Read", "input": {"file_path": name}} for name in ("a.png", "b.pdf")]
    contents = [[{"type": "image", "source": source}], [{"type": "text", "text": "PDF file read"}, {"type": "document", "source": source}]]
    results = [result(use, content) for use, content in zip(uses, contents, strict=True)]
    claude(server, {"role": "assistant", "content": uses}, {"role": "user", "content": results}, tools=[tool("Read")])
    assert "<|tool|>[image: this model reads text only]" in backend.prompt
    assert "<|tool|>PDF file read\n[document: this model reads text only]" in backend.prompt
    beside = [result(uses[1], "PDF file read"), {"type": "document", "source": source}]  # 2.1.197
    claude(server, {"role": "assistant", "content": uses[1:]}, {"role": "user", "content": beside}, tools=[tool("Read")])
    assert "<|tool|>PDF file read<|user|>[document: this model reads text only]" in backend.prompt


def test_claude_code_thinks_between_its_calls(server: Server, backend: ScriptedBackend) -> None:
    backend.says = "<think>\nI need the file.\n</think>\n\nI read." + call("Read")
    events = claude(server, tools=[tool("Read")])
    thinking = {"type": "thinking", "thinking": "I need the file.", "signature": "unsigned"}
    (use,) = used(events)
    backend.says = "Done."
    turns = [{"role": "assistant", "content": [thinking, use]}, {"role": "user", "content": [result(use, "text", is_error=False)]}]
    assert claude(server, *turns, tools=[tool("Read")])[-2]["delta"]["stop_reason"] == "end_turn"


def test_claude_code_counts_parts_of_its_prompt(server: Server) -> None:
    for tools in ([], [tool("Read")]):
        body = {"model": "fake", "messages": [{"role": "user", "content": "foo"}], "tools": tools}
        answer = http.post(server.url + "/v1/messages/count_tokens?beta=true", json=body)
        assert answer.json()["input_tokens"] > 0


def codex(server: Server, *items: dict[str, Any]) -> list[dict[str, Any]]:
    """Events of a request as Codex makes them."""

    def message(role: str, *texts: str) -> dict[str, Any]:
        content = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "id": "msg_1", "role": role, "content": content}

    agents = {"type": "namespace", "name": "multi_agent_v1", "description": "Agents", "tools": [function("spawn_agent")]}
    body = {
        "model": "fake", "stream": True, "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"summary": "auto"},
        "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "01a2", "client_metadata": {"turn_id": "01a3"},
        "input": [
            message("developer", "You are a coding agent."), message("developer", "<skills>", "<permissions>"),
            message("user", "<environment_context>"), message("user", "hello"), *items,
        ],
        "tools": [function("exec_command"), function("view_image"), agents, {"type": "web_search", "external_web_access": True}],
    }  # fmt: skip
    answer = http.post(server.url + "/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    return check_responses(named_events(answer.text))


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name, "description": f"What {name} does", "strict": False, "parameters": NOTHING}


def test_codex_the_whole_round(server: Server, backend: ScriptedBackend) -> None:
    backend.says = "<think>\nI need a picture.\n</think>\n\nI look." + call("view_image", path="a.png") + call("spawn_agent")
    items = [event["item"] for event in codex(server) if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items[3]["namespace"] == "multi_agent_v1"
    outputs = [
        {"type": "function_call_output", "id": "fco_1", "call_id": items[2]["call_id"], "output": [
            {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "high"},
        ]},
        {"type": "function_call_output", "id": "fco_2", "call_id": items[3]["call_id"], "output": '{"agent_id":"1"}'},
    ]  # fmt: skip
    later = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>: none"}]}
    backend.says = "Done."
    events = codex(server, items[0] | {"encrypted_content": None}, *items[1:], *outputs, later)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Done."
    assert "<|tool|>[image: this model reads text only]" in backend.prompt
    assert backend.prompt.rindex('{"agent_id":"1"}') < backend.prompt.rindex("<permissions>: none")


def opencode(server: Server, *messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    body = {
        "model": "fake", "max_tokens": 1000, "messages": [{"role": "system", "content": "You are an agent."}, *messages],
        "stream": True, "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip
    answer = http.post(server.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_opencode_the_whole_round(server: Server, backend: ScriptedBackend) -> None:
    backend.says = "A title"
    title = opencode(server, {"role": "user", "content": "Generate a title:\n"}, {"role": "user", "content": "hello"})
    assert title[-1]["usage"]["completion_tokens"] > 0
    functions = [{"type": "function", "function": {"name": "read", "description": "", "parameters": {**NOTHING, "$schema": "x"}}}]
    backend.says = "<think>\nI need a file.\n</think>\n\n" + call("read", filePath="a.png")
    deltas = [c["delta"] for chunk in opencode(server, {"role": "user", "content": "hello"}, tools=functions) for c in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "read"
    thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert thought.strip() == "I need a file."
    whole = {"id": calls[0]["id"], "type": "function", "function": {"name": "read", "arguments": '{"filePath":"a.png"}'}}
    backend.says = "Done."
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [whole]},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "Image read successfully"},
        {"role": "user", "content": [{"type": "text", "text": "Attached media:"}, {"type": "text", "text": "ERROR: no image input"}]},
    ]
    last = opencode(server, *turns, tools=functions, tool_choice="auto")
    assert "".join(c["delta"].get("content") or "" for chunk in last for c in chunk["choices"]) == "Done."
    assert "Attached media:\nERROR: no image input" in backend.prompt
