"""The phases of cuda_session.py that take whole models: steps, prefill, drains, determinism, and transformers beside them."""

from __future__ import annotations

import gc
import random
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cuda_models import SHAPES, canonical, make_backend, make_decoder
from quire.backends.cuda.backend import CudaBackend, Pending
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


def step_seconds(backend: CudaBackend, batch: int, context: int, overlap: bool, count: int) -> float:
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
    batches, context, count = ([1, 4], 100, 3) if session.tiny else ([1, 8, 32, 64, 128, 256], 1024, 40)
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
                took = step_seconds(backend, batch, context, overlap, count)
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
    """What depends on the batch with --deterministic, and what it costs."""
    batches, context, count = ([1, 4], 100, 3) if session.tiny else ([1, 8, 32, 128, 256], 1024, 30)
    options: dict[str, Any] = {"max_num_seqs": max(batches), "max_num_batched_tokens": 64 if session.tiny else 2048}
    if session.tiny:
        options["kv_memory"] = "8MiB"
    for name in ["tiny"] if session.tiny else ["Qwen3-0.6B", "Llama-3.1-8B"]:
        decoders = [make_decoder(name, session.device, session.ops, same=same) for same in (False, True)]
        times = []
        for decoder in decoders:
            same = options | {"deterministic": decoder is decoders[1]}
            backend = make_backend(decoder, session.device, session.ops, most_blocks=0 if session.tiny else 6000, **same)
            times.append([step_seconds(backend, batch, context, True, count) for batch in batches])
            if same["deterministic"]:
                session.found[name] = _same(session, backend, f"{name} --deterministic", same)
            del backend
            decoder.forget_pool()
            free()
        slower = [same / default - 1 for default, same in zip(*times, strict=True)]
        session.found[name]["slower"] = dict(zip(batches, slower, strict=True))
        told = ", ".join(f"{each:+.0%}" for each in slower)
        session.note(f"{name} --deterministic: steps of {', '.join(map(str, batches))} rows", told, "<= +10 %")
        del decoders, decoder
        free()
    return session.found


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
        f"static {size}": partial(_static_batches, session, model, requests, size) for size in ([2] if session.tiny else [64])
    }
    if hasattr(model, "generate_batch"):
        peers["continuous"] = partial(_continuous, model, requests)
    if not session.tiny:
        peers["static 16"] = partial(_static_batches, session, model, requests, 16)
    for peer, work in peers.items():
        if session.left_s < PEER_S:
            session.note(f"transformers {peer}", f"left out: {session.left_s:.0f} s are left")
            continue
        try:
            start = time.perf_counter()
            with torch.inference_mode():
                made = work()
            rate = found[peer] = made / (time.perf_counter() - start)
            session.note(f"{name}, {len(requests)} requests: Quire against transformers {peer}", f"{found['quire'] / rate:.1f}x "
                         f"({found['quire']:,.0f} against {rate:,.0f} output tokens/s)", ">= 5x continuous, >= 8x static")  # fmt: skip
        except Exception as error:  # its affair
            session.note(f"transformers {peer}", f"FAILED: {type(error).__name__}: {str(error)[:200]}")
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
