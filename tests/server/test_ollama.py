"""Ollama's API, with its official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from server.harness import DEADLINE_S, Process, Server, http, wait_clean
from server.scripted import ScriptedBackend, serve_scripted

USER = {"role": "user", "content": "What is the weather in Köln?"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 24}


@pytest.fixture(scope="module")
def thinking() -> Iterator[Server]:
    server = serve_scripted("thinking")
    yield server
    server.stop()


def client_of(server: Process | Server) -> ollama.Client:
    return ollama.Client(host=server.url, timeout=DEADLINE_S)


def says(server: Server, text: str) -> ScriptedBackend:
    assert isinstance(server.backend, ScriptedBackend)
    server.backend.says = text
    return server.backend


def test_an_answer_is_that_of_the_chat_api(real: Process) -> None:
    usual = http.post(real.url + "/v1/chat/completions", json={"messages": [USER], "temperature": 0, "max_tokens": 24}).json()
    client = client_of(real)
    for name in ("embedded", "embedded:latest"):
        whole = client.chat(name, messages=[USER], options=GREEDY)
        parts = list(client.chat(name, messages=[USER], options=GREEDY, stream=True))
        assert whole.message.content == usual["choices"][0]["message"]["content"]
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        assert len(parts) > 5
        for last in (whole, parts[-1]):
            assert (last.model, last.done, last.done_reason, last.eval_count) == (name, True, "length", 24)
            assert last.prompt_eval_count == usual["usage"]["prompt_tokens"]
            assert last.total_duration >= last.eval_duration > 0  # type: ignore[operator]


def test_streams_are_lines_of_json(real: Process) -> None:
    answer = http.post(real.url + "/api/chat", json={"messages": [USER], "options": GREEDY})  # streamed if nothing is said
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(line["created_at"].endswith("Z") for line in lines)


def test_a_prompt_with_and_without_the_template(real: Process) -> None:
    client, prompt = client_of(real), "def add(a, b):"
    usual = http.post(real.url + "/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 24}).json()["choices"][0][
        "text"
    ]
    assert client.generate("embedded", prompt, raw=True, options=GREEDY).response == usual
    assert "".join(part.response or "" for part in client.generate("embedded", prompt, raw=True, options=GREEDY, stream=True)) == usual
    chat = client.chat(
        "embedded", messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}], options=GREEDY
    )
    assert client.generate("embedded", prompt, system="Be brief.", options=GREEDY).response == chat.message.content


def test_a_message_that_the_assistant_has_begun_is_continued(real: Process) -> None:
    client = client_of(real)
    whole = client.chat("embedded", messages=[USER], options=GREEDY).message.content
    assert whole
    begun = [USER, {"role": "assistant", "content": whole[:4]}]
    rest = client.chat("embedded", messages=begun, options={"temperature": 0, "num_predict": 4}).message.content
    same = {"messages": begun, "temperature": 0, "max_tokens": 4, "continue_final_message": True, "add_generation_prompt": False}
    assert rest == http.post(real.url + "/v1/chat/completions", json=same).json()["choices"][0]["message"]["content"]


def test_forms_and_log_probabilities(real: Process) -> None:
    client = client_of(real)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(client.chat("embedded", messages=[USER], format=schema).message.content or "")["a"] in (1, 2)
    made = client.generate("embedded", "x", format="json", options={"num_predict": 8, "seed": 1})
    assert (made.response or "").lstrip().startswith("{")
    whole = client.generate("embedded", "x", logprobs=True, top_logprobs=2, options=GREEDY)
    assert whole.logprobs is not None
    assert "".join(each.token for each in whole.logprobs) == whole.response
    assert all(len(each.top_logprobs or ()) == 2 for each in whole.logprobs)
    parts = [each for part in client.generate("embedded", "x", logprobs=True, top_logprobs=2, options=GREEDY, stream=True)
             for each in part.logprobs or ()]  # fmt: skip
    assert parts == whole.logprobs


def test_more_tokens_than_there_is_room_for_are_what_there_is(real: Process) -> None:
    answer = client_of(real).generate("embedded", "x", options={"num_predict": 1_000_000, "seed": 1, "temperature": 0})
    assert (answer.eval_count or 0) + (answer.prompt_eval_count or 0) <= 2048
    endless = client_of(real).generate("embedded", "x", options={"num_predict": -1, "seed": 1, "temperature": 0})
    assert endless.response == answer.response


def test_embeddings(real: Process) -> None:
    client, texts = client_of(real), ["def add(a, b):", "import os"]
    usual = [each["embedding"] for each in http.post(real.url + "/v1/embeddings", json={"input": texts}).json()["data"]]
    assert [list(each) for each in client.embed("embedded", texts).embeddings] == usual
    assert [list(client.embeddings("embedded", text).embedding) for text in texts] == usual
    assert len(client.embed("embedded", "x", dimensions=7).embeddings[0]) == 7
    assert len(client.embed("embedded", "long " * 3000).embeddings) == 1, "its end is cut, as the API has it"
    with pytest.raises(ollama.ResponseError, match="2,048"):
        client.embed("embedded", "long " * 3000, truncate=False)


def test_what_is_said_of_the_model(real: Process, thinking: Server) -> None:
    client = client_of(real)
    (listed,), (running,) = client.list().models, client.ps().models
    assert listed.model == running.model == "embedded"
    assert listed.details is not None
    assert (listed.details.family, listed.details.parameter_size, listed.details.quantization_level) == ("llama", "5.5M", "bfloat16")
    assert listed.size is not None
    assert listed.size > 10_000_000
    shown = client.show("embedded")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.parameter_count"] == 5_475_584
    assert shown.modelinfo["llama.context_length"] == running.context_length == 2048
    assert shown.capabilities == ["completion"]
    assert client_of(thinking).show("fake").capabilities == ["completion", "tools", "thinking"]
    assert http.post(real.url + "/api/show", json={"name": "embedded"}).status_code == 200, "the older name of model"
    assert tuple(map(int, http.get(real.url + "/api/version").json()["version"].split("."))) >= (0, 6, 4), "which some clients insist on"


def test_to_load_a_model_is_nothing_to_do(real: Process) -> None:
    client = client_of(real)
    assert client.generate("embedded").done_reason == "load"
    assert client.chat("embedded").done_reason == "load"
    assert client.generate("embedded", keep_alive=0).done_reason == "unload"


def test_calls_and_their_results(thinking: Server) -> None:
    client, backend = client_of(thinking), says(thinking, CALL)
    whole = client.chat("fake", messages=[USER], tools=[WEATHER])
    parts = list(client.chat("fake", messages=[USER], tools=[WEATHER], stream=True))
    for said, calls, done in (
        (whole.message.content, whole.message.tool_calls, whole),
        ("".join(part.message.content or "" for part in parts), [c for part in parts for c in part.message.tool_calls or ()], parts[-1]),
    ):
        assert said == "Let me see."
        assert calls
        assert [(call.function.name, call.function.arguments) for call in calls] == [("get_weather", {"city": "Köln"})]
        assert done.done_reason == "stop"
    says(thinking, "It rains.")
    messages = [USER, whole.message, {"role": "tool", "tool_name": "get_weather", "content": "rain"}]
    assert client.chat("fake", messages=messages, tools=[WEATHER]).message.content == "It rains."
    assert "rain" in backend.prompt
    assert "get_weather" in backend.prompt
    wait_clean(thinking.url)


def test_several_calls_are_told_apart(thinking: Server) -> None:
    """Clients put together the parts of calls with the same index."""
    says(thinking, CALL + CALL.removeprefix("Let me see.").replace("Köln", "Bonn"))
    fields = {"messages": [USER], "tools": [WEATHER]}
    whole = http.post(thinking.url + "/api/chat", json=fields | {"stream": False}).json()["message"]["tool_calls"]
    lines = [json.loads(line) for line in http.post(thinking.url + "/api/chat", json=fields).text.splitlines()]
    for calls in (whole, [call for line in lines for call in line.get("message", {}).get("tool_calls", ())]):
        assert [(call["function"]["index"], call["function"]["arguments"]["city"]) for call in calls] == [(0, "Köln"), (1, "Bonn")]


def test_what_clients_send_that_asks_for_nothing(real: Process) -> None:
    fields = {
        "model": "embedded", "messages": [USER | {"role": "User", "images": []}], "stream": False, "format": "", "think": False,
        "tools": [], "keep_alive": "5m", "truncate": False, "shift": True, "_debug_render_only": False, "logprobs": False,
        "options": {"num_ctx": 8192, "num_predict": 4.0, "seed": 42.0, "num_gqa": 8, "mirostat": 0, "typical_p": 1.0, "num_thread": 2},
    }  # fmt: skip
    answer = http.post(real.url + "/api/chat", json=fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["eval_count"] == 4
    assert http.post(real.url + "/api/show", json={"name": "embedded", "model": ""}).status_code == 200
    assert http.post(real.url + "/api/embeddings", json={"prompt": ""}).json() == {"embedding": []}


def test_bodies_without_a_content_type(real: Process) -> None:
    """As in the examples of Ollama's documentation. What a page of another site sends brings its origin."""
    body = json.dumps({"model": "embedded", "prompt": "x", "stream": False, "options": {"num_predict": 2}})
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        assert http.post(real.url + "/api/generate", content=body, headers=kind).status_code == 200
        other = http.post(real.url + "/api/generate", content=body, headers=kind | {"origin": "http://elsewhere.test"})
        assert other.status_code == 415


def test_an_answer_of_one_step_has_a_speed(real: Process) -> None:
    answer = client_of(real).generate("embedded", "x", options={"num_predict": 1, "temperature": 0})
    assert answer.eval_count == 1
    assert answer.eval_duration > 1000, "nanoseconds"  # type: ignore[operator]


def test_what_a_model_thinks(thinking: Server) -> None:
    client = client_of(thinking)
    says(thinking, "<think>Hm.</think>Yes.")
    whole = client.chat("fake", messages=[USER], think=True)
    assert (whole.message.thinking, whole.message.content) == ("Hm.", "Yes.")
    parts = list(client.generate("fake", "Is it?", think="low", stream=True))
    assert "".join(part.thinking or "" for part in parts) == "Hm."
    assert "".join(part.response or "" for part in parts) == "Yes."
    assert client.chat("fake", messages=[USER, whole.message, USER]).done


WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("/api/chat", {"model": "nope", "messages": [USER]}, 404, "'nope' does not exist"),
    ("/api/chat", {"messages": [USER], "think": True}, 400, "does not support thinking"),
    ("/api/chat", {"messages": [USER], "think": "much"}, 400, "think must be"),
    ("/api/chat", {"messages": [USER], "format": "xml"}, 400, "format must be"),
    ("/api/chat", {"messages": [USER], "format": {"type": "nothing"}}, 400, "format"),
    ("/api/chat", {"messages": [USER], "options": {"temperatur": 1}}, 400, "did you mean temperature"),
    ("/api/chat", {"messages": [USER], "options": {"repeat_penalty": 0}}, 400, "repeat_penalty"),
    ("/api/chat", {"messages": [USER], "options": {"mirostat": 2}}, 400, "mirostat is not supported"),
    ("/api/chat", {"messages": [USER], "options": 5}, 400, "options must be an object"),
    ("/api/chat", {"messages": [USER | {"images": ["aGk="]}]}, 400, "reads text only"),
    ("/api/chat", {"messages": [{"role": "boss", "content": "x"}]}, 400, "'boss'"),
    ("/api/chat", {"messages": [USER], "tools": [WEATHER]}, 400, "does not support tools"),
    ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]}, 400, "an object"),
    ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "with a name"),
    ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
    ("/api/generate", {"prompt": "x", "context": [1, 2]}, 400, "context is not supported"),
    ("/api/generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "system message"),
    ("/api/generate", {"prompt": 5}, 400, "prompt must be a string"),
    ("/api/embed", {"input": [1, 2]}, 400, "a list of texts"),
    ("/api/embed", {"input": ["x", ""]}, 400, "empty"),
    ("/api/pull", {"model": "x"}, 404, "/api/pull does not exist"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), WRONG)
def test_errors_are_a_text(real: Process, path: str, body: dict[str, Any], status: int, words: str) -> None:
    answer = http.post(real.url + path, json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_an_error_in_the_middle_is_a_line(thinking: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    says(thinking, "Yes." * 40)
    monkeypatch.setattr("quire.server.calls.turn.Turn.take", lambda *_: 1 / 0)
    answer = http.post(thinking.url + "/api/chat", json={"messages": [USER]})
    assert "internal error" in json.loads(answer.text.splitlines()[-1])["error"]
    with pytest.raises(ollama.ResponseError, match="internal error"):
        list(client_of(thinking).chat("fake", messages=[USER], stream=True))
