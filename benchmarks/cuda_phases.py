"""The phases of cuda_session.py that take models and kernels."""

from __future__ import annotations

import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cuda_models import SHAPES, canonical, make_backend, make_decoder
from quire.backends.cuda.backend import CudaBackend, Pending
from quire.backends.cuda.cache import KVPool
from quire.backends.cuda.kernels.attention_configs import decode_config, prefill_config
from quire.backends.cuda.limits import copy_bandwidth
from quire.backends.cuda.quantize import quantize_weight
from quire.backends.cuda.reference import operations as reference
from quire.backends.cuda.sampling_tensors import SamplingTensors
from quire.backends.cuda.swap import Copier
from quire.backends.cuda.tiles import SPLIT, DecodeScratch, DecodeTiles, packed_size, prefill_tiles, write_decode_tiles
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.plan import RowStart, RowWork, StepPlan
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from cuda_session import Session

FLOORS_MS = {
    ("Llama-3.1-8B", 1): (3.5, 4.5), ("Llama-3.1-8B", 32): (4.5, 5.6), ("Llama-3.1-8B", 256): (12.9, 16.0),
    ("Qwen3-0.6B", 1): (0.31, 0.8), ("Qwen3-0.6B", 32): (1.15, 1.8), ("Qwen3-0.6B", 256): (7.4, 9.5),
}  # fmt: skip
"""(model, batch) → (what an H200 allows, what is wanted) for a step at a context of 1,024."""
DRAIN = {"Qwen3-0.6B": 22_000, "Llama-3.1-8B": 10_000}
"""Output tokens/s that are wanted of 256 requests."""
PEER_S = 75
"""Room that a run of transformers wants."""


def seconds(session: Session, work: Callable[[], object], repeats: int = 20) -> float:
    """The median of some runs, by the device's clock; each begins with another cache, and with the device busy until the host has queued
    it: a launch may take the host longer than the device."""
    if session.device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=session.device)
    times = []
    for i in range(repeats + 3):
        flush.zero_()
        torch.cuda._sleep(1_000_000)  # cycles
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


# --- kernels ---


def _attention_case(session: Session, lengths: list[int], heads: int, kv_heads: int, dim: int, block: int, kv: str) -> dict[str, Any]:
    """Sequences with random keys and values in scattered blocks, and what a launch needs."""
    device, rows = session.device, len(lengths)
    width = -(-max(lengths) // block)
    pool = KVPool(1, rows * width, kv_heads, block, dim, kv, device)
    if pool.scales is not None:
        pool.scales.fill_(0.02)
    layer = pool.layer(0)
    for numbers in (layer.keys, layer.values):
        numbers.copy_(torch.randn(numbers.shape, device=device, dtype=torch.bfloat16).mul_(30.0 if pool.scales is not None else 1.0))
    tables = torch.randperm(rows * width, device=device).view(rows, width).int()
    lengths_np = np.array(lengths, np.int32)
    capacity = int((-(-lengths_np // SPLIT)).sum())
    packed = np.zeros(packed_size(rows, capacity), np.int32)
    write_decode_tiles(packed, lengths_np)
    config = decode_config(dim, block, torch.bfloat16, layer.keys.dtype, heads // kv_heads)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    scratch = DecodeScratch(rows, capacity, heads, kv_heads, dim, device)
    tiles = DecodeTiles(torch.from_numpy(packed).to(device), rows, scratch, config.programs_per_sm * processors)
    return {
        "kv": layer, "tables": tables, "rows": torch.arange(rows, device=device, dtype=torch.int32),
        "lengths": torch.from_numpy(lengths_np).to(device), "tiles": tiles,
    }  # fmt: skip


def _exact(q: Tensor, kv: Any, table: Tensor, length: int) -> Tensor:
    """Attention of the last len(q) positions in float64, [n, heads, dim]."""
    heads, kv_heads = q.shape[1], kv.keys.shape[1]
    blocks = table.long()[: -(-length // kv.keys.shape[2])]

    def gather(numbers: Tensor, scales: Tensor | None) -> Tensor:
        found = numbers[blocks].double()
        if scales is not None:
            found = found * scales[blocks].double()[..., None]
        return found.transpose(0, 1).reshape(kv_heads, -1, q.shape[2])[:, :length].repeat_interleave(heads // kv_heads, 0)

    keys, values = gather(kv.keys, kv.key_scales), gather(kv.values, kv.value_scales)
    scores = torch.einsum("qhd,hkd->hqk", q.double(), keys) * q.shape[2] ** -0.5
    position = torch.arange(length - len(q), length, device=q.device)[:, None]
    scores.masked_fill_(torch.arange(length, device=q.device)[None] > position, float("-inf"))
    return torch.einsum("hqk,hkd->qhd", scores.softmax(-1), values)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(session: Session) -> dict[str, Any]:
    """Norm, activation and attention against float64; the bound is 1e-2, of bfloat16."""
    torch.manual_seed(time.time_ns() % (1 << 31))
    ops, device, found = session.ops, session.device, session.found
    bf16 = torch.bfloat16
    x = torch.randn(37, 1024, device=device, dtype=bf16)
    weight = torch.rand(1024, device=device, dtype=bf16)
    norm = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found["rms_norm"] = _error(ops.rms_norm(x, weight, 1e-5), norm)
    gate, up = x.double().chunk(2, -1)
    found["silu gated"] = _error(ops.activate(x, "silu", True), torch.nn.functional.silu(gate) * up)
    lengths = [1, 63, 64, 65, 700, 1500]
    for kv in ("bfloat16", "int8", "fp8"):
        for block in (16, 64):
            case = _attention_case(session, lengths, 32, 8, 128, block, kv)
            q = torch.randn(len(lengths), 32, 128, device=device, dtype=bf16)
            out = torch.full_like(q, float("nan"))
            ops.decode(q, *case.values(), 128**-0.5, 0, out)
            expected = torch.cat([_exact(q[i : i + 1], case["kv"], case["tables"][i], n) for i, n in enumerate(lengths)])
            found[f"decode {kv} block {block}"] = _error(out, expected)
            alone = torch.full_like(q[:1], float("nan"))
            one = _attention_case(session, lengths[5:], 32, 8, 128, block, kv) | {"kv": case["kv"], "tables": case["tables"][5:]}
            ops.decode(q[5:], *one.values(), 128**-0.5, 0, alone)
            found[f"decode {kv} block {block}: a row alone differs"] = float(not torch.equal(alone[0], out[5]))
            found[f"prefill {kv} block {block}"] = _check_prefill(session, kv, block)
    session.note("operations against float64", f"{max(found.values()):.1e} at worst, of {len(found)} cases", "1e-2")
    if wrong := {name: error for name, error in found.items() if not error < 1e-2}:  # NaN too
        raise AssertionError(wrong)
    return found


def _check_prefill(session: Session, kv: str, block: int) -> float:
    lengths, counts = [300, 129, 1], [130, 129, 1]
    case = _attention_case(session, lengths, 32, 8, 128, block, kv)
    start = np.cumsum([0, *counts]).astype(np.int32)
    q = torch.randn(int(start[-1]), 32, 128, device=session.device, dtype=torch.bfloat16)
    rows = prefill_config(128, block, q.dtype, case["kv"].keys.dtype).rows
    tiles = torch.from_numpy(prefill_tiles(start, np.array(lengths, np.int32), rows).astype(np.int32)).to(session.device)
    out = torch.full_like(q, float("nan"))
    there = torch.from_numpy(start).to(session.device)
    session.ops.prefill(q, case["kv"], case["tables"], case["rows"], there, case["lengths"], tiles, 128**-0.5, 0, out)
    exact = [_exact(q[start[i] : start[i + 1]], case["kv"], case["tables"][i], n) for i, n in enumerate(lengths)]
    return _error(out, torch.cat(exact))


def others(session: Session) -> dict[str, Any]:
    """The other operations against their reference on the CPU; the sampler's draws, and copies through the host, have to be the same."""
    torch.manual_seed(time.time_ns() % (1 << 31))
    found, device, bf16 = session.found, session.device, torch.bfloat16

    def compare(name: str, work: Callable[..., Any], expected: Callable[..., Any], *arguments: Any, exact: bool = False) -> None:
        """Of what both return, or of their first argument where that is nothing."""
        try:
            there = _moved(arguments, device)
            ours, theirs = work(*there), expected(*(arguments := _moved(arguments, "cpu")))
            ours, theirs = (there[0], arguments[0]) if theirs is None else (ours, theirs)
            pairs = list(zip(ours, theirs, strict=True)) if isinstance(theirs, tuple) else [(ours, theirs)]
            if exact:
                found[name] = max(float((a.cpu() != b).float().mean()) for a, b in pairs)
            else:
                found[name] = max(_error(a.cpu()[b.isfinite()], b[b.isfinite()]) for a, b in pairs)
        except Exception as error:
            found[name] = float("nan")
            session.note(name, f"FAILED: {type(error).__name__}: {str(error)[:200]}")

    ops = session.ops
    x, up = torch.randn(37, 1000, dtype=bf16), torch.randn(37, 2048, dtype=bf16)
    weight, bias = torch.rand(1000, dtype=bf16), torch.rand(1000, dtype=bf16)
    compare("layer_norm", ops.layer_norm, reference.layer_norm, x, weight, bias, 1e-5)
    for kind in ("gelu", "gelu_tanh", "relu"):
        compare(kind, ops.activate, reference.activate, up, kind, False)
    channels, depth = (96, 1000) if session.tiny else (3072, 2048)
    for kind in ("int8", "fp8"):
        stored, scales = quantize_weight(torch.randn(channels, depth), kind)  # type: ignore[arg-type]
        for tokens in (1, 17) if session.tiny else (1, 17, 64, 300):
            compare(f"linear {kind} {tokens}", ops.quantized_linear, reference.quantized_linear, torch.randn(tokens, depth, dtype=bf16),
                    stored, scales)  # fmt: skip
    angles = torch.rand(500, 64)
    for kv in ("bfloat16", "int8", "fp8"):
        pools = KVPool(1, 12, 8, 16, 128, kv, device), KVPool(1, 12, 8, 16, 128, kv, torch.device("cpu"))
        qkv, slots = torch.randn(50, 32 * 128, dtype=bf16), torch.randperm(192)[:50].int()
        norms = torch.rand(128, dtype=bf16), torch.rand(128, dtype=bf16)
        rest = (torch.arange(100, 150).int(), slots, 16, (angles.cos(), angles.sin()), *norms)

        def write(operations: Any, pool: KVPool, *arguments: Any) -> tuple[Tensor, ...]:
            operations.write_kv(arguments[0], pool.layer(0), *arguments[1:])
            scales = 1.0 if pool.scales is None else pool.scales[..., None].float()
            return arguments[0], pool.data.float() * scales

        compare(f"write_kv {kv}", partial(write, ops, pools[0]), partial(write, reference, pools[1]), qkv, *rest)
        before = pools[0].data.view(torch.uint8).clone()
        copier = Copier(pools[0], 12, 12, ops)
        copier.copy([(i, 12 + (i + 5) % 12) for i in range(12)])
        copier.copy([(0, 1), (1, 2)])
        copier.copy([(12 + (i + 5) % 12, i) for i in range(12)])
        found[f"swap {kv}"] = float(not torch.equal(pools[0].data.view(torch.uint8), before))
    for rows, vocab in [(7, 500)] if session.tiny else [(7, 500), (64, 128256)]:
        for dtype in (torch.float32, bf16):
            logits = (torch.randn(rows, vocab) * 3).to(dtype)
            cuts = SamplingTensors(
                torch.rand(rows) + 0.5, torch.randint(1, 50, (rows,)).int(), torch.rand(rows), torch.rand(rows) / 10,
                torch.randint(0, 1 << 60, (rows,)), torch.randint(0, 1000, (rows,)),
            )  # fmt: skip
            compare(f"sample {rows} x {vocab} {dtype}", ops.sample, reference.sample, logits, cuts, exact=True)
            tokens = logits.argsort(1)[:, -3].int().contiguous()
            compare(f"report {rows} x {vocab} {dtype}", ops.report, reference.report, logits, tokens, 5)
        history = torch.randint(0, vocab, (rows, 800)).int()
        values = [torch.full((rows,), value) for value in (1.2, 0.3, 0.1)]
        numbers = [torch.arange(rows).int(), torch.full((rows,), 300).int(), torch.full((rows,), 700).int()]
        compare(f"penalize {rows} x {vocab}", ops.penalize, reference.penalize, torch.randn(rows, vocab), history, *numbers, *values)
    wrong = {name: error for name, error in found.items() if not error < 1e-2}
    session.note("other operations against their reference", f"{len(wrong)} of {len(found)} differ {sorted(wrong)}", "0")
    if wrong:
        raise AssertionError(wrong)
    return found


def _moved(value: Any, device: Any) -> Any:
    """Copies of all tensors in ``value``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    if isinstance(value, SamplingTensors):
        return SamplingTensors(**{name: _moved(getattr(value, name), device) for name in value.__slots__})
    return value


def attention(session: Session) -> dict[str, Any]:
    """Decode by batch and context, and a prefill of 8,192 tokens."""
    found = session.found
    bandwidth = session.results.get("probe", {}).get("copy_bandwidth") or copy_bandwidth(session.device)
    sweep = [(1, 8192), (1, 32768), (8, 4096), (32, 1024), (32, 8192), (128, 1024), (256, 1024), (256, 2048)]
    for kv in ("bfloat16", "fp8", "int8"):
        for block in (16, 32, 64):
            for batch, context in [(2, 300)] if session.tiny else sweep:
                case = _attention_case(session, [context] * batch, 32, 8, 128, block, kv)
                q = torch.randn(batch, 32, 128, device=session.device, dtype=torch.bfloat16)
                out = torch.empty_like(q)
                took = seconds(session, lambda q=q, case=case, out=out: session.ops.decode(q, *case.values(), 128**-0.5, 0, out))
                numbers = case["kv"].keys
                read = 2 * batch * context * 8 * (128 * numbers.itemsize + (2 if kv != "bfloat16" else 0))
                found[f"decode {kv} block {block} {batch} x {context}"] = {"us": took * 1e6, "share": read / took / bandwidth}
                if kv == "bfloat16" and block == 64 and (session.tiny or (batch, context) in ((32, 1024), (32, 8192), (256, 1024))):
                    share = f"{read / took / bandwidth:.0%} of the copy bandwidth, {took * 1e6:.0f} us"
                    session.note(f"decode attention, {batch} x {context:,}", share, ">= 80 %")
                del case
    length = 200 if session.tiny else 8192
    for block in (16, 64):
        case = _attention_case(session, [length], 32, 8, 128, block, "bfloat16")
        q = torch.randn(length, 32, 128, device=session.device, dtype=torch.bfloat16)
        rows = prefill_config(128, block, q.dtype, q.dtype).rows
        start = np.array([0, length], np.int32)
        tiles = torch.from_numpy(prefill_tiles(start, start[1:], rows).astype(np.int32)).to(session.device)
        there, out = torch.from_numpy(start).to(session.device), torch.empty_like(q)
        arguments = (case["kv"], case["tables"], case["rows"], there, case["lengths"], tiles, 128**-0.5, 0)
        took = seconds(session, lambda q=q, a=arguments, out=out: session.ops.prefill(q, *a, out), 10)
        rate = 4 * 32 * 128 * length * (length + 1) / 2 / took
        found[f"prefill block {block}"] = {"ms": took * 1e3, "tflops": rate / 1e12}
        session.note(f"prefill attention, {length:,} tokens, block {block}", f"{rate / 1e12:.0f} TFLOP/s", ">= 400")
    return found


# --- models ---


class Decoding:
    """``batch`` rows that decode from ``context`` on, without an engine: plans as the scheduler would make them."""

    def __init__(self, backend: CudaBackend, batch: int, context: int) -> None:
        self._backend, self._batch, self._at = backend, batch, context - 1
        self._params = SamplingParams(temperature=1.0, max_tokens=1 << 20)
        self._each = -(-(context + 256) // backend.block_size)

    def plans(self) -> Iterator[StepPlan]:
        """The first one brings the rows."""
        size = self._backend.block_size
        tokens = [7] * (self._at + 1)
        starts = [RowStart(row, tokens, len(tokens), self._params, row, ()) for row in range(self._batch)]
        while True:
            work = []
            for row in range(self._batch):
                first = 0 if starts else self._at // size
                new = range(first, self._at // size + 1) if starts or self._at % size == 0 else range(0)
                work.append(RowWork(row, self._at, 1, [row * self._each + i for i in new], True, first))
            yield StepPlan(starts, work)
            starts = []
            self._at += 1


def _step_seconds(backend: CudaBackend, batch: int, context: int, overlap: bool, count: int) -> float:
    """Of one step, over ``count`` of them, by the wall clock."""
    plans = Decoding(backend, batch, context).plans()
    for _ in range(5):
        backend.execute(next(plans))
    start = time.perf_counter()
    pending: Pending | None = None
    for _ in range(count):
        plan = next(plans)
        if overlap:
            following = backend.launch(plan)
            if pending is not None:
                backend.collect(pending)
            pending = following
        else:
            backend.execute(plan)
    if pending is not None:
        backend.collect(pending)
    return (time.perf_counter() - start) / count


def steps(session: Session, name: str) -> dict[str, Any]:
    """Times of decode steps, of prefill, of a drain; and whether results depend on the batch."""
    shape = "tiny" if session.tiny else name
    found = session.found
    start = time.perf_counter()
    decoder = make_decoder(shape, session.device, session.ops)
    _synchronize(session)
    found["make_s"] = time.perf_counter() - start
    batches, context, count = ([1, 4], 100, 3) if session.tiny else ([1, 8, 32, 128, 256], 1024, 40)
    options: dict[str, Any] = {"max_num_seqs": max(batches), "max_num_batched_tokens": 64 if session.tiny else 2048}
    if session.tiny:
        options["kv_memory"] = "8MiB"
    captured = True
    for graphs in (True, False):
        decoder.forget_pool()
        free()
        start = time.perf_counter()
        try:
            backend = make_backend(decoder, session.device, session.ops, cuda_graphs=graphs, **options)
        except Exception as error:
            if not graphs:
                raise
            captured = False
            session.note(f"{name}: capture", f"FAILED: {type(error).__name__}: {str(error)[:300]}")
            found["capture"] = {"error": traceback.format_exc()}
            continue
        found[f"open graphs={graphs}"] = {"s": time.perf_counter() - start, "blocks": backend.num_blocks, "note": backend.memory_note}
        for batch in batches if graphs else batches[:3]:
            for overlap in (True, False) if graphs else (False,):
                took = _step_seconds(backend, batch, context, overlap, count)
                found[f"step {batch} graphs={graphs} overlap={overlap}"] = took * 1e3
                if graphs and overlap and (floor := FLOORS_MS.get((name, batch))):
                    session.note(
                        f"{name} step, batch {batch}, context {context:,}", f"{took * 1e3:.2f} ms", f"<= {floor[1]} ms, floor {floor[0]}"
                    )
        if graphs or not captured:
            found |= _prefill(session, backend, name)
            found |= _drain(session, backend, name, options)
            found |= _same(session, backend, name, options)
        del backend
    if not captured:
        return found
    ratio = found[f"step {batches[0]} graphs=False overlap=False"] / found[f"step {batches[0]} graphs=True overlap=False"]
    middle = batches[len(batches) // 2]
    gain = found[f"step {middle} graphs=True overlap=False"] / found[f"step {middle} graphs=True overlap=True"]
    session.note(f"{name}: graphs against eager, batch 1", f"{ratio:.1f}x", ">= 3x at 0.6B")
    session.note(f"{name}: overlap on against off, batch {middle}", f"{gain:.2f}x", ">= 1.15x at 0.6B, batch 64")
    return found


def _prefill(session: Session, backend: CudaBackend, name: str) -> dict[str, Any]:
    """A prompt in chunks of the step's size."""
    chunk, chunks = (64, 2) if session.tiny else (2048, 4)
    tokens = [7] * (chunk * chunks)
    params = SamplingParams(max_tokens=1)
    took = []
    for _ in range(2):
        start = time.perf_counter()
        for i in range(chunks):
            first, last = i * chunk // backend.block_size, (i + 1) * chunk // backend.block_size
            starts = [RowStart(0, tokens, len(tokens), params, 0, ())] if i == 0 else []
            backend.execute(StepPlan(starts, [RowWork(0, i * chunk, chunk, list(range(first, last)), i == chunks - 1, first)]))
        _synchronize(session)
        took.append(time.perf_counter() - start)
    rate = len(tokens) / took[-1]
    session.note(f"{name}: prefill in chunks of {chunk:,}", f"{rate:,.0f} tokens/s", ">= 35,000 at 8B")
    return {"prefill_tokens_per_s": rate}


def _requests(session: Session, vocab_size: int) -> list[Request]:
    """256 of 100 to 1,024 tokens in and out, as nano-vllm's own benchmark draws them."""
    rng = random.Random(0)
    count, low, high = (5, 3, 12) if session.tiny else (256, 100, 1024)
    prompts = [[rng.randrange(min(10_000, vocab_size)) for _ in range(rng.randint(low, high))] for _ in range(count)]
    outputs = [rng.randint(low, high) for _ in range(count)]
    return [
        Request(f"{i}", prompt, SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True), i, ())
        for i, (prompt, n) in enumerate(zip(prompts, outputs, strict=True))
    ]


def run(backend: CudaBackend, options: dict[str, Any], requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    """All of them through an engine; the tokens of each."""
    engine = Engine(backend, EngineConfig(device="torch-cpu", **options), time.monotonic)
    found: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return found


def _drain(session: Session, backend: CudaBackend, name: str, options: dict[str, Any]) -> dict[str, Any]:
    requests = _requests(session, backend.spec.vocab_size)
    start = time.perf_counter()
    found = run(backend, options, requests)
    took = time.perf_counter() - start
    tokens = sum(map(len, found.values()))
    assert tokens == sum(request.params.max_tokens or 0 for request in requests)
    wanted = f">= {DRAIN[name]:,}" if name in DRAIN else ""
    session.note(f"{name}: drain of {len(requests)} requests", f"{tokens / took:,.0f} output tokens/s, {took:.1f} s", wanted)
    few = [Request(f"few-{i}", [i + 3] * 32, SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True), 0, ()) for i in range(8)]
    start = time.perf_counter()
    run(backend, options, few)
    short = time.perf_counter() - start
    session.note(f"{name}: 8 requests, 32 in, 128 out", f"{short * 1e3:.0f} ms", "<= 700 ms at 8B")
    return {"drain_tokens_per_s": tokens / took, "drain_s": took, "eight_ms": short * 1e3}


def _same(session: Session, backend: CudaBackend, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """How many of some requests get other tokens alone than beside others."""
    count, length = (3, 6) if session.tiny else (24, 64)
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    requests = [Request(f"{i}", [11 + i] * (20 + 3 * i), params, 0, ()) for i in range(count)]
    together = run(backend, options, requests)
    differ = sum(run(backend, options, [request])[request.request_id, 0] != together[request.request_id, 0] for request in requests[:8])
    session.note(f"{name}: requests that differ alone, of 8", str(differ), "0 with --deterministic")
    return {"differ_alone": differ}


def deterministic(session: Session) -> dict[str, Any]:
    """What depends on the batch with --deterministic, which is to be set before a process's first product."""
    name = "tiny" if session.tiny else "Qwen3-0.6B"
    options: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 64 if session.tiny else 2048, "deterministic": True}
    if session.tiny:
        options["kv_memory"] = "8MiB"
    backend = make_backend(make_decoder(name, session.device, session.ops), session.device, session.ops, **options)
    return _same(session, backend, f"{name} --deterministic", options)


def transformers(session: Session) -> dict[str, Any]:
    """The same weights and requests through transformers: static batches, and its continuous batching."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = "tiny" if session.tiny else "Qwen3-0.6B"
    values = SHAPES[name]
    config = AutoConfig.for_model(**{key: value for key, value in values.items() if key != "architectures"})
    dtype = getattr(torch, values["torch_dtype"])
    with torch.device(session.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    found = session.found
    requests = _requests(session, values["vocab_size"])[: 5 if session.tiny else 64]
    total = sum(request.params.max_tokens or 0 for request in requests)
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    decoder = make_decoder(name, session.device, session.ops, canonical(name, state))
    options: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 64 if session.tiny else 2048}
    if session.tiny:
        options["kv_memory"] = "8MiB"
    backend = make_backend(decoder, session.device, session.ops, **options)
    run(backend, options, requests[:2])
    start = time.perf_counter()
    run(backend, options, requests)
    found["quire"] = total / (time.perf_counter() - start)
    del backend, decoder
    free()
    peers: dict[str, Callable[[], int]] = {
        f"static {size}": partial(_static_batches, session, model, requests, size) for size in ([2] if session.tiny else [64, 16])
    }
    if hasattr(model, "generate_batch"):
        peers["continuous"] = partial(_continuous, model, requests)
    for peer, work in peers.items():
        if session.left_s < PEER_S:
            session.note(f"transformers {peer}", f"left out: {session.left_s:.0f} s are left")
            continue
        try:
            start = time.perf_counter()
            with torch.inference_mode():
                made = work()
            found[peer] = made / (time.perf_counter() - start)
        except Exception as error:  # its affair
            session.note(f"transformers {peer}", f"FAILED: {type(error).__name__}: {str(error)[:200]}")
    for peer, rate in found.items():
        if peer != "quire":
            session.note(f"{name}, {len(requests)} requests: Quire against transformers {peer}", f"{found['quire'] / rate:.1f}x "
                         f"({found['quire']:,.0f} against {rate:,.0f} output tokens/s)", ">= 5x continuous, >= 8x static")  # fmt: skip
    return found


def _static_batches(session: Session, model: Any, requests: list[Request], size: int) -> int:
    ordered = sorted(requests, key=lambda request: request.params.max_tokens or 0)  # which favours static batches
    for i in range(0, len(ordered), size):
        _static(model, ordered[i : i + size], session.device)
    _synchronize(session)
    return sum(request.params.max_tokens or 0 for request in requests)


def _continuous(model: Any, requests: list[Request]) -> int:
    from transformers import GenerationConfig

    most = max(request.params.max_tokens or 0 for request in requests)
    generation = GenerationConfig(max_new_tokens=most, do_sample=True, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch([request.prompt_token_ids for request in requests], generation_config=generation)
    return sum(len(output.generated_tokens) for output in outputs.values())


def _static(model: Any, batch: list[Request], device: torch.device) -> None:
    longest = max(len(request.prompt_token_ids) for request in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, request in enumerate(batch):  # padded on the left
        ids[i, -len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
        mask[i, -len(request.prompt_token_ids) :] = 1
    most = max(request.params.max_tokens or 0 for request in batch)
    model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=most, min_new_tokens=most, do_sample=True, pad_token_id=0)


def _synchronize(session: Session) -> None:
    if session.device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
