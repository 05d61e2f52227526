"""Kinds of quantized weights: what is refused, and how many bytes a model has."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest

from quire.backends.cpu import _native as native
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.models.quantization import GROUP_SIZES, Quantization, planned_cost
from quire.models.spec import TransformerSpec

SPEC = TransformerSpec("Tiny", 512, 64, 2, 4, 2, 16, 160, 64, tied=True)
TABLES = ("embed.weight", "positions.weight")
"""Looked up, and not multiplied."""


def test_defaults() -> None:
    assert Quantization.of(EngineConfig(), SPEC) is None
    assert Quantization.of(EngineConfig(quantize="int8"), SPEC) == Quantization("int8", 0)
    assert Quantization.of(EngineConfig(quantize="int4"), SPEC) == Quantization("int4", 32)
    assert Quantization.of(EngineConfig(quantize="int8", group_size=128), SPEC) == Quantization("int8", 128)
    for head in ("lm_head", "embed"):
        assert Quantization("int4", 64).kind(head) == Quantization("int8", 0)
        assert Quantization("int8", 64).kind(head) == Quantization("int8", 64)
    assert Quantization("int4", 64).kind("layers.0.q") == Quantization("int4", 64)


def test_a_checkpoint_that_is_quantized_keeps_4_bits() -> None:
    names = [name for name in _matrices(SPEC) if name.startswith("layers")]
    stored = [(name.removesuffix(".weight"), "int4:32+offsets" if name.endswith(("q.weight", "up.weight")) else "int8") for name in names]
    spec = replace(SPEC, stored=(*stored, ("embed", "int4:32")))
    assert (spec.quantized, SPEC.quantized, replace(SPEC, stored=(("embed", "int8"),)).quantized) == ("stored", "", "int8")
    kind = Quantization.of(EngineConfig(quantize="stored"), spec)
    assert kind is not None
    assert str(kind) == "int4 and int8 as the file has them"
    assert kind.kind("layers.1.q") == Quantization("int4", 32, offsets=True)
    assert (kind.kind("layers.1.k"), kind.kind("embed")) == (Quantization("int8", 0), Quantization("int4", 32))
    kind.check(spec)
    assert (spec.widths("stored"), spec.widths("int8")) == ("int4 and int8", "int8")
    each = {name: n * k * 5 // 8 if name.endswith(("q.weight", "up.weight")) else n * k + 2 * n for name, (n, k) in _matrices(SPEC).items()}
    assert kind.linear_bytes(spec) == sum(each[name] for name in names)
    assert kind.head_bytes(spec, 512) == 512 * 64 * 9 // 16
    rest = sum(n for name, n in sizes(SPEC).items() if name not in names)
    assert kind.weight_bytes(spec, "float16") == sum(each[name] for name in names) + 2 * rest + 512 * 64 * 9 // 16
    assert planned_cost(EngineConfig(quantize="stored"), spec).weight_bytes == kind.linear_bytes(spec) + kind.head_bytes(spec, 512)


def sizes(spec: TransformerSpec) -> dict[str, int]:
    return {name: prod(shape) for name, shape in spec.tensor_shapes().items()}


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quantize 'int3' is not supported; choose from: int8, int4"):
        EngineConfig(quantize="int3")
    with pytest.raises(ConfigError, match="--group-size 48 is not supported; choose from: 0, 32, 64, 128"):
        EngineConfig(quantize="int4", group_size=48)
    with pytest.raises(ConfigError, match="--group-size 0 is not supported with --quantize int4; choose from: 32, 64, 128"):
        Quantization.of(EngineConfig(quantize="int4", group_size=0), SPEC)
    with pytest.raises(ConfigError, match="--group-size 32 is for quantized weights: add --quantize int8 or int4"):
        EngineConfig(group_size=32).as_stored("")
    with pytest.raises(ConfigError, match=r"--cache-dir keeps quantized weights .*: add --quantize int8 or int4"):
        EngineConfig(cache_dir="somewhere").as_stored("")
    with pytest.raises(ConfigError, match=r"--quantize stored keeps .* this model's are not quantized: choose int8 or int4"):
        EngineConfig(quantize="stored").as_stored("")
    with pytest.raises(ConfigError, match=r"--group-size 64 is for .* quantized at load, and the model's own groups are kept"):
        EngineConfig(group_size=64).as_stored("stored")
    with pytest.raises(ConfigError, match="--quantize stored is not there with --device cuda: take int8 or fp8"):
        EngineConfig(quantize="stored", device="cuda")


def test_a_group_that_does_not_divide_names_the_layer_and_what_would() -> None:
    Quantization("int4", 32).check(SPEC)
    Quantization("int8", 0).check(replace(SPEC, intermediate_size=161))
    with pytest.raises(ConfigError, match=r"--group-size 64 does not divide the 160 inputs of layers.0.down: choose 32$"):
        Quantization("int4", 64).check(SPEC)
    with pytest.raises(
        ConfigError, match=r"128 does not divide the 64 inputs of layers.0.q: choose 0 or 32 \(0: one scale for each output\)"
    ):
        Quantization("int8", 128).check(SPEC)
    with pytest.raises(ConfigError, match=r"32 does not divide the 161 inputs of layers.0.down: no group size does .* use --quantize int8"):
        Quantization("int4", 32).check(replace(SPEC, intermediate_size=161))


@pytest.mark.parametrize("kind", [Quantization(dtype, size) for dtype in ("int8", "int4") for size in GROUP_SIZES[dtype]], ids=str)
def test_bytes_are_those_of_the_kernels(kind: Quantization) -> None:
    packed = native.pack_linear(np.ones((256, 384), np.float32), kind.dtype, kind.group_size)
    assert kind.nbytes(256, 384) == packed.nbytes


def test_bytes_of_a_model() -> None:
    kind = Quantization("int4", 32)
    linears = sum(n * k for name, (n, k) in _matrices(SPEC).items() if name not in TABLES)
    rest = SPEC.num_parameters() - linears
    head = 512 * 64 + 2 * 512  # int8, one scale for each output
    assert kind.weight_bytes(SPEC, "float16") == linears * 9 // 16 + 2 * rest + head
    untied = replace(SPEC, tied=False)
    assert kind.weight_bytes(untied, "float16") == kind.weight_bytes(SPEC, "float16")


def _matrices(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    return {name: (shape[0], shape[1]) for name, shape in spec.tensor_shapes().items() if len(shape) == 2}
