"""What sampling costs: 64 sequences over a vocabulary of 128,000, for each kind of parameters.

    python benchmarks/sampling.py [--rows 64] [--vocab 128000] [--history 512] [--rounds 9] [--step-ms 110]

The whole of Sampler.sample is timed, parameters and results included. Logits are what a trained model's look like: most
tokens far below a few likely ones (normal, scaled by 3); --flat takes a standard normal, where top_p keeps half of the
vocabulary. --step-ms: a step to compare with (about 110 ms is an int8 step of 64 rows of llama-0.5b on two cores).
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import numpy as np

from quire.backends.cpu import _native as native
from quire.backends.cpu.sampler import Sampler
from quire.backends.rows import Rows
from quire.core.plan import RowStart, StepResult
from quire.sampling_params import SamplingParams

KINDS: dict[str, list[SamplingParams]] = {
    "greedy": [SamplingParams(temperature=0.0)],
    "temperature 0.8": [SamplingParams(temperature=0.8)],
    "top_k 50": [SamplingParams(top_k=50)],
    "top_p 0.9": [SamplingParams(top_p=0.9)],
    "top_k 50, top_p 0.9": [SamplingParams(temperature=0.8, top_k=50, top_p=0.9)],
    "min_p 0.05": [SamplingParams(min_p=0.05)],
    "penalties, greedy": [SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2)],
    "penalties, top_p": [SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2, top_p=0.9)],
    "logprobs 5, greedy": [SamplingParams(temperature=0.0, logprobs=5)],
    "logprobs 5, top_p": [SamplingParams(top_p=0.9, logprobs=5)],
}
KINDS["mixed"] = [kind[0] for kind in KINDS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=128_000)
    parser.add_argument("--history", type=int, default=512, help="tokens of each sequence, for the penalties")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-ms", type=float, default=110.0)
    parser.add_argument("--flat", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((args.rows, args.vocab), np.float32) * (1 if args.flat else 3)
    which, lengths = np.arange(args.rows, dtype=np.int32), np.full(args.rows, args.history, np.int64)
    histories = rng.integers(0, args.vocab, (args.rows, args.history)).tolist()
    samplers = {}
    for name, kinds in KINDS.items():
        rows = Rows(args.rows, 2 * args.history, 16)
        samplers[name] = Sampler(rows, args.vocab)
        for row in range(args.rows):
            start = RowStart(row, histories[row], args.history // 2, kinds[row % len(kinds)], seed=row, stop_ids=(2,))
            rows.begin(start)
            samplers[name].begin(start)
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(args.rounds):
        for name, sampler in samplers.items():
            start_time = perf_counter()
            sampler.sample(logits, which, lengths, StepResult())
            times[name].append(perf_counter() - start_time)
    print(f"{native.isa()}, {native.num_threads()} threads, {args.rows} rows of {args.vocab:,}; share of a step of {args.step_ms:.0f} ms")
    for name, values in times.items():
        ms = median(values) * 1e3
        print(f"{name:20} {ms:7.2f} ms  {ms / args.step_ms:5.1%}")


if __name__ == "__main__":
    main()
