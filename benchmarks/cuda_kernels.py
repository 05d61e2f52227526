"""The phases of cuda_session.py that take kernels by themselves: checked against float64, and attention timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quire.backends.cuda.cache import KVPool
from quire.backends.cuda.kernels.attention_configs import decode_config, prefill_config
from quire.backends.cuda.limits import copy_bandwidth
from quire.backends.cuda.quantize import quantize_weight
from quire.backends.cuda.reference import operations as reference
from quire.backends.cuda.sampling_tensors import SamplingTensors
from quire.backends.cuda.swap import Copier
from quire.backends.cuda.tiles import SPLIT, DecodeScratch, DecodeTiles, packed_size, prefill_tiles, write_decode_tiles

if TYPE_CHECKING:
    from cuda_session import Session


def seconds(session: Session, work: Callable[[], object], repeats: int = 20) -> float:
    """The median of some runs, by the device's clock; each begins with another cache, and with the device busy until the host has queued
    it: a launch may take the host longer than the device."""
    if session.device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=session.device)
    times: list[float] = []
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


def seconds_in_graph(session: Session, works: Sequence[Callable[[], object]], launches: int = 24) -> float:
    """Of one of ``works``, which take turns in a graph of ``launches``: as steps run kernels, each waiting for the one before it."""
    if session.device.type != "cuda":
        return seconds(session, works[0])
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            works[i % len(works)]()
    return seconds(session, graph.replay, 7) / launches


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
    config = decode_config(dim, block, torch.bfloat16, layer.keys.dtype, heads // kv_heads, rows)
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
            x = torch.randn(tokens, depth, dtype=bf16)
            compare(f"linear {kind} {tokens}", ops.linear, reference.linear, x, stored, None, scales)
    weight, x = torch.randn(channels, depth, dtype=bf16), torch.randn(300, depth, dtype=bf16)
    for tokens in (1, 2, 20, 300):
        compare(f"linear {tokens}", ops.linear, reference.linear, x[:tokens], weight)
        compare(f"linear same {tokens}", ops.linear, reference.linear, x[:tokens], weight, None, None, True)
        compare(f"gated linear {tokens}", ops.gated_linear, reference.gated_linear, x[:tokens], weight, None, None, False, "silu")
    there, whole = x.to(device), ops.linear(x.to(device), weight.to(device), None, None, True)
    for tokens in (1, 16, 17, 33, 70, 129, 257):
        fewer = ops.linear(there[:tokens], weight.to(device), None, None, True)
        found[f"linear same: {tokens} rows differ among 300"] = float(not torch.equal(fewer, whole[:tokens]))
    table, rows, positions = torch.randint(0, 90, (7, 40)).int(), torch.tensor([3, 0, 6]).int(), torch.tensor([39, 0, 7]).int()
    compare("embed", ops.embed, reference.embed, table, rows, positions, weight, exact=True)
    compare("put_tokens", ops.put_tokens, reference.put_tokens, table, rows, positions, torch.tensor([5, -1, 89]).int(), exact=True)
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


BEYOND_CACHE = 300 << 20
NOTED = {
    "bfloat16": [(1, 8192), (32, 1024), (32, 8192), (256, 1024), (256, 2048)],
    "fp8": [(32, 8192), (256, 1024)],
    "int8": [(32, 8192), (256, 1024)],
}


def attention(session: Session) -> dict[str, Any]:
    """Decode by batch and context, and a prefill of 8,192 tokens."""
    found = session.found
    bandwidth = session.results.get("probe", {}).get("copy_bandwidth") or copy_bandwidth(session.device)
    sweep = [(1, 8192), (1, 32768), (8, 4096), (32, 1024), (32, 8192), (128, 1024), (256, 1024), (256, 2048)]
    for kv in ("bfloat16", "fp8", "int8"):
        for block in (16, 32, 64):
            for batch, context in [(2, 300)] if session.tiny else sweep:
                read = 2 * batch * context * 8 * (128 + 2 if kv != "bfloat16" else 256)
                cases = [  # beyond what the L2 cache keeps from turn to turn
                    _attention_case(session, [context] * batch, 32, 8, 128, block, kv) for _ in range(1 + min(8, BEYOND_CACHE // read))
                ]
                q = torch.randn(batch, 32, 128, device=session.device, dtype=torch.bfloat16)
                out = torch.empty_like(q)
                works = [partial(session.ops.decode, q, *case.values(), 128**-0.5, 0, out) for case in cases]
                took, alone = seconds_in_graph(session, works), seconds(session, works[0])
                share = read / took / bandwidth
                found[f"decode {kv} block {block} {batch} x {context}"] = {"us": took * 1e6, "share": share, "alone_us": alone * 1e6}
                if block == 64 and (session.tiny or (batch, context) in NOTED[kv]):
                    told = f"{share:.0%} of the copy bandwidth, {took * 1e6:.1f} us in a graph, {alone * 1e6:.1f} alone"
                    session.note(f"decode attention, {kv} KV, {batch} x {context:,}", told, ">= 80 %" if kv == "bfloat16" else "")
                del cases, works
    length = 200 if session.tiny else 8192
    for block in (16, 64):
        case = _attention_case(session, [length], 32, 8, 128, block, "bfloat16")
        q = torch.randn(length, 32, 128, device=session.device, dtype=torch.bfloat16)
        rows = prefill_config(128, block, q.dtype, q.dtype).rows
        start = np.array([0, length], np.int32)
        tiles = torch.from_numpy(prefill_tiles(start, start[1:], rows).astype(np.int32)).to(session.device)
        there, out = torch.from_numpy(start).to(session.device), torch.empty_like(q)
        arguments = (case["kv"], case["tables"], case["rows"], there, case["lengths"], tiles, 128**-0.5, 0)
        took = seconds(session, partial(session.ops.prefill, q, *arguments, out), 10)
        rate = 4 * 32 * 128 * length * (length + 1) / 2 / took
        found[f"prefill block {block}"] = {"ms": took * 1e3, "tflops": rate / 1e12}
        session.note(f"prefill attention, {length:,} tokens, block {block}", f"{rate / 1e12:.0f} TFLOP/s", ">= 400")
    return found
