"""What is sent: the same lengths in every round, and other tokens, so that nobody finds anything in a cache of prompts."""

from __future__ import annotations

from peer_engines.process import Request
from quire.workload import Lengths, TraceRequest, draw_requests, prompt_token_ids

WARM_UP = [(32, 8)] * 4
"""(prompt, output) lengths of what an engine runs, unmeasured, at the beginning of each of its turns."""


def draw(count: int, prompt: Lengths, output: Lengths, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) lengths, as ``quire bench throughput`` draws them."""
    return [(r.prompt_tokens, r.output_tokens) for r in draw_requests(count, prompt, output, seed)]


def fill(lengths: list[tuple[int, int]], vocab_size: int, number: int) -> list[Request]:
    """Random tokens, a pure function of ``number``: other ones for each use."""
    return [(prompt_token_ids(TraceRequest(None, *pair), i, vocab_size, number), pair[1]) for i, pair in enumerate(lengths)]
