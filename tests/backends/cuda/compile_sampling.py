"""Compiles the kernels of the sampler for an H100 or H200, prints a table, and fails where they spill, or where rows of a vocabulary that
is a multiple of 16 are not read 128 bits at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compiled_kernels import Case, Compiled, report
from quire.backends.cuda.kernels import adjustments, logprobs, sampling
from quire.backends.cuda.sampling_tensors import SamplingTensors

ROWS = 2
LARGE, SMALL = 151936, 4096
"""Vocabularies: of many chunks, and of one."""
MAX_REGISTERS = {"scan": 64, "_draw": 128, "_list_wanted": 128, "_draw_truncated": 128, "_pick": 128, "_place": 128, "_restrict": 80}
"""Of the others: 48."""
MAX_SHARED = 32 * 1024
WIDE = {"scan", "_draw", "_list_wanted", "_draw_truncated", "_count_greater"}


def floats() -> Tensor:
    return torch.ones(ROWS)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape or (ROWS,), dtype=dtype)


def logits(vocab: int = LARGE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((ROWS, vocab), dtype=dtype)


def draw(vocab: int, dtype: torch.dtype, truncates: bool) -> None:
    counters = ints(dtype=torch.int64), ints(dtype=torch.int64)
    sampling.sample(logits(vocab, dtype), SamplingTensors(floats(), ints(), floats(), floats(), *counters, truncates))


def logprobs_of(vocab: int, width: int) -> None:
    logprobs.report(logits(vocab), ints(), width)


DRAW, TRUNCATED = ["scan", "_draw"], ["_list_wanted", "_draw_truncated"]
REPORT = ["scan", "_count_greater", "_report"]
CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "draw fp32": (partial(draw, LARGE, torch.float32, True), [*DRAW, *TRUNCATED]),
    "draw bf16": (partial(draw, LARGE, torch.bfloat16, True), [*DRAW, *TRUNCATED]),
    "draw, one chunk": (partial(draw, SMALL, torch.float32, False), DRAW),
    "logprobs, 20": (partial(logprobs_of, LARGE, 20), [*REPORT, "_list_wanted", "_pick", "_place"]),
    "logprobs, all of one chunk": (partial(logprobs_of, SMALL, SMALL), [*REPORT, "_place"]),
    "restrict": (lambda: adjustments.restrict(logits(), ints(ROWS, LARGE // 32), ints()), ["_restrict"]),
    "ban": (lambda: adjustments.ban(logits(), ints(ROWS + 1), ints(16)), ["_edit"]),
    "bias": (lambda: adjustments.bias(logits(), ints(ROWS + 1), ints(16), torch.zeros(16)), ["_edit"]),
    "penalize": (
        lambda: adjustments.penalize(logits(), ints(ROWS, 4096), ints(), ints(), ints(), floats(), floats(), floats()),
        ["_count", "_penalize"],
    ),
}
"""Case → (calls, the kernels that they launch)."""


def faults(launches: list[str], kernels: list[Compiled]) -> Iterator[str]:
    found = [each.kernel for each in kernels]
    if found != launches:
        yield f"launches {found} instead of {launches}"
    for each in kernels:
        if each.registers > MAX_REGISTERS.get(each.kernel, 48):
            yield f"{each.kernel}: too many registers"
        if each.shared > MAX_SHARED:
            yield f"{each.kernel}: too much shared memory"
        if each.kernel in WIDE and not each.count("LDG.128"):
            yield f"{each.kernel}: no loads of 128 bits"


if __name__ == "__main__":
    sys.exit(report([Case(name, calls, partial(faults, launches)) for name, (calls, launches) in CALLS.items()]) > 0)
