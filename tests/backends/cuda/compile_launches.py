"""Launches by launching.py are those that Triton would make: the same compiled kernel, the same arguments. Of a kernel with arguments of
every kind, and of all of the backend's. Prints what it has compared, and fails where something differs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled_kernels import hopper
from quire.backends.base import open_backend
from quire.backends.cuda import opening
from quire.backends.cuda.kernels import operations as kernels
from quire.backends.cuda.kernels.launching import Kernel
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork, StepPlan
from quire.sampling_params import SamplingParams
from sample_models import GPT_OSS_SHORT, write_model

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
NUMBERS = (0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, -(2**31), 2**31 + 1, 2**40, 2**63, -(2**40) + 3)

faults: list[str] = []
compared: dict[str, int] = {}
inner = Kernel.launch


def launch(self: Kernel, grid: tuple[int, ...], arguments: Any, constants: tuple[Any, ...] = (), **options: Any) -> None:
    """Twice as steps do it, so that the second one comes from what is known, and once by Triton."""
    device = hopper()
    device.launched, device.arguments = [], []
    inner(self, grid, arguments, constants, **options)
    inner(self, grid, arguments, constants, **options)
    self.launch_by_triton(grid, arguments, constants, **options)
    name = self.function.fn.__name__
    compared[name] = compared.get(name, 0) + 1
    if len({id(each) for each in device.launched}) != 1:
        faults.append(f"{name}: another kernel than Triton's for {arguments}, {constants}, {options}")
    plain = [[each.data_ptr() if isinstance(each, Tensor) else each for each in these] for these in device.arguments]
    metadata = slice(4, 8)  # of the launch: hooks, which are not called, among them
    for these in plain:
        del these[metadata]
    if not plain[0] == plain[1] == plain[2]:
        faults.append(f"{name}: {plain[1]} instead of {plain[2]}")


@Kernel
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["second"])
def _of_every_kind(first, second, third, number, scale, count, SIZE: tl.constexpr, NAME: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(first + at).to(tl.float32) * scale + number + count
    if third is not None:
        value += tl.load(third + at).to(tl.float32)
    if NAME == "twice":
        value *= 2.0
    tl.store(second + at, value.to(second.dtype.element_ty))


def every_kind() -> None:
    """Arguments one after the other, and some at the same time; each of them once more at the end, when all are known."""
    memory = torch.zeros(256, dtype=torch.uint8)
    aligned = -memory.data_ptr() % 16

    def tensor(dtype: torch.dtype, off: int) -> Tensor:
        return memory[aligned + off :][:128].view(dtype)

    types = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
    base: tuple[Any, ...] = (tensor(torch.float32, 0), tensor(torch.float32, 0), None, 5, 1.5, 5)
    cases: list[tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]] = [(base, (16, "once"), {})]

    def other(**changes: Any) -> tuple[Any, ...]:
        names = ("first", "second", "third", "number", "scale", "count")
        return tuple(changes.get(name, value) for name, value in zip(names, base, strict=True))

    cases += [(other(number=number), (16, "once"), {}) for number in NUMBERS]
    cases += [(other(count=number), (16, "once"), {}) for number in NUMBERS[:-2]]
    cases += [(other(scale=scale), (16, "once"), {}) for scale in (1, 1.0, 16.0, 0.1)]
    cases += [(other(first=tensor(dtype, off)), (16, "once"), {}) for dtype, off in itertools.product(types, (0, 4, 8, 16))]
    cases += [(other(second=tensor(torch.float32, off)), (16, "once"), {}) for off in (4, 16)]
    cases += [(other(third=tensor(dtype, 0)), (16, "once"), {}) for dtype in types]
    cases += [(base, (size, name), {}) for size in (1, 16, 32) for name in ("once", "twice", None)]
    cases += [(base, (16, "once"), options) for options in ({"warps": 1}, {"warps": 8}, {"stages": 2}, {"registers": 64}, {"fuse": False})]
    for arguments, constants, options in cases + cases:
        _of_every_kind.launch((3,), arguments, constants, **options)
        _of_every_kind.launch((3, 2), arguments, constants, **options)


def steps(folder: Path, **options: Any) -> None:
    """Prompts, decoding rows beside a prompt, decoding rows alone, with all that a row may ask for. Nothing is computed: what
    is sampled is not read."""
    backend = open_backend(EngineConfig(
        str(folder), device="torch-cpu", kv_memory="8MiB", max_num_seqs=4, block_size=16, kv_debug=True, **options
    ))  # fmt: skip
    plain = SamplingParams(temperature=1.0, max_tokens=100)
    much = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, frequency_penalty=0.5, logit_bias={3: 1.0}, logprobs=2, max_tokens=100
    )
    starts = [RowStart(row, [7] * 40, 40, params, row, ()) for row, params in enumerate((plain, much, plain))]
    each = 3 * backend.groups.width
    work = [RowWork(row, 0, 40, list(range(each * row, each * (row + 1))), True, 0) for row in range(3)]
    backend.launch(StepPlan(starts[:2], work[:2]))
    decoding = [RowWork(row, 40, 1, [], True, 0) for row in range(2)]
    backend.launch(StepPlan(starts[2:], [*decoding, work[2]]))
    backend.launch(StepPlan([], [RowWork(0, 41, 1, [], True, 0), RowWork(1, 41, 1, [], True, 0), RowWork(2, 40, 1, [], True, 0)]))


def others() -> None:
    """What those steps had no use for: a row alone, a grammar's mask, copies of blocks."""
    row, weight = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(4, 128, 128, dtype=torch.bfloat16)
    kernels.linear(row, weight[0])
    chosen, weights = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2)
    kernels.experts(row, weight, None, None, weight[..., :64].contiguous(), None, None, chosen, weights, "silu", False)
    kernels.restrict(torch.zeros(2, 64), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    pool = torch.zeros(2, 2, 4, 64)
    kernels.copy_blocks(pool, pool, torch.zeros(1, 2, dtype=torch.int32))


if __name__ == "__main__":
    hopper()
    opening.operations = lambda device: kernels
    Kernel.launch = launch  # type: ignore[method-assign,assignment]
    every_kind()
    steps(GOLDEN / "qwen3-tied", dtype="bfloat16")
    steps(GOLDEN / "mistral-window", dtype="bfloat16", kv_dtype="int8", deterministic=True)
    steps(GOLDEN / "qwen3-moe", dtype="bfloat16", quantize="int8")
    steps(GOLDEN / "glm4-moe", dtype="bfloat16")
    with TemporaryDirectory() as folder:
        steps(write_model(Path(folder), GPT_OSS_SHORT), dtype="bfloat16")
    others()
    print(*(f"{name} {count}" for name, count in sorted(compared.items())), sep=", ")
    print(*faults, sep="\n")
    sys.exit(len(faults) > 0)
