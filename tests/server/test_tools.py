"""Calls of tools over HTTP, in the formats of three families of models, with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from quire.server.calls import answers, prompts
from server.harness import DEADLINE_S, Server, events, http, wait_clean
from server.scripted import ScriptedBackend, serve_scripted

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "What is the weather in Köln?"}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
}
TOOLS: Any = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
# In pieces that tokens cut: quotes, braces within a string, a letter of two bytes.
COLOGNE = '{"city": "Köln \\"am\\" {Rhein}", "days": 3}'
ONE = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": ' + COLOGNE + "}\n</tool_call>",
    "llama3": '<|python_tag|>{"name": "get_weather", "parameters": ' + COLOGNE + "}",
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": ' + COLOGNE + "}]",
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3": ONE["llama3"] + '; {"name": "now", "parameters": {}}',
    "mistral": "[TOOL_CALLS]get_weather[ARGS]" + COLOGNE + "[TOOL_CALLS]now[ARGS]{}",
}


def serve(template: str, *, template_end: str = "", **options: Any) -> Server:
    return serve_scripted(template, template_end=template_end, max_body_bytes=2_000_000, **options)


@pytest.fixture(scope="module", params=ONE)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[str, Server]]:
    server = serve(request.param)
    yield request.param, server
    server.stop()


@pytest.fixture(scope="module")
def thinking() -> Iterator[Server]:
    server = serve("thinking")
    yield server
    server.stop()


def says(server: Server, text: str) -> ScriptedBackend:
    assert isinstance(server.backend, ScriptedBackend)
    server.backend.says = text
    return server.backend


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0)


def ask(server: Server, **fields: Any) -> Any:
    answer = http.post(server.url + CHAT, json={"messages": [USER], "tools": TOOLS} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(server: Server, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """(the first choice, put together; its deltas)"""
    answer = http.post(server.url + CHAT, json={"messages": [USER], "tools": TOOLS, "stream": True} | fields)
    assert answer.status_code == 200, answer.text
    found = events(answer.text)
    assert found.pop() == "[DONE]"
    choices = [choice for event in found for choice in event["choices"] if choice["index"] == 0]
    deltas = [choice["delta"] for choice in choices]
    whole: dict[str, Any] = {"finish_reason": choices[-1]["finish_reason"], "content": "", "reasoning": "", "calls": []}
    for delta in deltas:
        whole["content"] += delta.get("content") or ""
        whole["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(whole["calls"])
                assert (call["type"], call["function"]["arguments"]) == ("function", "")
                whole["calls"].append([call["id"], call["function"]["name"], ""])
            whole["calls"][call["index"]][2] += call["function"]["arguments"]
    return whole, deltas


def test_a_call(family: tuple[str, Server]) -> None:
    name, server = family
    says(server, ONE[name])
    with client_of(server) as client:
        answer = client.chat.completions.create(model="fake", messages=[USER], tools=TOOLS)  # type: ignore[call-overload]
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", COLOGNE)
        with client.chat.completions.stream(model="fake", messages=[USER], tools=TOOLS) as stream:  # type: ignore[arg-type]
            kinds = [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert [(c.function.name, c.function.arguments) for c in final.message.tool_calls] == [("get_weather", COLOGNE)]
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert kinds.count("tool_calls.function.arguments.delta") > 5, "arguments come as they are written"
    assert server.backend.prompt.count("get_weather") == 1, "the template was given the tools"  # type: ignore[attr-defined]


def test_several_calls_and_their_results(family: tuple[str, Server]) -> None:
    """The whole round: calls, their results as messages, an answer."""
    name, server = family
    backend = says(server, "Let me see.\n\n" + TWO[name])
    with client_of(server) as client:
        messages: list[Any] = [USER]
        first = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.content == "Let me see."
        assert first.message.tool_calls is not None
        calls = first.message.tool_calls
        assert [call.function.name for call in calls] == ["get_weather", "now"]  # type: ignore[union-attr]
        assert len({call.id for call in calls}) == 2
        if name == "llama3":  # its template takes one call at a time
            first.message.tool_calls = calls[:1]
        messages.append(first.message)
        messages += [{"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 31}'} for call in first.message.tool_calls]
        backend.says = "It is 31 degrees."
        last = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS).choices[0]
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "It is 31 degrees.", None)
    assert '{"degrees": 31}' in backend.prompt
    assert '"arguments": {"city": "Köln' in backend.prompt.replace("parameters", "arguments"), "an object, not a text of JSON"
    if name == "mistral":
        assert calls[0].id in backend.prompt


def test_the_stream_says_what_the_whole_answer_says(family: tuple[str, Server]) -> None:
    name, server = family
    for text in (
        TWO[name],
        "Yes.",
        "Look: " + TWO[name][:-30],
        "no <tool_call>{} [TOOL_CALLS]x <|python_tag|>",
        " \n",
        TWO[name] + "\nSo.",
    ):
        says(server, text)
        choice = ask(server, seed=1)["choices"][0]
        whole, _ = streamed(server, seed=1)
        message = choice["message"]
        calls = message.get("tool_calls", [])
        assert whole["content"] == (message["content"] or "")
        assert [call[1:] for call in whole["calls"]] == [[call["function"]["name"], call["function"]["arguments"]] for call in calls]
        assert whole["finish_reason"] == choice["finish_reason"] == ("tool_calls" if calls else "stop")
        assert (message["content"] is None) == (bool(calls) and not whole["content"])


def test_one_call_at_most(family: tuple[str, Server]) -> None:
    """What comes after the first call is not even generated."""
    name, server = family
    backend = says(server, TWO[name] * 20)
    tokens = len(backend.script)
    backend.delay_s = 0.004  # a step takes time; without it all of them are over before anybody has read the first call
    try:
        for options in ({"parallel_tool_calls": False}, {"parallel_tool_calls": False, "n": 2}):
            answer = ask(server, max_tokens=3000, **options)
            for choice in answer["choices"]:
                assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [COLOGNE]
                assert choice["finish_reason"] == "tool_calls"
            assert answer["usage"]["completion_tokens"] < tokens / 5 * options.get("n", 1)
            whole, _ = streamed(server, max_tokens=3000, **options)
            assert [call[1:] for call in whole["calls"]] == [["get_weather", COLOGNE]]
            assert whole["finish_reason"] == "tool_calls"
        wait_clean(server.url)
    finally:
        backend.delay_s = 0.0


def test_cut_off(family: tuple[str, Server]) -> None:
    name, server = family
    tokens = says(server, ONE[name]).script
    for most in range(1, len(tokens) - 1, 5):
        choice = ask(server, max_tokens=most, parallel_tool_calls=most % 2 == 0)["choices"][0]
        calls = choice["message"].get("tool_calls", [])
        assert choice["finish_reason"] == "length"
        assert all(COLOGNE.startswith(call["function"]["arguments"].rstrip("\ufffd")) for call in calls)
        assert "[TOOL_CALLS]" not in (choice["message"]["content"] or ""), "special tokens are not shown"
        assert "python_tag" not in (choice["message"]["content"] or "")
    assert ask(server, max_tokens=len(tokens))["choices"][0]["finish_reason"] == "tool_calls"


def test_no_tools_no_calls(family: tuple[str, Server]) -> None:
    """Without tools, and with tool_choice none, text is text; special tokens are left out of it as always."""
    name, server = family
    backend = says(server, ONE[name])
    shown = ONE[name].replace("<|python_tag|>", "").replace("[TOOL_CALLS]", "")
    for fields in ({"tools": None}, {"tool_choice": "none"}, {"tool_choice": "none", "tools": None}):
        message = ask(server, **fields)["choices"][0]["message"]
        assert (message["content"], "tool_calls" in message) == (shown, False)
        assert "get_weather" not in backend.prompt
    assert ask(server, tools=None, skip_special_tokens=False)["choices"][0]["message"]["content"] == ONE[name]


def test_allowed_tools(family: tuple[str, Server]) -> None:
    name, server = family
    says(server, TWO[name])
    now = {"type": "function", "function": {"name": "now"}}
    for tools, called in (([now], ["now"]), ([now, TOOLS[0]], ["get_weather", "now"])):
        choice = ask(server, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}})["choices"][0]
        if name != "llama3" or len(called) == 2:  # there a call stands where a line begins, and not behind another text
            assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == called
    assert "get_weather" in server.backend.prompt, "the model is told of all"  # type: ignore[attr-defined]


def test_logprobs_and_token_ids_come_with_every_token(family: tuple[str, Server]) -> None:
    name, server = family
    tokens = says(server, "Hm. " + ONE[name]).script
    fields = {"logprobs": True, "return_token_ids": True}
    choice = ask(server, **fields)["choices"][0]
    assert choice["token_ids"] == tokens
    assert len(choice["logprobs"]["content"]) == len(tokens)
    answer = http.post(server.url + CHAT, json={"messages": [USER], "tools": TOOLS, "stream": True} | fields)
    choices = [choice for event in events(answer.text)[:-1] for choice in event["choices"]]
    assert [i for c in choices for i in c.get("token_ids", ())] == tokens
    assert sum(len(c["logprobs"]["content"]) for c in choices if c["logprobs"]) == len(tokens)


def test_stop_strings_work_in_calls_too(family: tuple[str, Server]) -> None:
    name, server = family
    says(server, ONE[name])
    choice = ask(server, stop=["{Rhein"])["choices"][0]
    assert choice["stop_reason"] == "{Rhein"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Köln \\"am\\" '


def test_older_names(family: tuple[str, Server]) -> None:
    name, server = family
    backend = says(server, TWO[name])
    fields: dict[str, Any] = {"tools": None, "functions": [WEATHER], "function_call": "auto"}
    choice = ask(server, **fields)["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": COLOGNE}
    assert "tool_calls" not in choice["message"]
    whole, deltas = streamed(server, **fields)
    assert whole["finish_reason"] == "function_call"
    assert deltas[1] == {"function_call": {"name": "get_weather", "arguments": ""}}
    assert "".join(delta["function_call"]["arguments"] for delta in deltas if "function_call" in delta) == COLOGNE
    backend.says = "31."
    result = {"role": "function", "name": "get_weather", "content": "31 degrees"}
    ask(server, **fields, messages=[USER, choice["message"], result])
    assert "31 degrees" in backend.prompt


def test_a_history_from_elsewhere(family: tuple[str, Server]) -> None:
    """Ids of any form; no content beside the calls."""
    _, server = family
    backend = says(server, "31.")
    call = {"id": "toolu_01A09q90qw90lq917835lq9", "type": "function", "function": {"name": "get_weather", "arguments": COLOGNE}}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "31 degrees"}
    for content in ({}, {"content": None}, {"content": ""}):
        ask(server, messages=[USER, {"role": "assistant", "tool_calls": [call]} | content, result])
        assert "31 degrees" in backend.prompt
        assert "Rhein" in backend.prompt


def test_templates_that_take_one_call_get_one() -> None:
    server = serve("llama3", template_end="{# This model only supports single tool-calls at once! #}")
    says(server, TWO["llama3"])
    message = ask(server)["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
    server.stop()


def test_tokenize_counts_what_a_chat_has(family: tuple[str, Server]) -> None:
    _, server = family
    backend = says(server, "Yes.")
    count = http.post(server.url + "/tokenize", json={"messages": [USER], "tools": TOOLS}).json()["count"]
    assert ask(server)["usage"]["prompt_tokens"] == count
    assert "get_weather" in backend.prompt


def test_reasoning(thinking: Server) -> None:
    backend = says(thinking, "<think>\nHm, <tool_call>?\n</think>\n\n" + TWO["hermes"])
    answer = ask(thinking)
    message = answer["choices"][0]["message"]
    ids = backend.script
    between = ids.index(backend.token("</think>")) - ids.index(backend.token("<think>")) - 1
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": between}
    assert message["reasoning"] == message["reasoning_content"] == "Hm, <tool_call>?"
    assert (message["content"], len(message["tool_calls"])) == (None, 2)
    whole, _ = streamed(thinking)
    assert (whole["reasoning"], whole["content"], len(whole["calls"])) == ("Hm, <tool_call>?", "", 2)
    backend.says = "<think>Hm.</think>Yes."
    for fields in ({}, {"tools": None}, {"tool_choice": "none"}):
        message = ask(thinking, **fields)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    message = ask(thinking, include_reasoning=False)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None}
    whole, _ = streamed(thinking, include_reasoning=False)
    assert (whole["reasoning"], whole["content"]) == ("", "Yes.")


def test_a_reasoning_behind_text_is_text(thinking: Server) -> None:
    for text, counted in (("Yes <think>Hm.</think>", False), (" \n<think>Hm.</think>Yes.", True)):
        says(thinking, text)
        answer = ask(thinking)
        assert ("reasoning" in answer["choices"][0]["message"]) is counted
        assert (answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0) is counted


def test_a_stream_says_that_it_lives_while_nothing_is_told(thinking: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies cut off what is silent, though tokens come all the time: of a reasoning that is left out."""
    monkeypatch.setattr(answers, "PING_S", 0.1)
    backend = says(thinking, "<think>" + "Hm. " * 20 + "</think>Yes.")
    backend.delay_s = 0.03
    try:
        fields = {"messages": [USER], "include_reasoning": False, "stream": True}
        text = http.post(thinking.url + CHAT, json=fields).text
    finally:
        backend.delay_s = 0.0
    silent = text[: text.index('"content":"Y')]
    assert silent.count(": ping") >= 2, text


def test_reasoning_that_the_prompt_has_begun(thinking: Server) -> None:
    backend = says(thinking, "Hm.\n</think>\nYes.")
    deep = {"chat_template_kwargs": {"deep": True}}
    message = ask(thinking, **deep)["choices"][0]["message"]
    assert backend.prompt.endswith("<think>\n")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    message = ask(thinking, chat_template_kwargs={"enable_thinking": False})["choices"][0]["message"]
    assert message["content"] == "Hm.\n</think>\nYes."


def test_a_message_that_goes_on_in_its_reasoning(thinking: Server) -> None:
    says(thinking, " see, <tool_call>?</think>Yes.")
    begun = {"messages": [USER, {"role": "assistant", "content": "<think>\nLet me"}], "continue_final_message": True}
    message = ask(thinking, add_generation_prompt=False, **begun)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("see, <tool_call>?", "Yes.")


def test_a_message_of_parts_goes_on_in_its_reasoning(thinking: Server) -> None:
    says(thinking, " see.</think>Yes.")
    begun = {"role": "assistant", "content": [{"type": "text", "text": "<think>\nLet me"}]}
    message = ask(thinking, add_generation_prompt=False, messages=[USER, begun], continue_final_message=True)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("see.", "Yes.")
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    fields = {"messages": [USER, begun | {"tool_calls": [call]}], "continue_final_message": True, "add_generation_prompt": False}
    answer = http.post(thinking.url + CHAT, json=fields)
    assert answer.status_code == 400
    assert "continues a text" in answer.json()["error"]["message"]


def test_what_a_model_refused_to_say_is_part_of_the_history(thinking: Server) -> None:
    backend = says(thinking, "Yes.")
    ask(thinking, messages=[USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}, USER])
    assert "I will not." in backend.prompt


def test_a_call_that_a_stop_string_cuts_is_none(family: tuple[str, Server]) -> None:
    name, server = family
    says(server, ONE[name])
    choice = ask(server, stop="Rhein")["choices"][0]
    assert choice["finish_reason"] == "stop"
    whole, _ = streamed(server, stop="Rhein")
    assert whole["finish_reason"] == "stop"


def test_line_breaks_in_arguments_are_written_as_json_has_them(family: tuple[str, Server]) -> None:
    """Small models break the lines of the code that they pass."""
    name, server = family
    says(server, ONE[name].replace("Köln", "Kö\nl\tn"))
    for arguments in (
        ask(server)["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"], streamed(server)[0]["calls"][0][2]
    ):  # fmt: skip
        assert json.loads(arguments)["city"] == 'Kö\nl\tn "am" {Rhein}'


def test_line_breaks_in_arguments_that_are_a_string() -> None:
    server = serve("hermes")
    says(server, '<tool_call>{"name": "now", "arguments": "{\\n\\"city\\": \\"a\\nb\\"}"}</tool_call>')
    for arguments in (
        ask(server)["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"], streamed(server)[0]["calls"][0][2]
    ):  # fmt: skip
        assert json.loads(arguments) == {"city": "a\nb"}
    server.stop()


def test_reasoning_that_a_prompt_that_was_cut_has_begun(thinking: Server) -> None:
    says(thinking, "Hm.</think>Yes.")
    message = ask(thinking, chat_template_kwargs={"deep": True}, truncate_prompt_tokens=6)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


def test_what_is_long_is_not_done_on_the_event_loop() -> None:
    short = {"role": "user", "content": [{"type": "text", "text": "a"}], "x": [{"y": [1, None]}]}
    assert prompts._size([short, None]) < 100
    for long in ("a" * 10_000, [0] * 4_000_000, [[]] * 10_000, {str(i): i for i in range(10_000)}, [[["a" * 5_000]], {"b": "c" * 5_000}]):
        assert prompts._size([short | {"x": long}, None]) >= prompts.LONG_TEXT


def test_reasoning_effort(thinking: Server) -> None:
    backend = says(thinking, "Yes.")
    prompts = []
    for fields in ({"reasoning_effort": "none"}, {"reasoning_effort": "low"}, {}):
        ask(thinking, **fields)
        prompts.append(backend.prompt.endswith("<think></think>"))
    assert prompts == [True, False, False]
    ask(thinking, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})  # what is said of the template is closer
    assert not backend.prompt.endswith("<think></think>")


def test_options() -> None:
    for options, said in (({"reasoning_parser": "none"}, "<think>Hm.</think>"), ({"tool_parser": "llama3"}, "")):
        server = serve("thinking", **options)
        says(server, '<think>Hm.</think>{"name": "now", "parameters": {}}')
        message = ask(server)["choices"][0]["message"]
        assert (message["content"] or "").startswith(said)
        assert ("tool_calls" in message) == ("tool_parser" in options)
        server.stop()
    server = serve("hermes", tool_parser="none")
    answer = http.post(server.url + CHAT, json={"messages": [USER], "tools": TOOLS})
    assert answer.status_code == 400
    assert "--tool-parser none" in answer.json()["error"]["message"]
    server.stop()


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def nested(depth: int) -> Any:
    value: Any = {"type": "object"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


NAMED = {"type": "function", "function": {"name": "nope"}}
WRONG: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"tools": []}, "tools", ("empty",)),
    ({"tools": {}}, "tools", ("a list",)),
    ({"tools": [5]}, "tools.0", ("an object",)),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]", ('"custom"', '"function"')),
    ({"tools": [{"type": "function"}]}, "tools[0].function", ("an object", "null")),
    (function(name=""), "tools[0].function.name", ("1 to 128", '""')),
    (function(name="a b"), "tools[0].function.name", ('"a b"',)),
    (function(name="a" * 129), "tools[0].function.name", ("1 to 128",)),
    (function(name=5), "tools[0].function.name", ("got 5",)),
    (function(parameters=[]), "tools[0].function.parameters", ("an object", "[]")),
    (function(parameters={"type": "string"}), "tools[0].function.parameters", ("object", '"string"')),
    (function(description=5), "tools[0].function.description", ("a string",)),
    (function(strict="yes"), "tools[0].function.strict", ("true or false",)),
    (function(parameters=nested(40)), "tools", ("levels", "64")),
    (function(description="x" * 300_000), "tools", ("300,", "262,144")),
    ({"tools": function()["tools"] * 2}, "tools", ("'f'",)),
    ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools", ("129", "128")),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", ("needs tools",)),
    ({"tools": None, "tool_choice": NAMED}, "tool_choice", ("needs tools",)),
    ({"tool_choice": NAMED}, "tool_choice", ("'nope'", "get_weather, now")),
    ({"tool_choice": "sometimes"}, "tool_choice", ("sometimes", "required")),
    ({"tool_choice": {"type": "function"}}, "tool_choice", ('"required"',)),
    ({"tool_choice": 5}, "tool_choice", ("got 5",)),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "tool_choice", ("allowed_tools", "list")),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}}, "tool_choice", ("'nope'",)),
    ({"functions": [WEATHER]}, "functions", ("older names",)),
    ({"tools": None, "functions": []}, "functions", ("empty",)),
    ({"tools": None, "functions": [WEATHER], "function_call": {"name": "nope"}}, "function_call", ("'nope'",)),
    ({"tools": None, "function_call": {"name": "now"}}, "function_call", ("needs functions",)),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 5}]}, "messages[1].tool_calls", ("a list",)),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
     "messages", ("surrogate",)),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 900 + "]" * 900}}]}]},
     "messages[1].tool_calls[0].function.arguments", ("100 levels",)),
    ({"messages": [USER, {"role": "tool", "tool_call_id": "x"}]}, "messages[1].content", ("missing",)),
]  # fmt: skip


def test_wrong_requests_are_told_what_is_wrong(family: tuple[str, Server]) -> None:
    name, server = family
    if name != "hermes":
        pytest.skip("the same code for all")
    says(server, "Yes.")
    for fields, param, words in WRONG:
        for stream in (False, True):
            answer = http.post(server.url + CHAT, json={"messages": [USER], "tools": TOOLS, "stream": stream} | fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), (fields, error)
            assert all(word in error["message"] for word in words), error
    nan = json.dumps({"messages": [USER], "tools": [{"function": {"name": "f", "parameters": {"minimum": float("nan")}}}]})
    answer = http.post(server.url + CHAT, content=nan, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not finite" in answer.json()["error"]["message"]
    wait_clean(server.url)
