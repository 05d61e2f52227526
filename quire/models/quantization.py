"""Quantized weights: which kinds there are, which layers of a model get which, and how many bytes that makes.

Every linear is quantized while it is packed. int8 has one scale for each output by default, int4 one for each 32 inputs of an
output. Under int4 lm_head is int8: in 4 bits it alone would cost as much accuracy as all layers of a small model together
(docs/benchmarks/cpu.md), for few bytes. A checkpoint that is quantized already keeps what it has of 4 bits: each linear then has a kind
of its own, with offsets where a group's numbers are not centred on zero. Embeddings, which are looked up and not multiplied, are not
quantized, nor are norms and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.models.parallel import head_rows, part_of
from quire.models.spec import DTYPE_BYTES, ModelCost, TransformerSpec

GROUP_SIZES: Final = {"int8": (0, 32, 64, 128), "int4": (32, 64, 128), "fp8": (0,)}
"""Inputs that share a scale, 0 for all of an output's; the first is the default."""
FOUR_BITS: Final = ("int4", "mxfp4")
"""Kinds of 4 bits: numbers, and floats (E2M1 of the OCP Microscaling specification), which are only as a checkpoint has them."""
_SCALE_BYTES: Final = 2


@dataclass(slots=True, frozen=True)
class Quantization:
    """How linears are quantized: ``dtype`` int8, int4 or mxfp4, in groups of ``group_size``. ``stored``: each as ``linears`` has it."""

    dtype: str
    group_size: int
    offsets: bool = False
    """int4 only: a group has not only a scale, but also what its numbers times the scale must be raised by."""
    linears: tuple[tuple[str, Quantization], ...] = ()
    """Canonical name → kind, under ``stored``."""
    _kinds: Mapping[str, Quantization] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kinds", dict(self.linears))

    @classmethod
    def of(cls, config: EngineConfig, spec: TransformerSpec) -> Quantization | None:
        """What the options ask for; None where weights are not quantized."""
        if config.quantize == "stored":
            return cls("stored", 0, linears=tuple((name, cls._stored(kind)) for name, kind in spec.stored))
        return None if config.quantize is None else cls.named(config.quantize, config.group_size)

    @classmethod
    def _stored(cls, kind: str) -> Quantization:
        """As TransformerSpec.stored names it."""
        if kind == "mxfp4":
            return cls(kind, 32)
        dtype, _, group = kind.partition(":")
        return cls(dtype, int(group.split("+")[0] or 0), offsets=group.endswith("+offsets"))

    @classmethod
    def named(cls, dtype: str, group_size: int | None = None) -> Quantization:
        """group_size: None takes the default. Raises ConfigError."""
        if dtype not in GROUP_SIZES:
            raise ConfigError(f"--quantize {dtype!r:.40} is not supported; choose from: {', '.join(GROUP_SIZES)}", param="quantize")
        sizes = GROUP_SIZES[dtype]
        if group_size is not None and group_size not in sizes:
            raise ConfigError(
                f"--group-size {group_size} is not supported with --quantize {dtype}; choose from: {', '.join(map(str, sizes))}",
                param="group_size",
            )
        return cls(dtype, sizes[0] if group_size is None else group_size)

    def kind(self, name: str) -> Quantization:
        """Of a linear, by its canonical name; a tied lm_head is ``embed``."""
        if self.linears:
            return self._kinds[name]
        return INT8 if self.dtype == "int4" and name in ("lm_head", "embed") else self

    def __str__(self) -> str:
        if self.linears:
            return " and ".join(sorted({kind.dtype for _, kind in self.linears})) + " as the file has them"
        each = f"in groups of {self.group_size}" if self.group_size else "with one scale for each output"
        return f"{self.dtype} {each}" + (f", lm_head {INT8}" if self.dtype == "int4" else "")

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of [n, k] weights and their scales, padding left out."""
        scales = n * (k // self.group_size if self.group_size else 1) * (2 if self.offsets else 1)
        return n * k * (4 if self.dtype in FOUR_BITS else 8) // 8 + _SCALE_BYTES * scales

    def weight_bytes(self, spec: TransformerSpec, dtype: str | None = None) -> int:
        """Bytes of all of a model's weights. dtype: the width of what is not quantized; None: the checkpoint's."""
        total = spec.weight_bytes(dtype)
        per_parameter = spec.weight_bytes(dtype) // spec.num_parameters()
        for n, k, kind in self._linears(spec).values():
            total += kind.nbytes(n, k) - n * k * per_parameter
        if spec.tied:  # the table stays for looking up, beside its quantized copy
            total += self.head_bytes(spec, spec.vocab_size)
        return total

    def head_bytes(self, spec: TransformerSpec, rows: int) -> int:
        """Of so many rows of lm_head."""
        return self.kind("embed" if spec.tied else "lm_head").nbytes(rows, spec.embedding_size)

    def linear_bytes(self, spec: TransformerSpec) -> int:
        """Bytes of all linears but lm_head: what a step reads."""
        return sum(kind.nbytes(n, k) for name, (n, k, kind) in self._linears(spec).items() if name != "lm_head")

    def expert_bytes(self, spec: TransformerSpec) -> int:
        """Bytes of all experts."""
        return sum(kind.nbytes(n, k) for name, (n, k, kind) in self._linears(spec).items() if ".experts." in name)

    def check(self, spec: TransformerSpec) -> None:
        """Raises ConfigError where the group size does not divide the inputs of some linear."""
        for name, (_, k, kind) in self._linears(spec).items():
            if kind.group_size and k % kind.group_size:
                self._refuse(spec, name, k)

    def _linears(self, spec: TransformerSpec) -> dict[str, tuple[int, int, Quantization]]:
        """Canonical name → outputs, inputs, kind, of every linear that is stored as one."""
        return {name: (n, k, self.kind(name)) for name, (n, k) in spec.quantizable().items() if name != "embed"}

    def _refuse(self, spec: TransformerSpec, name: str, k: int) -> NoReturn:
        widths = {k for _, k, kind in self._linears(spec).values() if kind == self}
        fitting = [str(size) for size in GROUP_SIZES[self.dtype] if not size or not any(k % size for k in widths)]
        if fitting:
            remedy = f"choose {' or '.join(fitting)}" + (" (0: one scale for each output)" if "0" in fitting else "")
        else:
            remedy = "no group size does for all of this model's layers; use --quantize int8, whose scales need no groups"
        raise ConfigError(f"--group-size {self.group_size} does not divide the {k:,} inputs of {name}: {remedy}", param="group_size")


INT8: Final = Quantization("int8", 0)


def planned_cost(config: EngineConfig, whole: TransformerSpec) -> ModelCost:
    """What steps will ask of a machine, or of each of those that share the model, before it is loaded; a backend that has it says the
    same, with padding."""
    quantization, width = Quantization.of(config, whole), config.weight_width(whole.dtype)
    spec, head = part_of(whole, config.tensor_parallel), head_bytes(config, whole, config.tensor_parallel)
    if quantization is None:
        tables = 2 * spec.hidden_size * spec.embedding_size if spec.embedding_size != spec.hidden_size else 0
        linears = (spec.linear_parameters() + tables) * DTYPE_BYTES[width]
        experts = spec.expert_layers * spec.num_experts * spec.feed_forward_parameters() * DTYPE_BYTES[width]
    else:
        routers = spec.expert_layers * spec.num_experts * spec.hidden_size * DTYPE_BYTES[width]
        linears, experts = quantization.linear_bytes(spec) + routers, quantization.expert_bytes(spec)
    rows = 0 if spec is whole else head_rows(whole, config.tensor_parallel)
    return ModelCost(spec, linears + head, head, config.kv_width(spec.dtype), experts, rows)


def planned_weights(config: EngineConfig, whole: TransformerSpec) -> int:
    """Bytes of the weights of a machine, or of each of those that share the model."""
    size, quantization = config.tensor_parallel, Quantization.of(config, whole)
    spec, dtype = part_of(whole, size), None if config.dtype == "auto" else config.dtype
    total = spec.weight_bytes(dtype) if quantization is None else quantization.weight_bytes(spec, dtype)
    if size == 1:
        return total
    counted = not whole.tied or quantization is not None  # a part of the table for looking up is lm_head's own here
    return total + head_bytes(config, whole, size) - (head_bytes(config, whole, 1) if counted else 0)


def head_bytes(config: EngineConfig, whole: TransformerSpec, size: int) -> int:
    """Of lm_head's part on one of ``size`` devices."""
    rows, quantization = head_rows(whole, size), Quantization.of(config, whole)
    if quantization is not None:
        return quantization.head_bytes(whole, rows)
    return rows * whole.embedding_size * DTYPE_BYTES[config.weight_width(whole.dtype)]
