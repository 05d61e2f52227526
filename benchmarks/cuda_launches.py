"""What it takes the host to queue a step with a prompt, whose kernels are launched one by one: as it is, and with Triton's own launches.

    python benchmarks/cuda_launches.py [--shape Qwen3-0.6B] [--tokens 64] [--rounds 30]

On a GPU the model has random weights. Without one it has the shape's layers, with rows that are small, under a driver that launches
nothing, and products of the library are left out: what remains is our Python and Triton's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cuda_models import SHAPES, make_backend, make_decoder
from quire.backends.cuda.backend import CudaBackend
from quire.backends.cuda.kernels import linear as products
from quire.backends.cuda.kernels import operations
from quire.backends.cuda.kernels.launching import Kernel
from quire.core.plan import RowStart, RowWork, StepPlan
from quire.sampling_params import SamplingParams

THIN = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}


class Idle:
    """A Triton driver for an H100 or H200 that isn't there."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *binary: Any) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


def queue(backend: CudaBackend, tokens: int) -> float:
    """Seconds until the host has queued a step with a prompt of ``tokens``."""
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    start = RowStart(0, [7] * tokens, tokens, SamplingParams(temperature=1.0, max_tokens=1), 0, ())
    plan = StepPlan([start], [RowWork(0, 0, tokens, list(range(-(-tokens // backend.block_size))), True, 0)])
    begin = perf_counter()
    backend.launch(plan)
    return perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-0.6B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    there = torch.cuda.is_available()
    device, shape = torch.device("cuda" if there else "cpu"), args.shape
    if not there:
        driver.set_active(Idle())
        SHAPES["thin"] = SHAPES[shape] | THIN
        shape = "thin"
        products._of_library = lambda x, weight, bias, out: torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    decoder = make_decoder(shape, device, operations)
    backend = make_backend(decoder, device, operations, 64, max_num_seqs=8, max_num_batched_tokens=2048, cuda_graphs=False)
    launched = 0
    inner = Kernel.launch

    def counting(self: Kernel, *arguments: Any, **options: Any) -> None:
        nonlocal launched
        launched += 1
        inner(self, *arguments, **options)

    with patch.object(Kernel, "launch", counting):
        queue(backend, args.tokens)
    ours, tritons = [], []
    for _ in range(3 + args.rounds):  # the first ones compile
        ours.append(queue(backend, args.tokens))
        with patch.object(Kernel, "launch", Kernel.launch_by_triton):
            tritons.append(queue(backend, args.tokens))
    print(f"{'device':24} {torch.cuda.get_device_name() if there else 'none'}; {shape}, {args.tokens} tokens, {launched} kernels of ours")
    for name, seconds in (("queued in", ours[3:]), ("with Triton's launches", tritons[3:])):
        print(f"{name:24} {median(seconds) * 1e3:6.2f} ms (best {min(seconds) * 1e3:.2f})")
    saved = (median(tritons[3:]) - median(ours[3:])) / launched
    print(f"{'saved a launch':24} {saved * 1e6:6.1f} us")


if __name__ == "__main__":
    main()
