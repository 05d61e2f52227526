"""What benchmark, planner and simulator run: requests with realistic lengths, as a pure function of a seed, or from a trace.

``arrivals``: when they come; ``lengths``: distributions; ``requests``: what is drawn from them, and the tokens of a prompt; ``traces``:
files.
"""

from __future__ import annotations

from quire.workload.arrivals import arrive_at, sped_up
from quire.workload.lengths import CAP, PAPER, SIGMA, Lengths, draw_lengths, paper_lengths
from quire.workload.requests import PREFIX_BLOCK, TraceRequest, WorkloadRequest, draw_requests, prompt_token_ids, synthetic
from quire.workload.traces import read_trace

__all__ = [
    "CAP",
    "PAPER",
    "PREFIX_BLOCK",
    "SIGMA",
    "Lengths",
    "TraceRequest",
    "WorkloadRequest",
    "arrive_at",
    "draw_lengths",
    "draw_requests",
    "paper_lengths",
    "prompt_token_ids",
    "read_trace",
    "sped_up",
    "synthetic",
]
