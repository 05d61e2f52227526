"""What ``quire serve`` prints when it is ready: where it listens, what fits, how long it took, a line to try."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quire import __version__
from quire.config import EngineConfig

if TYPE_CHECKING:
    from quire.server.engine.messages import Loaded

SHORT_REQUEST = 512


def base_url(host: str, port: int) -> str:
    """An address that works from this machine, also where the server listens on all of its addresses."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def banner(
    url: str,
    model: str,
    engine: Loaded,
    config: EngineConfig,
    phases: Sequence[tuple[str, float]],
    total_s: float,
    keys: bool = False,
) -> str:
    """``phases``: what took how many seconds, in both processes. keys: the server asks for one."""
    num_blocks, block_size, max_model_len = engine.limits.num_blocks, engine.limits.block_size, engine.limits.max_model_len
    groups, tokens = engine.limits.groups, engine.limits.pool_tokens
    dtype = config.weight_width(engine.dtype)
    lengths = sorted({max_model_len, min(SHORT_REQUEST, max_model_len)}, reverse=True)
    block_bytes = block_size * engine.kv_layers * engine.spec.layer_kv_bytes(config.kv_width(engine.dtype))
    pool = f"{num_blocks:,} blocks x {block_size} = {tokens:,} tokens"
    if groups.width > 1:
        pool = (
            f"{num_blocks:,} blocks x {block_size} tokens, each of 1 of {groups.width} groups of layers = {tokens:,} tokens of one sequence"
        )
    fits = " or ".join(f"{num_blocks // groups.blocks(length, block_size):,} requests of {length:,} tokens" for length in lengths)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases)
    rows = [
        ("URL", f"{url}/v1" + (" (asks for a key)" if keys else f" (documentation: {url}/docs)")),
        ("page", f"{url}/ shows the memory, live"),
        (
            "model",
            f"{model}: {engine.architecture}, {short_count(engine.num_parameters)} parameters, {dtype}, context {max_model_len:,} tokens",
        ),
        *([("weights", engine.weight_note)] if engine.weight_note else []),
        (
            "KV pool",
            f"{pool} ({_bytes(num_blocks * block_bytes)}, {config.kv_width(engine.dtype)})",
        ),
        *([("KV memory", engine.memory_note)] if engine.memory_note else []),
        ("fits", f"{fits} at once (at most {engine.limits.max_num_seqs:,} sequences run at a time; {config.max_waiting:,} more wait)"),
        ("policy", ", ".join(_policies(engine, config, block_bytes))),
        ("started", f"in {total_s:.2f} s ({times}; some at the same time)"),
    ]
    lines = [f"Quire {__version__}", "", *(f"  {name:<10}{text}" for name, text in rows)]
    return "\n".join([*lines, "", "Try it:", f"  {curl(url, model, keys)}", "", "Stop with Ctrl-C.", ""])


def _policies(engine: Loaded, config: EngineConfig, block_bytes: int) -> Iterator[str]:
    """How the pool is used: whether content is shared, who is let in, what becomes of those that have to make room."""
    yield f"prefix caching {'on' if config.prefix_caching else 'off'}"
    yield "admission " + re.sub(r"(?<!^)(?=[A-Z])", "-", engine.policy).lower()
    if blocks := engine.num_host_blocks:
        yield f"preempted requests are swapped to {_bytes(blocks * block_bytes)} ({blocks:,} blocks)"


def curl(url: str, model: str, keys: bool = False) -> str:
    """A line for the shell that streams a completion. keys: the server asks for one."""
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    body = json.dumps({"model": model, "prompt": "def fibonacci(n):", "max_tokens": 64, "stream": True})
    return f"curl -N {shlex.quote(url + '/v1/completions')} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def short_count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"
