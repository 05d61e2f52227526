"""What a busy process beside it costs: batch-1 decode alone, and while another process keeps one core busy.

    python benchmarks/busy_neighbour.py --model FOLDER [--rounds 5] [--seconds 1.5] [--dtype auto] [--threads N]

Three situations take turns within each round: alone; beside a busy process that the system places where it likes; beside
one that is bound to one core. Tokens per second, medians of the rounds, and the share of the speed alone that is kept
(the median of the rounds' shares). Runs on Linux, on two cores or more; on more than two, see --neighbours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from quire.backends.base import open_backend
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

SPIN = "import os, sys\nif len(sys.argv) > 1: os.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@contextmanager
def neighbours(count: int, cores: list[int]) -> Iterator[None]:
    """``count`` processes that compute all the time, the i-th bound to ``cores[i]`` where there is one."""
    each = [[sys.executable, "-c", SPIN, *map(str, cores[i : i + 1])] for i in range(count)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in each]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(0.2)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Decode:
    """One sequence that is decoded step by step, for as long as it is asked to."""

    def __init__(self, config: EngineConfig) -> None:
        self.backend = open_backend(config)
        self.engine = Engine(self.backend, config)
        self.requests = 0

    def tokens_per_second(self, seconds: float) -> float:
        self.requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=self.backend.max_model_len - 64, ignore_eos=True)
        self.engine.add(Request(str(self.requests), [self.requests] * 32, params, seed=0))
        for _ in range(4):
            self.engine.step()
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds and self.engine.has_work:
            self.engine.step()
            tokens += 1
        elapsed = time.perf_counter() - start
        self.engine.abort(str(self.requests))
        return tokens / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of decoding in each situation of a round")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    decode = Decode(EngineConfig(model=args.model, dtype=args.dtype, threads=args.threads, quantize=args.quantize, speculation="off"))
    decode.tokens_per_second(args.seconds)
    situations = {"alone": (0, []), "beside, free": (args.neighbours, []), "beside, bound": (args.neighbours, cores[::-1])}
    speeds: dict[str, list[float]] = {name: [] for name in situations}
    for _ in range(args.rounds):
        for name, (count, bound) in situations.items():
            with neighbours(count, bound):
                speeds[name].append(decode.tokens_per_second(args.seconds))
    for name, values in speeds.items():
        kept = [value / alone for value, alone in zip(values, speeds["alone"], strict=True)]
        print(
            f"{name:14} {statistics.median(values):7.1f} tokens/s ({min(values):.1f} to {max(values):.1f}), "
            f"{statistics.median(kept):4.0%} of alone ({min(kept):.0%} to {max(kept):.0%})"
        )


if __name__ == "__main__":
    main()
