"""How much memory this process may use (the machine's, or its control group's where that is less), and what the KV cache takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quire.config import EngineConfig
from quire.errors import CapacityError, ConfigError
from quire.models.quantization import Quantization
from quire.models.spec import TransformerSpec

AUTO_SHARE = 0.8
"""Of the memory that weights and step buffers leave: what ``--kv-memory auto`` takes at most."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(slots=True, frozen=True)
class KVMemory:
    """Sizes of the KV pool and of the swap pool, in blocks."""

    num_blocks: int
    num_host_blocks: int
    note: str = ""
    """The arithmetic, where the size was found and not stated."""


def kv_memory(config: EngineConfig, spec: TransformerSpec, max_model_len: int) -> KVMemory:
    """What ``--kv-memory`` and ``--swap-memory`` hold.

    Raises CapacityError where one request does not fit, or the machine lacks the memory.
    """
    per_block = spec.kv_bytes_per_token(config.kv_dtype) * config.block_size
    need = -(-max_model_len // config.block_size)
    available = available_bytes()
    dtype, quantization = None if config.dtype == "auto" else config.dtype, Quantization.of(config)
    weights = spec.weight_bytes(dtype) if quantization is None else quantization.weight_bytes(spec, dtype)
    size, note = config.kv_bytes, ""
    if size is None:
        size, note = _auto(config, spec, max_model_len, per_block, available, weights)
    num_blocks = size // per_block
    num_host_blocks = config.swap_bytes // per_block
    if num_blocks < need:
        fits = num_blocks * config.block_size
        lower = f", or lower --max-model-len to at most {fits:,}" if fits > 1 else ""
        raise CapacityError(
            f"--kv-memory {config.kv_memory} holds {fits:,} token positions ({num_blocks:,} blocks of {config.block_size}, "
            f"{per_block:,} bytes each), but one request may need {max_model_len:,}: "
            f"raise --kv-memory to at least {_mib(need * per_block)}MiB{lower}"
        )
    if config.swap_bytes and num_host_blocks == 0:
        raise CapacityError(
            f"--swap-memory {config.swap_memory} is less than one block of {per_block:,} bytes: raise it to at least {_mib(per_block)}MiB, "
            "or leave it out"
        )
    total = size + config.swap_bytes
    if available is not None and total + weights > available:
        swap = f", --swap-memory {config.swap_memory}" if config.swap_bytes else ""
        room = max(0, available - weights - config.swap_bytes) >> 20
        fits = (room << 20) // per_block * config.block_size
        if fits >= max_model_len:
            remedy = f"lower --kv-memory to at most {room}MiB"
        elif fits > 1:
            remedy = f"lower --kv-memory to at most {room}MiB, and --max-model-len to at most {fits:,}"
        else:
            remedy = "free some, or take a smaller model"
        raise CapacityError(
            f"--kv-memory {config.kv_memory} ({size / 1e9:.1f} GB){swap} and the weights ({weights / 1e9:.1f} GB) need more than the "
            f"{available / 1e9:.1f} GB of memory that are free: {remedy}"
        )
    return KVMemory(num_blocks, num_host_blocks, note)


def _auto(
    config: EngineConfig, spec: TransformerSpec, max_model_len: int, per_block: int, available: int | None, weights: int
) -> tuple[int, str]:
    """(bytes, arithmetic) of ``--kv-memory auto``: what can be spared, and no more than the sequences could ever fill."""
    if available is None:
        raise ConfigError(
            "--kv-memory auto needs to know how much memory is free, and this system does not say: state a size", param="kv_memory"
        )
    buffers = step_buffer_bytes(config, spec)
    left = max(0, available - weights - buffers - config.swap_bytes)
    share = int(left * AUTO_SHARE)
    sequences = config.num_seqs(1 << 30)
    most = sequences * -(-max_model_len // config.block_size) * per_block
    swap = f" - {config.swap_bytes / 1e9:.2f} GB swap" if config.swap_bytes else ""
    note = (
        f"{available / 1e9:.2f} GB free - {weights / 1e9:.2f} GB weights - {buffers / 1e9:.2f} GB step buffers{swap} "
        f"= {left / 1e9:.2f} GB; "
        f"{AUTO_SHARE:.0%} of it is {share / 1e9:.2f} GB; {sequences} sequences of {max_model_len:,} tokens fill {most / 1e9:.2f} GB"
    )
    return min(share, most), note


def step_buffer_bytes(config: EngineConfig, spec: TransformerSpec) -> int:
    """Bytes of the float32 arrays that a step works in (see Decoder), for the most positions and rows of a step."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    position = 2 * spec.hidden_size + heads + spec.intermediate_size
    return 4 * (config.max_num_batched_tokens * position + config.num_seqs(1 << 30) * spec.vocab_size)


def _mib(size: int) -> int:
    return -(-size >> 20)


def available_bytes() -> int | None:
    """Bytes that can still be taken without swapping, or None where the system does not say (no /proc)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:  # a container's limit (cgroup v2); "max" where there is none
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as used, the model's own among them, but go when memory is needed.
        used -= int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return available
    return min(available, max(0, limit - used))
