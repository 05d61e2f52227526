"""The formats in which models write calls, each a grammar over a Scan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from quire.text.tools.scan import Reading, Scan

THINK_MARKERS = THINK, END_THINK = "<think>", "</think>"

_NAME = re.compile(r"[A-Za-z0-9_.-]*")


def reasoning(scan: Scan, opened: bool) -> Reading[None]:
    """``<think>...</think>`` at the start of the text; ``opened``: the prompt ends in ``<think>``."""
    scan.hold()
    yield from scan.space()
    if (yield from scan.sees(THINK)):
        scan.take(len(THINK))
    elif not opened:
        scan.release()
        return
    scan.drop()
    yield from scan.space()
    scan.think(True)
    if (yield from scan.prose((END_THINK,))):
        scan.take(len(END_THINK))
        scan.think(False)
        yield from scan.space()


def plain(scan: Scan) -> Reading[None]:
    """No calls."""
    yield from scan.prose(())


def hermes(scan: Scan) -> Reading[None]:
    """Hermes, Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once for each call."""
    opens, closes = "<tool_call>", "</tool_call>"
    scan.stops = (closes, opens)
    inside = False
    while marker := (yield from scan.prose((opens, closes))):
        if marker == closes:
            text = scan.take(len(closes))
            if not inside:
                scan.emit(text)
            inside = False
            continue
        scan.hold()
        scan.take(len(opens))
        inside = False
        while (yield from scan.space()) == "{" and (yield from scan.call()):
            if scan.done:
                return
            inside = True
            scan.hold()
        if inside and (yield from scan.sees(closes)):
            scan.take(len(closes))
            scan.drop()
            inside = False
        else:
            scan.release()


def llama3(scan: Scan) -> Reading[None]:
    """Llama 3: ``{"name": ..., "parameters": {...}}`` where a line begins, or after ``<|python_tag|>``; several after ``;``."""
    tag = "<|python_tag|>"
    scan.stops = (tag,)
    while marker := (yield from scan.prose((tag, "{"))):
        if marker == "{" and not scan.starts_line:
            scan.emit(scan.take(1))
            continue
        scan.hold()
        if marker == tag:
            scan.take(len(tag))
        char = yield from scan.space()
        while char == "{" and (yield from scan.call()):
            if scan.done:
                return
            scan.hold()
            char = yield from scan.space()
            if char and char in ";,":
                scan.take(1)
                char = yield from scan.space()
        scan.release()


def mistral(scan: Scan) -> Reading[None]:
    """Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` once for each call."""
    opens = "[TOOL_CALLS]"
    scan.stops = (opens,)
    while (yield from scan.prose((opens,))):
        scan.hold()
        scan.take(len(opens))
        char = yield from scan.space()
        if char == "[":
            scan.take(1)
            char = yield from scan.space()
            made = False
            while char == "{" and (yield from scan.call()):
                if scan.done:
                    return
                made = True
                scan.hold()
                char = yield from scan.space()
                if char != ",":
                    break
                scan.take(1)
                char = yield from scan.space()
            is_call = made and char == "]"
            if is_call:
                scan.take(1)
                scan.drop()
        else:
            is_call = yield from (scan.call() if char == "{" else _named(scan))
        if scan.done:
            return
        if not is_call:
            scan.release()


def _named(scan: Scan) -> Reading[bool]:
    name = yield from scan.run(_NAME)
    if name not in scan.functions:
        return False
    for marker in ("[CALL_ID]", "[ARGS]"):
        if (yield from scan.sees(marker)):
            scan.take(len(marker))
            if marker == "[CALL_ID]":
                yield from scan.run(_NAME)
    if (yield from scan.space()) != "{":
        return False
    scan.open_call(name)
    scan.open = not (yield from scan.value(scan.argue))
    scan.close_call()
    return True


@dataclass(slots=True, frozen=True)
class Format:
    grammar: Callable[[Scan], Reading[None]]
    markers: tuple[str, ...]
    """Tokens that must be seen, where they are special ones."""
    id_form: str = "call_"
    """What ids of calls begin with; empty: they are 9 letters and digits, on which Mistral's templates insist."""


FORMATS = {
    "hermes": Format(hermes, ("<tool_call>", "</tool_call>")),
    "llama3": Format(llama3, ("<|python_tag|>",)),
    "mistral": Format(mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), ""),
}
PLAIN = Format(plain, ())


def detect(template: str) -> str | None:
    """The format that a chat template asks its model for; None where it is none of these."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"  # relatives whose calls are not JSON
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|start_header_id|>" in template and "tools" in template and '"parameters": ' in template:
        return "llama3"
    return None


def takes_one_call(template: str) -> bool:
    """Whether the template refuses a message with several calls, as those of Llama 3 do: they are not to be made then."""
    return "only supports single tool-calls" in template
