"""What a step costs outside the kernels: scheduling, laying out the batch, Python between the kernel calls, commit.

    python benchmarks/step_python.py --model FOLDER [--batch 1 32] [--steps 60] [--context 128] [--dtype auto]

Kernel calls are timed one by one (argument checks included), or all those of a replayed step together; what is left of the step's
time, less what the timing itself costs, is Python. Medians over the steps, with the KV cache at about --context positions a sequence.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from quire.backends.cpu import _native, decoder, replay, sampler
from quire.backends.cpu.backend import CpuBackend
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams


def use(module: Any) -> None:
    """``module`` is the native one for those that call it."""
    for caller in (decoder, replay, sampler):
        vars(caller)["native"] = module


class Timed:
    """Stands in for the native module: adds up the time and the number of calls of its functions."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        names = [name for name in dir(_native) if not name.startswith("_")]
        functions = {name: getattr(_native, name) for name in names}
        self.module = SimpleNamespace(**{n: f if isinstance(f, type) else self.wrap(f) for n, f in functions.items()})
        self.module.Recording = lambda: TimedRecording(self)

    def wrap(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start
                self.calls += 1

        return timed

    def own_seconds(self) -> float:
        """Of one timed call: what it adds to the time outside."""
        nothing = self.wrap(lambda a, b, c, d: None)
        times = []
        for _ in range(20):
            self.seconds, start = 0.0, perf_counter()
            for _ in range(1000):
                nothing(1, 2, 3, d=4)
            times.append((perf_counter() - start - self.seconds) / 1000)
        return min(times)


class TimedRecording:
    """A recording of untimed calls, whose run is timed."""

    def __init__(self, timed: Timed) -> None:
        self._recording = _native.Recording()
        self.run = timed.wrap(self._recording.run)

    def __enter__(self) -> None:
        self._recording.__enter__()

    def __exit__(self, *args: object) -> None:
        self._recording.__exit__(*args)


def measure(backend: CpuBackend, config: EngineConfig, batch: int, context: int, steps: int, profile: bool) -> None:
    engine = Engine(backend, config)
    params = SamplingParams(temperature=0.0, max_tokens=steps + 8, ignore_eos=True)
    for i in range(batch):
        engine.add(Request(str(i), [(i * 31 + k) % 1000 for k in range(context)], params, i))
    while engine.scheduler.waiting or any(seq.num_computed < context for seq in engine.scheduler.running):
        engine.step()
    timed = Timed()
    own = timed.own_seconds()
    use(timed.module)
    profiler = cProfile.Profile()
    totals, outside = [], []
    for step in range(steps):
        timed.seconds, timed.calls = 0.0, 0
        if profile and step == steps // 2:
            profiler.enable()
        start = perf_counter()
        engine.step()
        total = perf_counter() - start
        totals.append(total)
        outside.append(total - timed.seconds - own * timed.calls)
    profiler.disable()
    use(_native)
    half = slice(0, steps // 2) if profile else slice(None)
    total, python = median(totals[half]), median(outside[half])
    print(f"batch {batch:3}: step {total * 1e3:8.3f} ms, {timed.calls} kernel calls; outside {python * 1e3:6.3f} ms, {python / total:.1%}")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize")
    parser.add_argument("--profile", action="store_true", help="where Python's time goes, over the second half of the steps")
    args = parser.parse_args()
    config = EngineConfig(model=args.model, dtype=args.dtype, quantize=args.quantize, speculation="off")
    backend = CpuBackend.open(config)
    for batch in args.batch:
        measure(backend, config, batch, args.context, args.steps, args.profile)


if __name__ == "__main__":
    main()
