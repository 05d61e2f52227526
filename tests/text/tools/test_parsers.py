"""Parsers of tool calls: what each format means, whole or in any pieces, right or wrong."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.text.tools import Message, parse_message, parser_for
from quire.text.tools.formats import FORMATS, detect

FUNCTIONS = ("get_weather", "f")
TAG, CALLS, ARGS = "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"


def read(name: str | None, text: str, cuts: Any = (), **options: Any) -> Message:
    """What ``text`` means, read in the pieces between ``cuts``."""
    parser = parser_for(name, FUNCTIONS, key="test", **options)
    places = [0, *sorted(cuts), len(text)]
    message = Message()
    for start, end in itertools.pairwise(places):
        message.add(parser.push(text[start:end]))
    message.add(parser.finish())
    return message


def meaning(name: str | None, text: str, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """(text, [(name, arguments)])"""
    whole = read(name, text, **options)
    assert read(name, text, range(1, len(text)), **options) == whole, "character by character"
    return whole.text, [(call.name, call.arguments) for call in whole.calls]


HERMES = [
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"arguments": {"a": [1, {"b": "}"}]}, "name": "f"}</tool_call>', "", [("f", '{"a": [1, {"b": "}"}]}')]),
    ('Let me look.\n<tool_call>{"name":"f","arguments":{}}</tool_call>', "Let me look.", [("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call>\n that is it', "\n that is it", [("f", "{}")]),
    (
        '<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>\n<tool_call>{"name":"get_weather","arguments":{"y":2}}</tool_call>\n',
        "",
        [("f", '{"x":1}'), ("get_weather", '{"y":2}')],
    ),
    # two in one, no end, a brace too few, a brace too many
    ('<tool_call>{"name":"f"}\n{"name":"f","arguments":null}</tool_call>', "", [("f", "{}"), ("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{"a":1}}', "", [("f", '{"a":1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":1}', "", [("f", '{"a":1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":', "", [("f", '{"a":')]),
    ('<tool_call>{"name":"f","arguments":{"a":1}</tool_call>x', "x", [("f", '{"a":1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":{"b":1}</tool_call>x', "x", [("f", '{"a":{"b":1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":1}}}</tool_call>x', "}x", [("f", '{"a":1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":1} <tool_call>{"name":"f"}</tool_call>', "", [("f", '{"a":1}'), ("f", "{}")]),
    # strings that look like markup, escapes, arguments in a string
    ('<tool_call>{"name":"f","arguments":{"a":"</tool_call>}\\"}"}}</tool_call>', "", [("f", '{"a":"</tool_call>}\\"}"}')]),
    ('<tool_call>{"name":"\\u0066","arguments":"{\\"a\\": \\"ü\\"}"}</tool_call>', "", [("f", '{"a": "ü"}')]),
    ('<tool_call>{"id": [1, {}], "type": "function", "name": "f", "arguments": {}, "x": {"y": 1}}</tool_call>', "", [("f", "{}")]),
    # no calls
    ("<tool_call>", "<tool_call>", []),
    ("a <tool_ca", "a <tool_ca", []),
    ("a < b <tool> </tool_call> c", "a < b <tool> </tool_call> c", []),
    ('<tool_call>{"name":"nope","arguments":{}}</tool_call>', '<tool_call>{"name":"nope","arguments":{}}</tool_call>', []),
    ('<tool_call>{"name":"f","arguments":5}</tool_call>', '<tool_call>{"name":"f","arguments":5}</tool_call>', []),
    ('<tool_call>{"name":"f", "other": {}}', '<tool_call>{"name":"f", "other": {}}', []),
    ("<tool_call>{'name': 'f'}</tool_call>\n", "<tool_call>{'name': 'f'}</tool_call>\n", []),
    ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    ('<tool_call>{"na\\qe": "f"}', '<tool_call>{"na\\qe": "f"}', []),
    ('<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
    ("<tool_call> <tool_call>{}", "<tool_call> <tool_call>{}", []),
]
LLAMA = [
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (TAG + '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        '{"name":"f","parameters":{"a":1}}; {"type":"function","name":"f","arguments":{"a":2}}',
        "",
        [("f", '{"a":1}'), ("f", '{"a":2}')],
    ),
    ('{"name":"f","parameters":{"a":1}}\n{"name":"f","parameters":{}}', "", [("f", '{"a":1}'), ("f", "{}")]),
    ('Here:\n\n  {"name":"f","parameters":{}}', "Here:", [("f", "{}")]),
    (TAG + 'x = 1\n{"name":"f","parameters":{}}', TAG + "x = 1", [("f", "{}")]),
    ('{"name":"f","parameters":{}}, and then', ", and then", [("f", "{}")]),
    ('Say {"name":"f","parameters":{}}', 'Say {"name":"f","parameters":{}}', []),
    ('{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ('{"answer": {"name": "f", "parameters": {}}}\n', '{"answer": {"name": "f", "parameters": {}}}\n', []),
    ("{", "{", []),
    (TAG, TAG, []),
]
MISTRAL = [
    (CALLS + '[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    (CALLS + ' [{"name":"f","arguments":{}}, {"arguments":{"a":2},"name":"f","id":"012345678"}]', "", [("f", "{}"), ("f", '{"a":2}')]),
    ("Yes." + CALLS + "f" + ARGS + '{"a": 1}' + CALLS + "get_weather" + ARGS + "{}", "Yes.", [("f", '{"a": 1}'), ("get_weather", "{}")]),
    (CALLS + "f[CALL_ID]abcdefghi" + ARGS + '{"a": 1}', "", [("f", '{"a": 1}')]),
    (CALLS + 'f{"a": 1}', "", [("f", '{"a": 1}')]),
    (CALLS + '{"name":"f"}', "", [("f", "{}")]),
    (CALLS + 'f[ARGS]{"a": [1' + CALLS + "f[ARGS]{}", "", [("f", '{"a": [1'), ("f", "{}")]),
    (CALLS + '[{"name":"f"}, {"name":"nope"}]', ', {"name":"nope"}]', [("f", "{}")]),
    (CALLS + '[{"name":"f"},]x', "x", [("f", "{}")]),
    (CALLS + "nope[ARGS]{}", CALLS + "nope[ARGS]{}", []),
    (CALLS + "[]", CALLS + "[]", []),
    (CALLS + "f", CALLS + "f", []),
    ("[TOOL_", "[TOOL_", []),
]
TABLE = [(name, *case) for name, cases in (("hermes", HERMES), ("llama3", LLAMA), ("mistral", MISTRAL)) for case in cases]


@pytest.mark.parametrize(("name", "text", "said", "calls"), TABLE)
def test_what_a_text_means(name: str, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert meaning(name, text) == (said, calls)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_at_most(name: str) -> None:
    call = {"hermes": '<tool_call>{"name":"f"}</tool_call>', "llama3": '{"name":"f"};', "mistral": CALLS + '[{"name":"f"},'}[name]
    parser = parser_for(name, FUNCTIONS, parallel=False)
    assert not parser.done
    delta = parser.push(call + call)
    assert parser.done
    assert [made.name for made in delta.calls] == ["f"]
    assert parser.push("more").text == parser.finish().text == ""


def test_ids() -> None:
    two = '<tool_call>{"name":"f"}{"name":"f"}</tool_call>'
    first, second = read("hermes", two).calls
    assert first.id != second.id
    assert first.id.startswith("call_")
    assert [first, second] == read("hermes", two).calls, "the same again, for a stream that is resumed"
    assert parse_message(parser_for("hermes", FUNCTIONS, key="other"), two).calls[0].id != first.id
    (call,) = read("mistral", CALLS + 'f{"a": 1}').calls
    assert len(call.id) == 9
    assert call.id.isalnum(), "what Mistral's templates insist on"


def test_special_tokens_are_never_shown() -> None:
    assert meaning("llama3", TAG + "print(1)" + TAG, hidden=(TAG,)) == ("print(1)", [])
    hidden = FORMATS["mistral"].markers
    assert meaning("mistral", "a[ARGS]b" + CALLS + "nope[ARGS]{}[TOOL", hidden=hidden) == ("abnope{}[TOOL", [])
    assert meaning(None, "a<think>b", hidden=("<think>",)) == ("ab", [])


@pytest.mark.parametrize(
    ("text", "opened", "thought", "said", "calls"),
    [
        ("<think>\nHm.\n</think>\n\nYes.\n", False, "Hm.", "Yes.\n", 0),
        ("Hm.\n</think>Yes.", True, "Hm.", "Yes.", 0),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes.", 0),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes.", 0),
        ("\n<think>Hm, </thin", False, "Hm, </thin", "", 0),
        ("Hm.", True, "Hm.", "", 0),
        ("\n Yes <think>no</think>", False, "", "\n Yes <think>no</think>", 0),
        ("<thinking>", False, "", "<thinking>", 0),
        ('<think><tool_call>{"name":"f"}</tool_call></think>\n<tool_call>{"name":"f"}</tool_call>', False,
         '<tool_call>{"name":"f"}</tool_call>', "", 1),
    ],
)  # fmt: skip
def test_reasoning(text: str, opened: bool, thought: str, said: str, calls: int) -> None:
    for cuts in ((), range(1, len(text))):
        message = read("hermes", text, cuts, reasoning=True, in_reasoning=opened)
        assert (message.reasoning, message.text, len(message.calls)) == (thought, said, calls)


def test_only_what_may_become_markup_is_held_back() -> None:
    parser = parser_for("hermes", FUNCTIONS)
    assert parser.push("a < b").text == "a < b"
    assert parser.push(" <tool").text == ""
    assert parser.push("s>").text == " <tools>"
    assert parser.push('<tool_call>{"name": "f", ').calls == []
    first = parser.push('"arguments": {"a": "x').calls[0]
    assert (first.index, first.name, first.arguments) == (0, "f", '{"a": "x')
    (more,) = parser.push("yz").calls
    assert (more.index, more.id, more.name, more.arguments) == (0, None, None, "yz"), "arguments come as they are written"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
CALL = st.tuples(st.sampled_from(FUNCTIONS), st.dictionaries(st.text(), JSON, max_size=4))


def written(name: str, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> str:
    """Calls as a model of this format writes them."""
    objects = [json.dumps({"name": f, "parameters" if name == "llama3" else "arguments": a}, ensure_ascii=ascii_only) for f, a in calls]
    if name == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
    return "; ".join(objects) if name == "llama3" else CALLS + "[" + ", ".join(objects) + "]"


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([*FORMATS]), st.lists(CALL, min_size=1, max_size=3), st.booleans())
def test_what_was_written_is_read(data: st.DataObject, name: str, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> None:
    text = "Well:\n" + written(name, calls, ascii_only)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    message = read(name, text, cuts)
    assert message.text == "Well:"
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls


PARTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<tool", TAG, "<|python", CALLS, "[TOOL_", ARGS, "[CALL_ID]", "<think>", "</think>", "<", "{", "}", "[",
    "]", '"', "\\", ":", ",", ";", " ", "\n", '{"name": "f", "arguments": {', '{"name": "f"', '"arguments": ', '"parameters": {"a": 1}',
    '"name": "get_weather"', '"name": "nope"', '"id": "x"', '"type": 5', "f", "null", "1", '"{\\"a\\": ', "\\u00", "é", "🙂", "word ",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.sampled_from([None, *FORMATS]),
    st.lists(PARTS | st.text(max_size=3), max_size=25).map("".join),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_pieces_mean_what_the_whole_means(
    data: st.DataObject, name: str | None, text: str, hide: bool, parallel: bool, reasoning: bool, opened: bool
) -> None:
    options: dict[str, Any] = {"parallel": parallel, "reasoning": reasoning, "in_reasoning": opened}
    if hide:
        options["hidden"] = (*(FORMATS[name].markers if name else ()), "<think>", "</think>")
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    whole = read(name, text, **options)
    assert read(name, text, cuts, **options) == whole
    assert read(name, text, range(1, len(text)), **options) == whole
    if not whole.calls and not hide and not reasoning:
        assert whole.text == text, "no call: nothing is lost"


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_of_any_size_costs_as_much_as_it_has_characters(name: str) -> None:
    """Not a timing: a parser that began anew at each bracket would not come back from this."""
    big = written(name, [("f", {"a": "x{" * 50_000})], False)
    assert len(read(name, big, range(0, len(big), 50)).calls[0].arguments) > 100_000
    for unit in ('<tool_call>{"id": ', '{"id": [', CALLS + "[{", "{", '\n{"', "<"):
        text = unit * (50_000 // len(unit))
        assert read(name, text, range(0, len(text), 7)).text == text


def test_detection() -> None:
    assert detect("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert detect("{{ tools }}<tool_call>\n<function=x>") is None, "calls in XML"
    assert detect("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]") == "mistral"
    assert detect("<|start_header_id|>{{ tools }}{'name': f, \"parameters\": dictionary}") == "llama3"
    assert detect("<|start_header_id|>{{ tools }}<TOOLCALL>") is None
    assert detect("{{ messages }}") is None
