"""Where a step's time goes: every kernel call inside the forward pass, beside the limit that binds it.

    python benchmarks/step_profile.py MODEL [--rows 1 2 4 8 16 32 64] [--guesses 3 7] [--prefill 512 2048] [--quantize int8] [--rounds 5]

A call's limit is the longer of reading its weights (or KV) at the measured read bandwidth and doing its multiply-adds at the
measured float32 or int8 peak; all are measured in the same run. Calls that read no weights (norms, rotary) have no limit: all of
their time counts as lost. "between" is Python, and the clocks around the calls: the step without them. "unwatched" is a decode step
without these clocks, "replayed" as the engine runs it, without Python between its calls. --guesses: steps of one sequence with so
many guessed tokens. Times are the best of the rounds, in ms.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np

from quire.backends.cpu import _native as native
from quire.backends.cpu import decoder as module
from quire.backends.cpu.decoder import Decoder
from quire.backends.cpu.packer import Packer
from quire.backends.rows import Batch, Part
from quire.config import EngineConfig
from quire.models.quantization import Quantization
from quire.models.weights import load_model, resolve_model

BLOCK = 16


class Recorder:
    """Stands in for the native module inside the decoder, and times what goes through."""

    def __init__(self, names: dict[int, str], limit: Callable[[float, float, str], float]) -> None:
        self.names, self.limit = names, limit
        self.seconds: dict[str, float] = defaultdict(float)
        self.least: dict[str, float] = defaultdict(float)
        self.context_sum = self.distinct = 0

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(native, name)
        if not callable(kernel) or isinstance(kernel, type):
            return kernel

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            out = kernel(*args, **kwargs)
            seconds = perf_counter() - start
            key, least = self.cost(name, args)
            self.seconds[key] += seconds
            self.least[key] += least
            return out

        return timed

    def cost(self, name: str, args: tuple[Any, ...]) -> tuple[str, float]:
        packed = [a for a in args if isinstance(a, native.PackedLinear)]
        if packed:
            key = self.names.get(id(packed[0]), name)
            rows = next(len(a) for a in args if isinstance(a, np.ndarray))
            columns = packed[0].n * (2 if packed[0].gated else 1)
            return key, self.limit(packed[0].nbytes, 2 * rows * columns * packed[0].k, packed[0].dtype)
        if name == "experts":
            experts, x, scores, inner = args[0], args[1], args[2], args[5]
            chosen = np.argsort(-scores, axis=1, kind="stable")[:, : experts.taken]
            read = experts.nbytes * len(np.unique(chosen)) // experts.count
            operations = 2 * chosen.size * x.shape[1] * inner.shape[1] * (3 if experts.gated else 2)
            return name, self.limit(read, operations, experts.dtype)
        if name == "paged_attention":
            queries, keys = args[0], args[1]
            read = 2 * self.distinct * keys.shape[1] * keys.shape[2] * keys.itemsize
            return name, self.limit(read, 4 * queries.shape[1] * queries.shape[2] * self.context_sum, "float32")
        return name, 0.0


def decode(rows: int, context: int, blocks: int) -> Batch:
    """A batch of ``rows`` sequences of ``context`` positions, each at its last."""
    per = -(-context // BLOCK)
    tables = np.random.default_rng(0).permutation(blocks)[: rows * per].astype(np.int32).reshape(1, rows, per)
    counter = np.arange(rows, dtype=np.int32)
    at = np.full(rows, context - 1, np.int32)
    return Batch(counter, np.arange(rows + 1, dtype=np.int32), at, at, counter + np.int32(7), tables, counter, at + np.int64(1))


def positions(tokens: int, blocks: int, start: int = 0) -> Batch:
    """One sequence, positions ``start`` to ``start + tokens``; logits of all of them."""
    per = -(-(start + tokens) // BLOCK)
    table = np.random.default_rng(0).permutation(blocks)[:per].astype(np.int32).reshape(1, 1, per)
    counter = np.arange(tokens, dtype=np.int32)
    ends = np.array([0, tokens], np.int32)
    row = np.zeros(1, np.int32)
    return Batch(row, ends, np.array([start], np.int32), counter + np.int32(start), counter, table, row, row + np.int64(start + tokens))


def prefill(tokens: int, blocks: int) -> Batch:
    """A prompt; logits of its last position."""
    batch, last = positions(tokens, blocks), np.array([tokens - 1], np.int32)
    batch.asked = Part(last, batch.rows, np.array([0, 1], np.int32), last)
    return batch


def busy_seconds() -> float:
    """CPU time that all processes have taken, where the system says."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(decoder: Decoder, recorder: Recorder, batch: Batch, rounds: int) -> None:
    steps, kernels, unwatched, replayed = [], [], [], []
    recorder.context_sum = int((batch.positions + 1).sum())
    recorder.distinct = int((batch.start + np.diff(batch.query_start)).sum())
    for _ in range(rounds + 1):
        recorder.seconds.clear()
        recorder.least.clear()
        start = perf_counter()
        decoder.logits(decoder.hidden(batch))
        steps.append(perf_counter() - start)
        kernels.append(dict(recorder.seconds))
        if batch.whole:  # decode
            vars(module)["native"] = native
            start = perf_counter()
            decoder.logits(decoder.hidden(batch))
            unwatched.append(perf_counter() - start)
            start = perf_counter()
            decoder.forward(batch)
            replayed.append(perf_counter() - start)
            vars(module)["native"] = recorder
    step = min(steps[1:])
    least = sum(recorder.least.values())
    total = {key: min(k[key] for k in kernels[1:]) for key in kernels[0]}
    total["between"] = step - sum(total.values())
    print(
        f"  step {1e3 * step:8.2f}   limit {1e3 * least:8.2f}   reached {least / step:4.0%}   median {1e3 * median(steps[1:]):8.2f}", end=""
    )
    for what, seconds in (("unwatched", unwatched[1:]), ("replayed", replayed[1:])):
        if seconds:
            print(f"   {what} {1e3 * min(seconds):8.2f}  {least / min(seconds):4.0%}", end="")
    print()
    for key, took in sorted(total.items(), key=lambda item: recorder.least.get(item[0], 0.0) - item[1]):
        bound = recorder.least.get(key, 0.0)
        over = f"{took / bound:5.2f} x" if bound else "      -"
        cost = f"{1e3 * took:8.3f}  {took / step:6.1%}"
        print(f"    {key:16} {cost}  limit {1e3 * bound:8.3f}  {over}   lost {(took - bound) / step:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--guesses", type=int, nargs="*", default=[])
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--dtype")
    parser.add_argument("--quantize", choices=("int8", "int4", "stored", "none"), help="default: stored for a quantized GGUF file")
    parser.add_argument("--kv-dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = load_model(resolve_model(args.model))
    most = max([*args.rows, *args.prefill, *(1 + count for count in args.guesses)])
    blocks = 2 + max(max(args.rows, default=1) * (-(-args.context // BLOCK)), -(-max(args.prefill, default=1) // BLOCK))
    config = EngineConfig(quantize=args.quantize).as_stored(model.spec.quantized)
    packer = Packer(args.dtype, Quantization.of(config, model.spec), blocks=model.blocks)
    decoder = Decoder(
        model.spec, model.tensors, num_blocks=blocks, block_size=BLOCK, kv_dtype=args.kv_dtype, max_tokens=most,
        max_rows=max([*args.rows, *(1 + count for count in args.guesses)], default=1), max_model_len=8192, packer=packer,
    )  # fmt: skip
    bandwidth, peak = native.measure_read_bandwidth() * 1e9, native.measure_peak("float32") * 1e9
    peaks = {dtype: native.measure_peak(native.arithmetic(dtype)) * 1e9 for dtype in ("bfloat16", "int8", "int4")}
    print(f"{native.isa()}, {native.num_threads()} threads; read bandwidth {bandwidth / 1e9:.1f} GB/s; 10^9 operations/s:", end=" ")
    print(f"float32 {peak / 1e9:.0f}, bfloat16 {peaks['bfloat16'] / 1e9:.0f}, int8 {peaks['int8'] / 1e9:.0f}")
    names = {id(part): "lm_head" for part in decoder.lm_head.parts}
    for layer in decoder.layers:
        linears = {"qkv": layer.qkv, "o": layer.o}
        linears |= {name: part for name in ("up", "down", "router") if (part := getattr(layer.mlp, name, None)) is not None}
        names |= {id(part): name for name, linear in linears.items() for part in linear.parts}
    recorder = Recorder(names, lambda read, work, dtype: max(read / bandwidth, work / peaks.get(dtype, peak)))
    vars(module)["native"] = recorder
    start, busy, own = perf_counter(), busy_seconds(), process_time()
    for rows in args.rows:
        print(f"decode, {rows} rows, context {args.context}")
        measure(decoder, recorder, decode(rows, args.context, blocks), args.rounds if rows > 8 else 3 * args.rounds)
    for count in args.guesses:
        print(f"decode, 1 row with {count} guessed tokens, context {args.context}")
        measure(decoder, recorder, positions(1 + count, blocks, args.context - 1 - count), 3 * args.rounds)
    for tokens in args.prefill:
        print(f"prefill, {tokens} tokens")
        measure(decoder, recorder, prefill(tokens, blocks), args.rounds)
    print(f"others: {(busy_seconds() - busy - (process_time() - own)) / (perf_counter() - start):.0%} of a CPU")


if __name__ == "__main__":
    main()
