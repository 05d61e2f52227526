"""What ``quire serve`` prints when it is ready: where it listens, what fits, how long it took, a line to try."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from quire import __version__
from quire.config import EngineConfig
from quire.models.spec import TransformerSpec

SHORT_REQUEST = 512


def base_url(host: str, port: int) -> str:
    """An address that works from this machine, also where the server listens on all of its addresses."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def banner(
    *,
    url: str,
    model: str,
    spec: TransformerSpec,
    config: EngineConfig,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    phases: Sequence[tuple[str, float]],
    total_s: float,
) -> str:
    tokens = num_blocks * block_size
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    lengths = sorted({max_model_len, min(SHORT_REQUEST, max_model_len)}, reverse=True)
    pool = _bytes(tokens * spec.kv_bytes_per_token(config.kv_dtype))
    fits = " or ".join(f"{num_blocks // -(-length // block_size):,} requests of {length:,} tokens" for length in lengths)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases)
    rows = [
        ("URL", f"{url}/v1 (documentation: {url}/docs)"),
        ("model", f"{model}: {spec.architecture}, {_count(spec.num_parameters())} parameters, {dtype}, context {max_model_len:,} tokens"),
        (
            "KV pool",
            f"{num_blocks:,} blocks x {block_size} = {tokens:,} tokens ({pool}, {config.kv_dtype})",
        ),
        ("fits", f"{fits} at once (at most {config.max_num_seqs:,} sequences run at a time; more wait)"),
        ("started", f"in {total_s:.2f} s ({times}; some at the same time)"),
    ]
    lines = [f"Quire {__version__}", "", *(f"  {name:<9}{text}" for name, text in rows)]
    return "\n".join([*lines, "", "Try it:", f"  {curl(url, model)}", "", "Stop with Ctrl-C.", ""])


def curl(url: str, model: str) -> str:
    """A line for the shell that streams a completion."""
    body = json.dumps({"model": model, "prompt": "def fibonacci(n):", "max_tokens": 64, "stream": True})
    return f"curl -N {shlex.quote(url + '/v1/completions')} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"
