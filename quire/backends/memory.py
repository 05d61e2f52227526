"""How much memory this process may use (the machine's, or its control group's where that is less), and what the KV cache takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quire.config import EngineConfig
from quire.core.groups import KVGroups
from quire.errors import CapacityError, ConfigError
from quire.models.parallel import part_of
from quire.models.quantization import planned_weights
from quire.models.spec import DTYPE_BYTES, TransformerSpec

AUTO_SHARE = 0.8
"""Of the memory that weights and step buffers leave: what ``--kv-memory auto`` takes at most."""

GPU_SHARE = 0.95
"""The same on a GPU: the rest is for what the allocator loses, and for others on the device."""
GPU_CONTEXT = 1 << 29
"""Bytes that CUDA takes of a device for itself, about."""

MOST_GROUPS = 16
"""Of layers: a sequence takes a block of each at a time."""

_ROOT = Path("/")
_GROUP_FILES = (
    ("memory.max", "memory.current", "active_file", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"),
)
"""What a control group may use, what it uses, and of that what goes when memory is needed: versions 2 and 1."""


@dataclass(slots=True, frozen=True)
class KVLayout:
    """Where a layer's keys and values are: which of a sequence's blocks, and where in each of them (core/groups.py)."""

    groups: KVGroups
    slots: int
    """Layers that a block has room for."""
    places: list[tuple[int, int]]
    """(group, slot) of each layer."""

    def block_bytes(self, config: EngineConfig, spec: TransformerSpec) -> int:
        return spec.layer_kv_bytes(config.kv_width(spec.dtype)) * self.slots * config.block_size


def one_group(spec: TransformerSpec, window: int = 0) -> KVLayout:
    """All layers, with a window or without, in one group."""
    groups = KVGroups(0, 1, window) if window else KVGroups()
    return KVLayout(groups, spec.num_layers, [(0, i) for i in range(spec.num_layers)])


def kv_layout(spec: TransformerSpec, context: int, block_size: int) -> KVLayout:
    """Layers in groups by whether they have a window that hides anything of ``context`` positions; where that saves nothing, all are one.

    A group of fewer layers than a block has room for leaves memory empty, most of it in short sequences where it has a window, in long ones
    where it has none. So groups are as large as makes the product of what both take smallest, and as many as there must be.
    """
    layers = range(spec.num_layers)
    windows = [spec.window(i) if spec.window(i) < context else 0 for i in layers]
    full, windowed = [i for i in layers if not windows[i]], [i for i in layers if windows[i]]
    window = max(windows)
    if not full or not windowed:
        return one_group(spec, window)

    def of(size: int) -> KVGroups:
        return KVGroups(-(-len(full) // size), -(-len(windowed) // size), window)

    def taken(size: int, positions: int) -> int:
        """Of a sequence, in blocks of one layer."""
        return of(size).blocks(positions, block_size) * size

    sizes = [size for size in layers[1:] if of(size).width <= MOST_GROUPS]
    product, minus = min((taken(size, 1) * taken(size, context), -size) for size in sizes)
    if product >= len(layers) ** 2 * -(-context // block_size):
        return one_group(spec)
    size = -minus
    groups = of(size)
    places = [(0, 0)] * len(layers)
    for first, those in ((0, full), (groups.full, windowed)):
        for at, layer in enumerate(those):
            places[layer] = first + at // size, at % size
    return KVLayout(groups, size, places)


@dataclass(slots=True, frozen=True)
class KVMemory:
    """Sizes of the KV pool and of the swap pool, in blocks."""

    num_blocks: int
    num_host_blocks: int
    note: str = ""
    """The arithmetic, where the size was found and not stated."""


@dataclass(slots=True, frozen=True)
class Room:
    """Where the KV pool has to fit, in bytes."""

    available: int | None
    """Free now; None where the system does not say."""
    weights: int
    """Of the available ones, what the weights are going to take."""
    buffers: int
    """And what a step takes."""
    share: float = AUTO_SHARE
    """Of what they leave: what ``--kv-memory auto`` takes at most."""
    holds_swap: bool = True
    """The swap pool has to fit too."""


def host_room(config: EngineConfig, spec: TransformerSpec) -> Room:
    """The machine's memory, before the weights are loaded."""
    return Room(available_bytes(), planned_weights(config, spec), step_buffer_bytes(config, spec))


def planned_room(config: EngineConfig, whole: TransformerSpec, memory: int | None) -> Room:
    """Where the KV pool will have to fit, on one device where several share the model. memory: bytes of a device that is not at hand;
    None: what this machine has free. On a GPU buffers are estimated, which its backend measures."""
    room = host_room(config, whole)
    if config.device_kind == "cpu":
        return room if memory is None else replace(room, available=memory)
    buffers = gpu_buffer_bytes(config, part_of(whole, config.tensor_parallel))
    free = max(0, (room.available or 0 if memory is None else memory) - GPU_CONTEXT)
    return Room(free, room.weights, buffers, GPU_SHARE, holds_swap=False)


def kv_memory(config: EngineConfig, spec: TransformerSpec, max_model_len: int, room: Room) -> KVMemory:
    """What ``--kv-memory`` and ``--swap-memory`` hold. spec: of what one device holds.

    Raises CapacityError where one request does not fit, or the device lacks the memory.
    """
    layout = kv_layout(spec, max_model_len, config.block_size)
    per_block, most = layout.block_bytes(config, spec), (config.block_size, config.max_num_batched_tokens)
    need = layout.groups.blocks(max_model_len, *most)
    size, note = config.kv_bytes, ""
    swap_bytes = config.swap_bytes if room.holds_swap else 0
    if size is None:
        size, note = _auto(config, max_model_len, need * per_block, room, swap_bytes)
    num_blocks = size // per_block
    num_host_blocks = config.swap_bytes // per_block
    if num_blocks < need:
        fits = layout.groups.positions(num_blocks, *most)
        lower = f", or lower --max-model-len to at most {fits:,}" if fits > 1 else ""
        found = "" if not note else f" ({note})"
        raise CapacityError(
            f"--kv-memory {config.kv_memory}{found} holds {fits:,} token positions ({num_blocks:,} blocks of {config.block_size}, "
            f"{per_block:,} bytes each), but one request may need {max_model_len:,}: "
            f"raise --kv-memory to at least {_mib(need * per_block)}MiB{lower}"
        )
    if config.swap_bytes and num_host_blocks == 0:
        raise CapacityError(
            f"--swap-memory {config.swap_memory} is less than one block of {per_block:,} bytes: raise it to at least {_mib(per_block)}MiB, "
            "or leave it out"
        )
    available, weights = room.available, room.weights
    if available is not None and size + swap_bytes + weights > available:
        swap = f", --swap-memory {config.swap_memory}" if swap_bytes else ""
        left = max(0, available - weights - swap_bytes) >> 20
        fits = layout.groups.positions((left << 20) // per_block, *most)
        if fits >= max_model_len:
            remedy = f"lower --kv-memory to at most {left}MiB"
        elif fits > 1:
            remedy = f"lower --kv-memory to at most {left}MiB, and --max-model-len to at most {fits:,}"
        else:
            remedy = "free some, or take a smaller model"
        raise CapacityError(
            f"--kv-memory {config.kv_memory} ({size / 1e9:.1f} GB){swap} and the weights ({weights / 1e9:.1f} GB) need more than the "
            f"{available / 1e9:.1f} GB of memory that are free: {remedy}"
        )
    return KVMemory(num_blocks, num_host_blocks, note)


def _auto(config: EngineConfig, max_model_len: int, each: int, room: Room, swap_bytes: int) -> tuple[int, str]:
    """(bytes, arithmetic) of ``--kv-memory auto``: what can be spared, and no more than the sequences, of ``each`` bytes at most, could
    ever fill."""
    if room.available is None:
        raise ConfigError(
            "--kv-memory auto needs to know how much memory is free, and this system does not say: state a size", param="kv_memory"
        )
    left = max(0, room.available - room.weights - room.buffers - swap_bytes)
    share = int(left * room.share)
    sequences = config.num_seqs(1 << 30)
    most = sequences * each
    swap = f" - {swap_bytes / 1e9:.2f} GB swap" if swap_bytes else ""
    weights = f" - {room.weights / 1e9:.2f} GB weights" if room.weights else ""
    note = (
        f"{room.available / 1e9:.2f} GB free{weights} - {room.buffers / 1e9:.2f} GB step buffers{swap} = {left / 1e9:.2f} GB; "
        f"{room.share:.0%} of it is {share / 1e9:.2f} GB; {sequences} sequences of {max_model_len:,} tokens fill {most / 1e9:.2f} GB"
    )
    return min(share, most), note


def context_length(config: EngineConfig, spec: TransformerSpec) -> int:
    """Most tokens of a sequence: the model's context, or --max-model-len. Raises ConfigError."""
    if config.max_model_len is None:
        return spec.max_positions
    if config.max_model_len > spec.max_positions:
        raise ConfigError(
            f"--max-model-len {config.max_model_len:,} > the model's context of {spec.max_positions:,} tokens: "
            f"lower it to at most {spec.max_positions:,}",
            param="max_model_len",
        )
    return config.max_model_len


def step_buffer_bytes(config: EngineConfig, spec: TransformerSpec) -> int:
    """Bytes of the float32 arrays that a step works in (see Decoder), for the most positions and rows of a step."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    position = 2 * spec.hidden_size + heads + spec.plain_size
    if spec.num_experts:
        position += spec.num_experts + spec.experts_per_token * (spec.intermediate_size + spec.hidden_size)
    return 4 * (config.max_num_batched_tokens * position + config.num_seqs(1 << 30) * spec.vocab_size)


def gpu_buffer_bytes(config: EngineConfig, spec: TransformerSpec) -> int:
    """About the bytes that steps take beside weights and KV pool on a GPU: the activations of the longest prefill in the width of the
    weights, logits in float32 and what sampling makes of them, and once more of the largest decode step for captured steps."""
    width, rows = DTYPE_BYTES[config.weight_width(spec.dtype)], config.num_seqs(1 << 30)
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    taken = spec.experts_per_token
    position = width * (4 * spec.hidden_size + heads + 3 * max(spec.plain_size, taken * spec.intermediate_size))
    if spec.num_experts:
        position += taken * (width * spec.hidden_size + 16) + 8 * spec.num_experts  # with what routing sorts
    return config.max_num_batched_tokens * position + 2 * rows * (position + 4 * 4 * spec.vocab_size)


def read_note(weights: int, experts: int) -> str:
    """What a step reads of weights, in bytes, of which experts."""
    taken = f", of the {experts / 1e6:,.0f} MB of experts those that its positions take" if experts else ""
    return f"{weights / 1e6:,.0f} MB that a step reads{taken}"


def _mib(size: int) -> int:
    return -(-size >> 20)


def available_bytes() -> int | None:
    """Bytes that can still be taken without swapping, or None where the system does not say (no /proc)."""
    try:
        fields = dict(line.split(":", 1) for line in (_ROOT / "proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return min([available, *(left for group in _groups() if (left := _left(group)) is not None)])


def _groups() -> Iterator[Path]:
    """Folders of the control groups whose limit binds this process: its own, and all above it. native/cpus.cpp looks for a quota of
    CPUs in the same way. Where a container sees only its own part of the tree, the path may be one of the host, and lead nowhere: what
    is left is the mount itself, which is the container's group then."""
    top = _ROOT / "sys/fs/cgroup"
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path; version 2 has no controllers, and may be mounted beside version 1
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or (controllers and "memory" not in controllers.split(",")):
            continue
        names = [name for name in path.split("/") if name]
        for mount in (top / controllers, top / "memory") if controllers else (top, top / "unified"):
            for depth in range(len(names), -1, -1):
                if ".." not in names[:depth]:
                    yield mount.joinpath(*names[:depth])


def _left(group: Path) -> int | None:
    """Bytes of a control group's limit that are not in use; None where it has none."""
    for limit, current, *cached in _GROUP_FILES:
        try:
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached files count as used, the model's own among them, but go when memory is needed.
            used = int((group / current).read_text()) - sum(int(stat[name]) for name in cached)
            return max(0, int((group / limit).read_text()) - used)  # "max" is no number
        except (OSError, KeyError, ValueError):
            continue
    return None
