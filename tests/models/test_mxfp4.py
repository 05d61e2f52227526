"""Experts in MXFP4: the floats that they stand for, blocks for the kernels, and files that are not whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quire.config import EngineConfig
from quire.errors import ModelLoadError
from quire.models.quantization import Quantization
from quire.models.weights import load_model, load_spec
from quire.models.weights.mxfp4 import Mxfp4Weight
from sample_models import GPT_OSS, checkpoint, write_model
from sample_packed import packed_folder, to_mxfp4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("floats") / "gpt-oss", GPT_OSS, checkpoint(GPT_OSS))


def expected(weight: np.ndarray) -> np.ndarray:
    """[..., in] as MXFP4 holds it, by ml_dtypes."""
    numbers, powers = to_mxfp4(weight)
    codes = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*powers.shape, 32)
    floats = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * powers.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    return floats.reshape(weight.shape)


def test_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Gates and what they gate take turns among the rows of a tensor; linears beside experts are not packed."""
    floats, model = load_model(folder), load_model(packed_folder(folder, tmp_path / "packed", "mxfp4"))
    assert set(model.tensors) == set(floats.tensors)
    for name, wanted in floats.tensors.items():
        found = np.asarray(model.tensors[name], np.float32)
        packed = ".experts." in name and name.endswith("weight")
        assert np.array_equal(found, expected(np.asarray(wanted)) if packed else wanted.astype(ml_dtypes.bfloat16).astype(np.float32)), name
        kept = model.blocks(name)
        assert (kept is not None) == packed
        if kept is not None:
            kind, blocks = kept
            assert (kind, blocks().shape) == ("mxfp4", (wanted.shape[0], wanted.shape[1] // 32 * 20))
    stored = dict(model.spec.stored)
    assert {kind for name, kind in stored.items() if ".experts." in name} == {"mxfp4"}
    assert {kind for name, kind in stored.items() if ".experts." not in name} == {"int8"}
    assert not any("router" in name or "embed" in name for name in stored)
    assert model.spec.quantized == "stored"
    assert model.spec.widths("stored") == "int8 and mxfp4"
    assert model.spec == load_spec(tmp_path / "packed")


def test_without_the_weights(folder: Path, tmp_path: Path) -> None:
    packed = packed_folder(folder, tmp_path / "packed", "mxfp4")
    spec = load_spec(packed)
    (packed / "model.safetensors").unlink()
    assert replace(load_spec(packed), dtype=spec.dtype) == spec
    quantization = Quantization.of(EngineConfig(model=str(packed), quantize="stored"), spec)
    assert quantization is not None
    quantization.check(spec)
    each = 3 * 96 * 128
    assert quantization.expert_bytes(spec) == 4 * 5 * (each // 2 + each // 32 * 2)
    assert str(quantization) == "int8 and mxfp4 as the file has them"


def test_any_bytes() -> None:
    rng = np.random.default_rng(0)
    numbers, powers = rng.integers(0, 256, (3, 50, 4, 16), np.uint8), rng.integers(0, 256, (3, 50, 4), np.uint8)
    powers[0, 0], powers[0, 1, 2] = 255, 0
    codes = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(3, 50, 4, 32)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * powers.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
        exact = exact.reshape(3, 50, 128).astype(np.float16)
    weight = Mxfp4Weight(numbers, powers)
    for expert in range(3):
        np.testing.assert_array_equal(weight.expert(expert).floats(slice(1, 50, 2)), exact[expert, 1::2])
        blocks = weight.expert(expert).blocks(slice(0, 50)).reshape(50, 4, 20)
        halves = blocks[..., :4].copy().view(np.float32)[..., 0]
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(halves * 2, powers[expert].view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
        assert np.array_equal(blocks[..., 4:], numbers[expert])


@pytest.mark.parametrize(("change", "message"), [
    ({"down_proj_scales": None}, "layers.1.mlp.experts.down_proj_blocks is there, but no .*down_proj_scales"),
    ({"down_proj_blocks": None}, r"lacks 1 tensor \(layers.1.mlp.experts.down_proj \[5, 128, 96\]\) that GptOssForCausalLM"),
    ({"down_proj_blocks": np.zeros((5, 96, 4, 15), np.uint8)}, r"blocks is U8 \[5, 96, 4, 15\], not U8 \[experts, out, in / 32, 16\]"),
    ({"down_proj_blocks": np.zeros((5, 96, 64), np.uint8)}, r"down_proj_blocks is U8 \[5, 96, 64\]"),
    ({"down_proj_blocks": np.zeros((5, 96, 4, 16), np.int8)}, r"down_proj_blocks is I8 \[5, 96, 4, 16\]"),
    ({"down_proj_blocks": np.zeros((5, 96, 0, 16), np.uint8), "down_proj_scales": np.zeros((5, 96, 0), np.uint8)}, r"\[5, 96, 0, 16\]"),
    ({"down_proj_scales": np.zeros((5, 96, 3), np.uint8)}, r"down_proj_scales is U8 \[5, 96, 3\], not U8 \[5, 96, 4\]"),
    ({"down_proj_scales": np.zeros((5, 96, 4), np.float32)}, r"down_proj_scales is F32 \[5, 96, 4\]"),
    ({"down_proj_blocks": np.zeros((4, 96, 4, 16), np.uint8), "down_proj_scales": np.zeros((4, 96, 4), np.uint8)},
     r"down_proj has the shape \[4, 128, 96\], config.json asks for \[5, 128, 96\]"),
])  # fmt: skip
def test_refused(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    packed = packed_folder(folder, tmp_path / "packed", "mxfp4")
    tensors = load_file(packed / "model.safetensors")
    for name, array in change.items():
        full = f"model.layers.1.mlp.experts.{name}"
        del tensors[full]
        if array is not None:
            tensors[full] = array
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load_model(packed)


def test_a_model_without_experts_in_mxfp4(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    plain = write_model(tmp_path / "plain", values, checkpoint(GPT_OSS))
    with pytest.raises(ModelLoadError, match="says that the model is quantized, but no linear is"):
        load_model(plain)
