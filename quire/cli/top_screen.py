"""What ``quire top`` shows, as lines of text of a given width. Pure."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TextIO

from quire.server.page.view import CACHED, FREE, OWN, SHARED, View

NARROWEST = 40
MAP_LINES = 8
PLAIN_SEQUENCES = 20
"""Sequences that are shown where there is no screen to fill."""
REASONS = {"memory": "memory", "rows": "a free row", "prompt": "another's prompt", "budget": "its turn"}
COLOURS = {OWN: "32", SHARED: "33", CACHED: "34", FREE: "90", "good": "32", "bad": "31", "warn": "33", "bold": "1", "dim": "2"}


@dataclass(slots=True, frozen=True)
class Style:
    """What the terminal can show."""

    colour: bool
    unicode: bool

    @classmethod
    def of(cls, stream: TextIO) -> Style:
        colour = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"
        return cls(colour, (stream.encoding or "").lower().replace("-", "") == "utf8")

    def paint(self, text: str, kind: str) -> str:
        return f"\x1b[{COLOURS[kind]}m{text}\x1b[0m" if self.colour and text else text

    def square(self, kind: str) -> str:
        return dict(zip((OWN, SHARED, CACHED, FREE), "█▓░·" if self.unicode else "#%+.", strict=True))[kind]


def screen(view: View, url: str, width: int, height: int | None, style: Style) -> list[str]:
    """``height``: lines that there are; None: as many as needed."""
    width = max(width, NARROWEST)
    lines = [_head(view, url, width, style)]
    if view.facts["engine"]["state"] in ("restarting", "dead"):
        lines += [style.paint(line, "bad") for line in textwrap.wrap(view.facts["engine"]["last_death"], width)]
    if "kv" not in view.facts:
        return lines
    lines += list(_numbers(view.facts, width, style))
    for sentence in view.facts["advice"]:
        lines += [style.paint(line, "warn") for line in textwrap.wrap(f"! {sentence}", width, subsequent_indent="  ")]
    lines += ["", *_map(view, width, style), ""]
    left = PLAIN_SEQUENCES if height is None else max(0, height - len(lines) - 3)
    return [*lines, *_sequences(view, width, left, style)]


def message(text: str, lines: list[str], width: int, style: Style) -> list[str]:
    """``lines`` are old, and why."""
    said = [style.paint(line, "bad") for line in textwrap.wrap(text, max(width, NARROWEST))]
    return [*said, "", *lines] if lines else said


def _head(view: View, url: str, width: int, style: Style) -> str:
    engine, server = view.facts["engine"], view.facts["server"]
    state, restarts = engine["state"], engine["restarts"]
    said = state if not restarts else f"{state}, {restarts} restart{'s' if restarts > 1 else ''}"
    text = f"quire {server['version']}  {server['model']}  {url}  "
    room = max(0, width - len(text))
    kind = {"running": "good", "restarting": "bad", "dead": "bad", "stopping": "bad"}.get(state, "warn")
    return style.paint(text[:width], "bold") + style.paint(said[:room], kind)


def _numbers(facts: dict[str, Any], width: int, style: Style) -> Iterator[str]:
    kv, totals, latency = facts["kv"], facts["totals"], facts["latency"]
    waits = ", ".join(f"{count:,} for {REASONS[reason]}" for reason, count in facts["waiting_for"].items())
    positions = kv["used"] * kv["block_size"]
    parts = [
        f"output {_rate(facts['rates']['sampled'])} tokens/s",
        f"{facts['running']:,} running",
        f"{facts['waiting']:,} waiting" + (f" ({waits})" if waits else ""),
        f"first token {duration(latency['first']['p50'])} (95 %: {duration(latency['first']['p95'])})",
        f"between tokens {duration(latency['between']['p50'])} (95 %: {duration(latency['between']['p95'])})",
        f"memory {_percent(kv['used'], kv['num_blocks'])} of {kv['num_blocks']:,} blocks x {kv['block_size']}",
        f"empty tails {_percent(kv['empty_tail'], positions)}",
        f"shared {kv['shared']:,} (saves {kv['saved']:,})",
        f"cached {kv['cached']:,}",
        f"prompts found {_percent(totals['hit_tokens'], totals['prompt_tokens'])}",
        f"preemptions {totals['preemptions']:,}",
    ]
    line = ""
    for part in parts:
        if line and len(line) + 3 + len(part) > width:
            yield line
            line = ""
        line = f"{line}   {part}" if line else part[:width]
    yield line


def _map(view: View, width: int, style: Style) -> Iterator[str]:
    total = view.facts["kv"]["num_blocks"]
    shown = min(total, max(len(view.states), width))
    each = 1
    while -(-shown // each) > width * MAP_LINES:
        each *= 2
    squares = []
    for first in range(0, shown, each):
        kinds = Counter(view.kind(block) for block in range(first, min(first + each, shown)))
        squares.append(max((SHARED, OWN, CACHED, FREE), key=lambda kind: kinds[kind]))
    for start in range(0, len(squares), width):
        yield "".join(style.paint(style.square(kind) * len(list(run)), kind) for kind, run in groupby(squares[start : start + width]))
    legend = "  ".join(f"{style.square(kind)} {kind}" for kind in (OWN, SHARED, CACHED, FREE))
    scale = "a block each" if each == 1 else f"{each} blocks each"
    rest = f"; {total - shown:,} were never used" if shown < total else ""
    yield style.paint(f"{legend}  ({scale}{rest})"[:width], "dim")


def _sequences(view: View, width: int, most: int, style: Style) -> Iterator[str]:
    sequences = view.sequences
    if not sequences or most <= 0:
        return
    yield style.paint(f"{'SEQUENCE':<24} {'TOKENS':>13} {'BLOCKS':>6}  STATE"[:width], "bold")
    for sequence in sequences[:most]:
        name = f"{sequence['id']} .{sequence['index'] + 1}"
        tokens = f"{sequence['tokens']:,}/{sequence['most']:,}"
        state = "running"
        if (reason := sequence["waits_for"]) is not None:
            state = ("preempted, " if sequence["preempted"] else "") + f"waits for {REASONS[reason]}"
        elif sequence["computed"] < sequence["prompt"]:
            state = f"prompt, {sequence['computed']:,} of {sequence['prompt']:,} computed"
        yield f"{name[-24:]:<24} {tokens:>13} {sum(block >= 0 for block in sequence['blocks']):>6}  {state}"[:width]
    rest = view.facts["running"] + view.facts["waiting"] - min(most, len(sequences))
    if rest > 0:
        yield style.paint(f"and {rest:,} more", "dim")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"
