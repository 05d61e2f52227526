"""What one of several devices has of a model that they share (tensor parallelism; backends/cuda/parallel.py divides the tensors)."""

from __future__ import annotations

from dataclasses import replace

from quire.errors import ConfigError
from quire.models.spec import TransformerSpec


def check(spec: TransformerSpec, size: int) -> None:
    """Raises ConfigError where the model can't be divided among ``size`` devices."""
    inner = dict.fromkeys(units for units in (spec.intermediate_size, spec.shared_size, *spec.dense_sizes) if units)
    parts = [("attention heads", spec.num_heads), ("KV heads", spec.num_kv_heads)]
    parts += [("inner units of a feed-forward", units) for units in inner]
    for what, count in parts:
        if count % size:
            fitting = [str(n) for n in range(2, size) if not any(each % n for _, each in parts)]
            remedy = f"choose {' or '.join(fitting)}" if fitting else "leave it out"
            raise ConfigError(f"--tensor-parallel {size} does not divide the model's {count:,} {what}: {remedy}", param="tensor_parallel")


def head_rows(spec: TransformerSpec, size: int) -> int:
    """Tokens of the vocabulary whose logits one device computes."""
    return -(-spec.vocab_size // size)


def part_of(spec: TransformerSpec, size: int) -> TransformerSpec:
    """The shapes that one of ``size`` devices computes with; embedding and norms are whole, and lm_head is ``head_rows``."""
    return spec if size == 1 else replace(
        spec, num_heads=spec.num_heads // size, num_kv_heads=spec.num_kv_heads // size, intermediate_size=spec.intermediate_size // size,
        shared_size=spec.shared_size // size, dense_sizes=tuple(units // size for units in spec.dense_sizes), attention_scale=spec.scale,
    )  # fmt: skip
