"""Parsers of tool calls: what each format means, whole or in any pieces, right or wrong."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.text.tools import CallDelta, Message, parse_message, parser_for
from quire.text.tools.formats import ASSISTANT, CHANNEL, CONSTRAIN, END, FORMATS, HARMONY, MESSAGE, RETURN, START, detect
from quire.text.tools.formats import CALL as END_CALL

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
ANALYSIS, FINAL, PREAMBLE = (CHANNEL + channel + MESSAGE for channel in ("analysis", "final", "commentary"))
NEXT = END + ASSISTANT
TO_F = CHANNEL + "commentary to=functions.f " + CONSTRAIN + "json" + MESSAGE
CHANNELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (FINAL + "Yes.", "Yes.", []),
    (FINAL + "Yes.\n" + RETURN, "Yes.", []),
    (FINAL + " Yes.\n", " Yes.\n", []),
    (MESSAGE + "Yes.", "Yes.", []),
    (ASSISTANT + FINAL + "Yes.", "Yes.", []),
    (PREAMBLE + "Let me see." + NEXT + FINAL + "Yes.", "Let me see.\n\nYes.", []),
    (CHANNEL + "final " + CONSTRAIN + "json" + MESSAGE + "[1]" + RETURN, "[1]", []),
    (CHANNEL + "commentary to=assistant" + FINAL + "Yes.", "Yes.", []),
    # the recipient after the channel and before it, with and without what its text is
    (TO_F + '{"a": 1}' + END_CALL, "", [("f", '{"a": 1}')]),
    (CHANNEL + "commentary to=functions.f json" + MESSAGE + '{"a": 1}', "", [("f", '{"a": 1}')]),
    (" to=functions.f" + CHANNEL + "commentary json" + MESSAGE + '{"a": 1}' + END_CALL, "", [("f", '{"a": 1}')]),
    (" to=functions.f" + CHANNEL + "analysis" + MESSAGE + ' {"a": 1} ' + END_CALL, "", [("f", '{"a": 1}')]),
    (CHANNEL + "commentary to=f" + MESSAGE + "{}" + END_CALL, "", [("f", "{}")]),
    (TO_F + END_CALL, "", [("f", "{}")]),
    (PREAMBLE + "I look." + NEXT + TO_F + "{}", "I look.", [("f", "{}")]),
    (
        TO_F + "{}" + END_CALL + ASSISTANT + TO_F.replace(".f ", ".get_weather ") + '{"b": 2}' + END_CALL,
        "",
        [("f", "{}"), ("get_weather", '{"b": 2}')],
    ),
    (TO_F + "{}" + END + ASSISTANT + " to=functions.f" + CHANNEL + "commentary" + MESSAGE + "{}", "", [("f", "{}"), ("f", "{}")]),
    (TO_F + "{}" + END_CALL + ASSISTANT + FINAL + "So.", "So.", [("f", "{}")]),
    # cut off, a brace too many, markup in a string
    (TO_F + '{"a": [1', "", [("f", '{"a": [1')]),
    (TO_F + '{"a": [1' + END_CALL, "", [("f", '{"a": [1')]),
    (TO_F + '{"a": 1}}' + END_CALL, "}", [("f", '{"a": 1}')]),
    (TO_F + json.dumps({"a": END_CALL + "}"}) + END_CALL, "", [("f", json.dumps({"a": END_CALL + "}"}))]),
    # no header, no channel, none of the channels, none of the functions, no end
    ("Yes, <|no|>.", "Yes, <|no|>.", []),
    (" to be", " to be", []),
    (" to=be", " to=be", []),
    ("t", "t", []),
    (CHANNEL + "fin", CHANNEL + "fin", []),
    (CHANNEL + "final Yes, of course" + END, CHANNEL + "final Yes, of course", []),
    (CHANNEL + " final" + MESSAGE, CHANNEL + " final" + MESSAGE, []),
    (CHANNEL + "song" + MESSAGE + "La", CHANNEL + "song" + MESSAGE + "La", []),
    (FINAL + "One." + NEXT + " Two.", "One.\n\n Two.", []),
    (FINAL + "One." + END + START + "user" + MESSAGE + "Two.", "One.\n\n" + START + "user" + MESSAGE + "Two.", []),
    (FINAL + "One " + END + " two " + END_CALL + " three", "One " + END + " two " + END_CALL + " three", []),
    (TO_F.replace(".f ", ".nope ") + "{}" + END_CALL, TO_F.replace(".f ", ".nope ") + "{}", []),
    (TO_F + "[1]" + END_CALL, TO_F + "[1]", []),
    (FINAL + "a <|en", "a <|en", []),
]
TABLE = [
    (name, *case) for name, cases in (("hermes", HERMES), ("llama3", LLAMA), ("mistral", MISTRAL), ("harmony", CHANNELS)) for case in cases
]


@pytest.mark.parametrize(("name", "text", "said", "calls"), TABLE)
def test_what_a_text_means(name: str, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert meaning(name, text) == (said, calls)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_at_most(name: str) -> None:
    call = {
        "hermes": '<tool_call>{"name":"f"}</tool_call>', "llama3": '{"name":"f"};', "mistral": CALLS + '[{"name":"f"},',
        "harmony": TO_F + "{}" + END_CALL + ASSISTANT,
    }[name]  # fmt: skip
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
    for text, said in (
        (FINAL + "a" + CONSTRAIN + "b" + END + "c" + MESSAGE + "d", "abcd"),
        (CHANNEL + "song" + MESSAGE + "La", "songLa"),
        (TO_F.replace(".f ", ".nope ") + "{}" + END_CALL, "commentary to=functions.nope json{}"),
    ):
        assert meaning("harmony", text, hidden=HARMONY) == (said, [])


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


TO_PYTHON, TO_OPEN = (CHANNEL + header + MESSAGE for header in ("commentary to=python code", "analysis to=browser.open"))


@pytest.mark.parametrize(
    ("text", "thought", "said", "calls"),
    [
        (ANALYSIS + "Hm. \n" + NEXT + FINAL + "Yes.", "Hm.", "Yes.", 0),
        (ANALYSIS + "Hm.", "Hm.", "", 0),
        (ANALYSIS + "Hm. " + END, "Hm.", "", 0),
        (ANALYSIS + NEXT + FINAL, "", "", 0),
        (ANALYSIS + "Hm." + CHANNEL + "final" + MESSAGE + "Yes.", "Hm.", "Yes.", 0),
        (ANALYSIS + "Hm." + NEXT + "Yes.", "Hm.", "Yes.", 0),
        (ANALYSIS + "One." + NEXT + PREAMBLE + "I look." + NEXT + ANALYSIS + "Two." + NEXT + TO_F + "{}", "One.\n\nTwo.", "I look.", 1),
        (ANALYSIS + "Hm." + NEXT + TO_PYTHON + "print(1)" + END_CALL, "Hm.\n\n" + TO_PYTHON + "print(1)", "", 0),
        (TO_OPEN + "{}" + END_CALL, TO_OPEN + "{}", "", 0),
    ],
)  # fmt: skip
def test_reasoning_in_a_channel(text: str, thought: str, said: str, calls: int) -> None:
    for cuts in ((), range(1, len(text))):
        message = read("harmony", text, cuts, reasoning=True)
        assert (message.reasoning, message.text, len(message.calls)) == (thought, said, calls)
        message = read("harmony", text, cuts)
        assert (message.reasoning, message.text) == ("", thought + ("\n\n" if thought and said else "") + said) or thought.count("\n") == 2


def test_a_function_may_have_the_name_of_a_tool_that_is_not_there() -> None:
    text = CHANNEL + "analysis to=python code" + MESSAGE + '{"code": "1"}' + END_CALL
    assert [call.name for call in parse_message(parser_for("harmony", ["python"], reasoning=True), text).calls] == ["python"]


def test_a_message_that_the_prompt_has_begun() -> None:
    for before, text, thought, said in (
        (ASSISTANT, FINAL + "Yes.", "", "Yes."),
        (ASSISTANT + FINAL + "Yes,", " I do.", "", " I do."),
        (ASSISTANT + FINAL + "1 <", "2", "", "2"),
        (ASSISTANT + FINAL + "1 ", " <|en" + NEXT + FINAL + "Yes.", "", " <|en\n\nYes."),
        (ASSISTANT + ANALYSIS, "Hm." + NEXT + FINAL + "Yes.", "Hm.", "Yes."),
        (ASSISTANT + CHANNEL, "final" + MESSAGE + "Yes.", "", "Yes."),
        (START + "user" + MESSAGE + "Hi" + END, ASSISTANT + FINAL + "Yes.", "", "Yes."),
    ):
        for cuts in ((), range(1, len(text))):
            message = read("harmony", text, cuts, reasoning=True, before=before)
            assert (message.reasoning, message.text) == (thought, said)


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
    if name == "harmony":
        texts = [json.dumps(a, ensure_ascii=ascii_only) for _, a in calls]
        return NEXT.join(TO_F.replace(".f ", f".{f} ") + text for (f, _), text in zip(calls, texts, strict=True)) + END_CALL
    objects = [json.dumps({"name": f, "parameters" if name == "llama3" else "arguments": a}, ensure_ascii=ascii_only) for f, a in calls]
    if name == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
    return "; ".join(objects) if name == "llama3" else CALLS + "[" + ", ".join(objects) + "]"


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([*FORMATS]), st.lists(CALL, min_size=1, max_size=3), st.booleans())
def test_what_was_written_is_read(data: st.DataObject, name: str, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> None:
    text = ("Well:\n" if name != "harmony" else PREAMBLE + "Well:\n" + NEXT) + written(name, calls, ascii_only)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    message = read(name, text, cuts)
    assert message.text == "Well:"
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls


PARTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<tool", TAG, "<|python", CALLS, "[TOOL_", ARGS, "[CALL_ID]", "<think>", "</think>", "<", "{", "}", "[",
    "]", '"', "\\", ":", ",", ";", " ", "\n", '{"name": "f", "arguments": {', '{"name": "f"', '"arguments": ', '"parameters": {"a": 1}',
    *HARMONY, ASSISTANT, "analysis", "final", "commentary", " to=functions.f", " to=python", " json", FINAL, TO_F, NEXT, "<|",
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
    if not whole.calls and not hide and not reasoning and name != "harmony":
        assert whole.text == text, "no call: nothing is lost"


WORDS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=3).map(lambda words: "".join(f"<{word}>" for word in words))


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.lists(st.sampled_from([*HARMONY, ASSISTANT, FINAL, ANALYSIS, TO_F, NEXT, " to=", "{"]) | WORDS, max_size=20),
    st.booleans(),
)
def test_what_is_no_header_is_not_lost(data: st.DataObject, parts: list[str], hide: bool) -> None:
    """Words in the order in which they were written; wherever they stand."""
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    parser = parser_for("harmony", FUNCTIONS, reasoning=True, hidden=HARMONY if hide else ())
    made = ""
    for start, end in itertools.pairwise([0, *sorted(cuts), len(text)]):
        for part in parser.push(text[start:end]).parts:
            made += part.arguments if isinstance(part, CallDelta) else part.text
    made += "".join(part.arguments if isinstance(part, CallDelta) else part.text for part in parser.finish().parts)
    word = re.compile(r"<[abc]+>")
    assert word.findall(made) == word.findall(text)


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_of_any_size_costs_as_much_as_it_has_characters(name: str) -> None:
    """Not a timing: a parser that began anew at each bracket would not come back from this."""
    big = written(name, [("f", {"a": "x{" * 50_000})], False)
    assert len(read(name, big, range(0, len(big), 50)).calls[0].arguments) > 100_000
    for unit in (START + CHANNEL, CHANNEL + "final to=", TO_F + "{", FINAL + END + " x"):
        text = unit * (50_000 // len(unit))
        assert len(read(name, text, range(0, len(text), 7)).text) < 2 * len(text)
    for unit in ('<tool_call>{"id": ', '{"id": [', CALLS + "[{", "{", '\n{"', "<"):
        text = unit * (50_000 // len(unit))
        assert read(name, text, range(0, len(text), 7)).text == text


def test_detection() -> None:
    assert detect("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert detect("{{ tools }}<tool_call>\n<function=x>") is None, "calls in XML"
    assert detect("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]") == "mistral"
    assert detect("<|start_header_id|>{{ tools }}{'name': f, \"parameters\": dictionary}") == "llama3"
    assert detect("<|start_header_id|>{{ tools }}<TOOLCALL>") is None
    assert detect("<|start|>system<|message|>{{ tools }}<|channel|>commentary") == "harmony"
    assert detect("<|start|>system<|message|>{{ tools }}") is None
    assert detect("{{ messages }}") is None
