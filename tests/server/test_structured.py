"""Structured output over HTTP, as clients ask for it: OpenAI's response_format, vLLM's structured_outputs and guided_*, bans."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from quire.server.calls import compiler as compiler_module
from quire.server.calls.compiler import Compiler
from quire.server.http.errors import UnavailableError
from quire.structured import Structured
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, EMBEDDED, Process, Server, events, health, http, raw_request, wait_clean, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 20},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
    },
    "required": ["title", "count", "kind", "parts"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}},
}


def response_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}


def ask(server: Process | Server, path: str = COMPLETIONS, **fields: Any) -> Any:
    prompt = {"prompt": "x = "} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Say something"}]}
    return http.post(server.url + path, json={"max_tokens": 300, "seed": 3, **prompt, **fields})


def text(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    found: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return found


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"stream": True}, {"ignore_eos": True, "min_tokens": 200}])
def test_json_schema(real: Process, path: str, fields: dict[str, Any]) -> None:
    answer = ask(real, path, response_format=response_format(SCHEMA), **fields)
    if "stream" in fields:
        assert answer.status_code == 200
        chunks = [choice for event in events(answer.text)[:-1] for choice in event["choices"]]
        assert chunks[-1]["finish_reason"] == "stop"
        made = "".join(c["text"] if path == COMPLETIONS else c["delta"].get("content", "") for c in chunks)
    else:
        made = text(answer)
    jsonschema.validate(json.loads(made), SCHEMA)


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "[a-c]{2,5}-[0-9]{3}"}}, "[a-c]{2,5}-[0-9]{3}"),
    ({"guided_regex": "^(yes|no)!$"}, "(yes|no)!"),
    ({"structured_outputs": {"choice": ["left", "right", "lefthanded", "ö\n\"'\\"]}}, "left|right|lefthanded|ö\n\"'\\\\"),
    ({"guided_choice": ["only one"]}, "only one"),
    ({"structured_outputs": {"grammar": 'start: "(" item ("," item){0,3} ")"\nitem: /[0-9]{1,4}/'}}, r"\(\d{1,4}(,\d{1,4}){0,3}\)"),
    ({"guided_grammar": 'root ::= "v" digit digit\ndigit ::= [0-9]'}, "v[0-9]{2}"),
    ({"structured_outputs": {"json": {"const": {"a": [1, None]}}, "disable_any_whitespace": True}}, re.escape('{"a":[1,null]}')),
    ({"structured_outputs": {"json": '{"enum": [1, 2]}'}}, "[12]"),
    ({"guided_json": {"const": [1]}, "guided_whitespace_pattern": "[~]{2}"}, r"\[(~~)?1(~~)?\]"),
    ({"response_format": {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}}}, r"\{\s*\}"),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS, ids=lambda value: str(value)[:40])
def test_forms(real: Process, fields: dict[str, Any], pattern: str) -> None:
    for more in ({}, {"logprobs": 1}, {"temperature": 0}):
        made = text(ask(real, **fields, **more))
        assert re.fullmatch(pattern, made), made


def test_json_object(real: Process) -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        answer = ask(real, CHAT, max_tokens=1500, temperature=0, **fields).json()["choices"][0]
        assert answer["message"]["content"].lstrip().startswith("{")
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["message"]["content"]), dict)


def test_log_probabilities_are_those_of_the_model_and_change_nothing(real: Process) -> None:
    fields: dict[str, Any] = {"structured_outputs": {"json": SCHEMA}, "return_token_ids": True}
    plain, told = (ask(real, **fields, **more).json()["choices"][0] for more in ({}, {"logprobs": 2}))
    assert plain["token_ids"] == told["token_ids"]
    assert len(told["logprobs"]["token_logprobs"]) == len(told["token_ids"])
    assert min(told["logprobs"]["token_logprobs"]) < -3, "tokens that the model would not have chosen"


def test_a_stop_string_and_the_limit_end_it_as_ever(real: Process) -> None:
    fields = {"structured_outputs": {"regex": "(one two three )+"}}
    stopped = ask(real, stop=["three"], **fields).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"], stopped["stop_reason"]) == ("one two ", "stop", "three")
    cut = ask(real, max_tokens=7, **fields, return_token_ids=True).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert len(cut["token_ids"]) == 7


def test_samples_have_their_own(real: Process) -> None:
    answer = ask(real, n=4, structured_outputs={"regex": "[a-z]{12}"}, temperature=2.0)
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert all(re.fullmatch("[a-z]{12}", made) for made in texts)
    assert len(set(texts)) > 1


class Part(BaseModel):
    x: float
    y: float | None


class Thing(BaseModel):
    title: str = Field(max_length=16)
    kind: Literal["small", "large"]
    parts: list[Part] = Field(max_length=2)


def test_openai_client_parses_into_a_model(real: Process) -> None:
    client = openai.OpenAI(base_url=real.url + "/v1", api_key="none", timeout=DEADLINE_S)
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": "A thing"}]
    parsed = client.chat.completions.parse(model=model, messages=messages, response_format=Thing, seed=1, max_tokens=400)
    assert isinstance(parsed.choices[0].message.parsed, Thing)
    with client.chat.completions.stream(model=model, messages=messages, response_format=Thing, seed=1, max_tokens=400) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


def test_one_of_alternatives_that_may_overlap(real: Process) -> None:
    """As by zod's union; llguidance refuses it by itself."""
    few = {"type": "string", "maxLength": 3}
    made = json.loads(text(ask(real, response_format=response_format({"oneOf": [few, {"type": "string", "pattern": "^a{2,5}$"}]}))))
    assert len(made) <= 3 or re.fullmatch("a{2,5}", made)


def test_formats_that_nobody_enforces_are_remarks(real: Process) -> None:
    schema = {"type": "object", "required": ["format", "day"], "additionalProperties": False, "properties": {
        "format": {"type": "string", "format": "password", "maxLength": 3}, "day": {"type": "string", "format": "date"},
    }}  # fmt: skip
    made = json.loads(text(ask(real, response_format=response_format(schema))))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["day"])
    assert len(made["format"]) <= 3


def test_bad_words_and_allowed_tokens(real: Process) -> None:
    tokenizer = Tokenizer.load(EMBEDDED)
    plain = ask(real, prompt="import os\n", temperature=0, max_tokens=40).json()["choices"][0]["text"]
    assert "import" in plain
    banned = ask(real, prompt="import os\n", temperature=0, max_tokens=40, bad_words=["import"]).json()["choices"][0]["text"]
    assert not re.search(r"\bimport\b", banned)
    ids = [token for digit in "0123456789" for token in tokenizer.encode(digit, False)]
    answer = ask(real, allowed_token_ids=ids, max_tokens=30).json()["choices"][0]
    assert re.fullmatch("[0-9]{30}", answer["text"])


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "required"),
    ({"response_format": response_format({"not": {}})}, "response_format.json_schema.schema", "not supported"),
    ({"response_format": response_format([1])}, "response_format.json_schema.schema", "an object"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "unknown field"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"regex": "[a"}}, "structured_outputs.regex", "unclosed"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "text"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "not empty"),
    ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice", "not empty"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "x"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "both"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "both"),
    ({"guided_regex": "a", "use_beam_search": True, "beam_width": 2}, "guided_regex", "beam search"),
    ({"bad_words": [""]}, "bad_words", "non-empty"),
    ({"bad_words": ["x"] * 300}, "bad_words", "at most 256"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
    ({"allowed_token_ids": [1 << 20]}, "allowed_token_ids", "out of range"),
    ({"allowed_token_ids": [1], "beam_width": 2}, "allowed_token_ids", "beam search"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_with_the_field_and_the_reason(real: Process, fields: dict[str, Any], param: str, message: str) -> None:
    for path in (COMPLETIONS, CHAT):
        answer = ask(real, path, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), answer.text
        assert message in error["message"]
        assert "/" not in error["message"].replace("/(", "").replace("/[", "") or "regex" in param or "grammar" in param


BOMBS: dict[str, dict[str, Any]] = {
    "thousands of patterns at once": {"grammar": "start: T\nT: " + " & ".join(f"/.*{i}.*/" for i in range(3000))},
    "thousands of properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(9000)}}},
    "rules that nest": {"grammar": "start: r0\n" + "\n".join(f'r{i}: "{i}" r{i + 1} | "x" r{i + 1}' for i in range(3500)) + '\nr3500: "a"'},
    "rules that double": {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "a"'},
    "repetitions of repetitions": {"grammar": 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"'},
    "a regex of brackets": {"regex": "(" * 8000 + "a" + ")" * 8000},
    "a long regex": {"regex": "a" * 200_000},
    "a deep schema": {"json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "a schema of itself": {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "combinations": {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(20)]}},
    "100,000 choices": {"choice": [str(i) for i in range(100_000)]},
    "long choices": {"choice": ["x" * 10_000 + str(i) for i in range(100)]},
    "brackets of GBNF": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
}


def test_bombs_cost_one_answer_each(real: Process) -> None:
    """Refused, with the field's name, while others are served by the same engine."""
    restarts = health(real.url)["engine_restarts"]
    with ThreadPoolExecutor(len(BOMBS) + 1) as clients:
        stream = clients.submit(ask, real, prompt="import os\n", max_tokens=1000, ignore_eos=True, stream=True)
        answers = dict(zip(BOMBS, clients.map(lambda bomb: ask(real, structured_outputs=bomb), BOMBS.values()), strict=True))
        for name, answer in answers.items():
            kind = next(iter(BOMBS[name]))
            assert answer.status_code == 400, (name, answer.text[:300])
            assert answer.json()["error"]["param"] == f"structured_outputs.{kind}", name
            assert len(answer.text) < 1000, name
        assert events(stream.result(DEADLINE_S).text)[-2]["choices"][0]["finish_reason"] == "length"
    assert health(real.url)["engine_restarts"] == restarts
    assert text(ask(real, structured_outputs={"regex": "ok"})) == "ok"
    wait_clean(real.url)


def test_a_form_that_runs_wild_later_ends_its_own_request(real: Process) -> None:
    """It compiles, and meets a limit of the matcher on its way."""
    wild = {"regex": "(.*a.{20})|(.*b.{21})|(.*c.{22})|(.*d.{23})|(.*e.{24})|(.*f.{25})|(.*g.{26})"}
    with ThreadPoolExecutor() as clients:
        other = clients.submit(ask, real, prompt="import os\n", max_tokens=300, ignore_eos=True)
        answer = ask(real, structured_outputs=wild, max_tokens=1500, temperature=1.5)
        assert answer.status_code in (200, 500)
        if answer.status_code == 500:
            assert "structured output can't be followed" in answer.json()["error"]["message"]
        assert other.result(DEADLINE_S).json()["choices"][0]["finish_reason"] == "length"
    wait_clean(real.url)


def test_a_form_without_an_end_costs_one_engine_once(real: Process) -> None:
    """A takes every "a", and none is left for B. Another request, and its stream, goes on; who tries it again is refused."""
    endless = {"grammar": "start: /[0-9]{30}/ A B\nA: /a+/\nB: /a+b/"}
    before = health(real.url)["engine_restarts"]
    with ThreadPoolExecutor() as clients:
        other = clients.submit(ask, real, prompt="import os\n", max_tokens=1000, ignore_eos=True, temperature=0)
        answer = ask(real, structured_outputs=endless, max_tokens=100)
        assert answer.status_code == 500, answer.text
        assert "the form of the output can't be followed to any end" in answer.json()["error"]["message"]
        assert other.result(DEADLINE_S).json()["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: health(real.url)["engine_restarts"] == before + 1, "another engine")
    for fields, param in (
        ({"structured_outputs": endless}, "structured_outputs.grammar"),
        ({"guided_grammar": endless["grammar"]}, "guided_grammar"),
    ):
        again = ask(real, **fields, max_tokens=100)
        assert (again.status_code, again.json()["error"]["param"]) == (400, param), again.text
        assert "as was seen before" in again.json()["error"]["message"]
    assert text(ask(real, structured_outputs={"regex": "ok"})) == "ok"
    assert health(real.url)["engine_restarts"] == before + 1
    wait_clean(real.url)


def compile_workers(server: Process) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    pids = [int(pid) for each in children for pid in each.read_text().split()]
    return [pid for pid in pids if b"compile_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_compiler_that_is_killed_says_nothing_of_the_form(real: Process) -> None:
    """While it is idle, as by a machine without memory."""
    for maximum in range(3):
        schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": maximum}}, "required": ["n"]}
        assert set(json.loads(text(ask(real, guided_json=schema)))) >= {"n"}
        workers = compile_workers(real)
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


def test_a_compiler_that_is_always_killed() -> None:
    """It ends the request with an error, and the same form is tried again the next time."""
    compiler = Compiler(EMBEDDED, 4096, [0])
    form = Structured.regex("[ab]{3}")

    async def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            asked = compiler_module._Worker.ask
            patch.setattr(compiler_module._Worker, "ask", lambda self, structured: (self.kill(), asked(self, structured))[1])
            with pytest.raises(UnavailableError, match=r"was killed, 2 times: try again"):
                await compiler.check(form)
        await compiler.check(form)

    try:
        asyncio.run(check())
    finally:
        compiler.close()


class StuckCompiler:
    """As one with many slow forms before it."""

    def __init__(self) -> None:
        self.waiting = 0

    async def check(self, structured: Structured) -> None:
        self.waiting += 1
        try:
            await asyncio.sleep(DEADLINE_S)
        finally:
            self.waiting -= 1


def test_deadlines_and_hang_ups_while_a_form_waits_to_be_compiled(fake: Server) -> None:
    context, stuck = fake.app.state.context, StuckCompiler()
    object.__setattr__(context, "compiler", stuck)
    body = {"prompt": "x", "guided_regex": "[ab]"}
    try:
        late = http.post(fake.url + COMPLETIONS, json=body | {"timeout": 0.2})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        with raw_request(fake.port, COMPLETIONS, body):
            wait_until(lambda: stuck.waiting == 1, "it waits")
        wait_until(lambda: stuck.waiting == 0, "nobody waits for it any more")
    finally:
        object.__setattr__(context, "compiler", None)
    wait_clean(fake.url)
