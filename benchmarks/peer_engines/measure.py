"""Rounds in which the engines take turns, what a turn measures, and whether the answers agree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import median
from typing import Any, Final, Protocol

from peer_engines.process import Answer, Peer, PeerFailed, Request
from peer_engines.workload import WARM_UP, fill

PREFILL_TIMES: Final = 3
"""A prompt's time is the median of this many, within a turn: it is short."""


class Mode(Protocol):
    """What is measured."""

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, output) lengths of the longest that is sent at once."""
        ...

    def turn(self, peer: Peer, draws: Iterator[list[Request]]) -> tuple[dict[str, float], Answer | None]:
        """One engine's turn: name of a figure → its value, and the answer whose tokens are compared."""
        ...

    def draws(self) -> list[list[tuple[int, int]]]:
        """Lengths of all that one turn sends, in order. Every engine is sent the same in a round."""
        ...


@dataclass(frozen=True)
class Throughput:
    """All requests at once."""

    lengths: list[tuple[int, int]]

    def draws(self) -> list[list[tuple[int, int]]]:
        return [self.lengths]

    def turn(self, peer: Peer, draws: Iterator[list[Request]]) -> tuple[dict[str, float], Answer | None]:
        answer = peer.run(next(draws))
        return {"output tokens/s": answer.output_tokens / answer.seconds}, answer


@dataclass(frozen=True)
class Decode:
    """One request by itself: the time from its first token to its last, as the difference of two requests."""

    prompt: int
    output: int

    @property
    def lengths(self) -> list[tuple[int, int]]:
        return [(self.prompt, self.output)]

    def draws(self) -> list[list[tuple[int, int]]]:
        return [[(self.prompt, 1)], self.lengths, [(self.prompt, 1)]]

    def turn(self, peer: Peer, draws: Iterator[list[Request]]) -> tuple[dict[str, float], Answer | None]:
        before, whole, after = (peer.run(requests) for requests in draws)
        seconds = whole.seconds - (before.seconds + after.seconds) / 2
        return {"decode tokens/s": (self.output - 1) / seconds}, whole


@dataclass(frozen=True)
class Prefill:
    """One prompt by itself, and one token of output."""

    prompts: tuple[int, ...]

    @property
    def lengths(self) -> list[tuple[int, int]]:
        return [(max(self.prompts), 1)]

    def draws(self) -> list[list[tuple[int, int]]]:
        return [[(prompt, 1)] for prompt in self.prompts for _ in range(PREFILL_TIMES)]

    def turn(self, peer: Peer, draws: Iterator[list[Request]]) -> tuple[dict[str, float], Answer | None]:
        seconds: dict[int, list[float]] = {prompt: [] for prompt in self.prompts}
        for requests in draws:
            seconds[len(requests[0][0])].append(peer.run(requests).seconds)
        return {f"prefill of {n:,}, tokens/s": n / median(times) for n, times in seconds.items()}, None


@dataclass
class Record:
    """What was measured of one engine."""

    settings: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    """One for each round: ``figures``, and where the tokens are compared the ``seconds`` and ``output_tokens`` (and so on) of the run."""
    agreement: dict[str, float] | None = None
    """With the first engine, in the first round: ``requests`` compared, ``same`` throughout, ``first`` (with the same first token),
    ``prefix`` (mean share of the output up to the first difference)."""
    failure: str | None = None


def measure(peers: list[Peer], mode: Mode, rounds: int, vocab_size: int, *, restart: bool = False) -> dict[str, Record]:
    """Every engine once a round; every other round in reverse order, so that a drift of the machine favours nobody.

    All are started first and held while they wait; ``restart``: each is started for its turn and stopped after it. An engine that fails
    is left out from then on, and its record says why.
    """
    records = {peer.name: Record(peer.settings) for peer in peers}
    numbers, reference = count(1), None
    try:
        for peer in peers if not restart else ():
            _guarded(records[peer.name], peer, partial(_start, peer))
        for number in range(rounds):
            warm_up = fill(WARM_UP, vocab_size, next(numbers))
            draws = [fill(lengths, vocab_size, next(numbers)) for lengths in mode.draws()]
            for peer in peers[:: 1 if number % 2 == 0 else -1]:
                record = records[peer.name]
                answer = _guarded(record, peer, partial(_turn, peer, record, mode, warm_up, draws, restart)) if not record.failure else None
                if number == 0 and answer is not None:
                    reference = reference or answer
                    record.agreement = _agreement(reference, answer)
    finally:
        for peer in peers:
            peer.stop()
    return records


def _start(peer: Peer) -> None:
    peer.start()
    peer.hold()
    _say(f"{peer.name} is ready")


def _turn(peer: Peer, record: Record, mode: Mode, warm_up: list[Request], draws: list[list[Request]], restart: bool) -> Answer | None:
    peer.start() if restart else peer.release()
    peer.run(warm_up)
    figures, answer = mode.turn(peer, iter(draws))
    peer.stop() if restart else peer.hold()
    record.settings = peer.settings
    whole = {} if answer is None else {
        "seconds": answer.seconds, "requests": len(answer.requests), "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
    }  # fmt: skip
    record.runs.append({"figures": figures, **whole})
    _say(f"round {len(record.runs)}, {peer.name}: {', '.join(f'{name} {value:.1f}' for name, value in figures.items())}")
    return answer


def _guarded(record: Record, peer: Peer, do: Callable[[], Answer | None]) -> Answer | None:
    try:
        return do()
    except PeerFailed as e:
        record.failure = str(e)
        _say(str(e))
        peer.stop()
        return None


def _say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def _agreement(reference: Answer, answer: Answer) -> dict[str, float]:
    """Rounding differs between engines, so a near tie between two tokens may go either way, and what follows differs."""
    pairs = [(a, b) for a, b in zip(reference.outputs, answer.outputs, strict=False) if a and b]
    shared = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs]
    return {
        "requests": len(pairs),
        "same": sum(n == len(a) for n, (a, _) in zip(shared, pairs, strict=True)),
        "first": sum(n > 0 for n in shared),
        "prefix": sum(n / len(a) for n, (a, _) in zip(shared, pairs, strict=True)) / len(pairs),
    }


def figures(record: Record) -> dict[str, dict[str, float]]:
    """Name of a figure → its median, min and max over the rounds."""
    names = record.runs[0]["figures"] if record.runs else ()
    values = {name: [run["figures"][name] for run in record.runs] for name in names}
    return {name: {"median": median(v), "min": min(v), "max": max(v)} for name, v in values.items()}
