"""Blocks of a turn are the same however the text comes: with drafts a step brings the end of a call and what is said after it."""

from __future__ import annotations

import pytest

from quire.server.calls.turn import Turn, arguments_of
from quire.text.tools import parser_for

CALL = '<tool_call>\n{"name": "f", "arguments": {"days": [0, 1, 2]}}\n</tool_call>'
TEXTS = [
    "<think>Only this",
    "<think>Only this.</think>",
    "<think>Hm.</think>Yes.",
    "Yes. ",
    CALL + "\nI have asked.",
    "First.\n" + CALL + "\nBetween. " + CALL + "\n" + CALL + "\nLast.",
    "<think>Hm.</think>\nI ask. " + CALL,
    "<think>Hm.</think>" + CALL + "Done. <tool_call>{no call}</tool_call> Really.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_blocks(text: str) -> None:
    made = []
    for size in (1, 2, 3, 7, 20, 50, len(text)):
        parser, turn = parser_for("hermes", ["f"], key="k", reasoning=True), Turn()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        steps = [step for delta in (*map(parser.push, pieces), parser.finish()) for step in turn._change(delta)]
        assert all(added for what, _, added in steps if what == "add")
        assert all(block.name == "f" and block.text == '{"days": [0, 1, 2]}' for block in turn.blocks if block.kind == "call")
        made.append([(block.kind, block.id, block.text) for block in turn.blocks])
    assert all(blocks == made[0] for blocks in made)
    assert all(text for _, _, text in made[0])
    assert sum(kind == "call" for kind, _, _ in made[0]) == text.count(CALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1e999}', {"INVALID_JSON": '{"a": 1e999}'}), ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),
        ('{"a": [1, "b', {"a": [1]}), ("", {}), ('{"a": 1e30}', {"a": 1e30}),
    ],
)  # fmt: skip
def test_arguments_are_json_that_everybody_reads(text: str, expected: object) -> None:
    assert arguments_of(text) == expected
