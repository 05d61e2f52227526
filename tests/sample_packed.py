"""Quantized checkpoints for tests, as AWQ, GPTQ and compressed-tensors pack them: of the linears of any model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from quire.models.weights import read_headers
from quire.models.weights.safetensors import map_file, view

CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "modules_to_not_convert": None},
    "gptq": {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "lm_head": False},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"},
    "pack-quantized": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {
        "group_0": {"targets": ["Linear"], "input_activations": None,
                    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}}}},
    "int-quantized": {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"], "config_groups": {
        "group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"},
                    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}}},
    "float-quantized": {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"], "config_groups": {
        "group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
                    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}}}},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [48, 48]},
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                                  "model.embed_tokens", "lm_head"]},
}  # fmt: skip
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of outputs in a word of AWQ's."""

Array = npt.NDArray[Any]


def round_to(weight: Array, bits: int, group: int, symmetric: bool, groups: Array | None = None) -> tuple[Array, Array, Array]:
    """Unsigned numbers [out, in], scales (float16) and zeros [out, groups]. groups: that of each input, where they are not in order."""
    out, inputs = weight.shape
    index = np.arange(inputs) // (group or inputs) if groups is None else groups
    count, most = int(index.max()) + 1, (1 << bits) - 1
    low, high = np.empty((out, count), np.float32), np.empty((out, count), np.float32)
    for g in range(count):
        low[:, g], high[:, g] = weight[:, index == g].min(1), weight[:, index == g].max(1)
    if symmetric:
        scales = (np.maximum(np.abs(low), np.abs(high)) / (most // 2)).astype(np.float16)
        zeros = np.full_like(scales, (most + 1) // 2, np.int64)
    else:
        scales = ((np.maximum(high, 0) - np.minimum(low, 0)) / most).astype(np.float16)
        zeros = np.clip(np.rint(-np.minimum(low, 0) / scales.astype(np.float32)), 0, most).astype(np.int64)
    numbers = np.clip(np.rint(weight / scales.astype(np.float32)[:, index]) + zeros[:, index], 0, most)
    return numbers.astype(np.int64), scales, zeros


def words(numbers: Array, bits: int, order: tuple[int, ...] = ()) -> Array:
    """[rows, n] → int32 [rows, n * bits / 32], the first of a word lowest; order: which of a word's is at which place."""
    each = numbers.reshape(len(numbers), -1, 32 // bits).astype(np.uint32)
    each = each[:, :, list(order)] if order else each
    return np.bitwise_or.reduce(each << (np.arange(32 // bits, dtype=np.uint32) * bits), axis=-1).astype(np.uint32).view(np.int32)


def parts_of(method: str, weight: Array, bits: int, group: int, symmetric: bool, groups: Array | None = None) -> dict[str, Array]:
    """The tensors of a linear, by what their names end in."""
    if method in ("float-quantized", "fp8", "fp8-tensor"):
        rows, inputs = {"float-quantized": (1, weight.shape[1]), "fp8": (48, 48), "fp8-tensor": weight.shape}[method]
        blocks = -(-weight.shape[0] // rows), -(-weight.shape[1] // inputs)
        scales = np.empty(blocks, np.float32)
        for i, j in np.ndindex(*blocks):
            scales[i, j] = np.abs(weight[i * rows : (i + 1) * rows, j * inputs : (j + 1) * inputs]).max() / 448
        numbers = (weight / scales.repeat(rows, 0).repeat(inputs, 1)[: len(weight), : weight.shape[1]]).astype(ml_dtypes.float8_e4m3fn)
        name = "weight_scale_inv" if method == "fp8" else "weight_scale"
        return {"weight": numbers, name: scales[0, 0] if method == "fp8-tensor" else scales}
    numbers, scales, zeros = round_to(weight, bits, group, symmetric, groups)
    if method == "awq":
        return {"qweight": words(numbers.T, 4, ORDER), "qzeros": words(zeros.T, 4, ORDER), "scales": np.ascontiguousarray(scales.T)}
    if method.startswith("gptq"):
        stored = zeros if method == "gptq-v2" else (zeros - 1) & ((1 << bits) - 1)
        index = np.arange(weight.shape[1]) // (group or weight.shape[1]) if groups is None else groups
        return {"qweight": np.ascontiguousarray(words(numbers, bits).T), "qzeros": words(stored.T, bits),
                "scales": np.ascontiguousarray(scales.T), "g_idx": index.astype(np.int32)}  # fmt: skip
    if method == "int-quantized":
        return {"weight": (numbers - 128).astype(np.int8), "weight_scale": scales}
    made = {"weight_packed": words(numbers, bits), "weight_scale": scales, "weight_shape": np.array(weight.shape)}
    if not symmetric:
        made["weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    return made | ({} if groups is None else {"weight_g_idx": groups.astype(np.int32)})


def to_mxfp4(weight: Array) -> tuple[Array, Array]:
    """Bytes [..., in / 32, 16] and powers [..., in / 32] of [..., in]: the greatest number of a group becomes 4 or 6."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    powers = np.floor(np.log2(np.abs(groups).max(-1))).astype(np.int64) - 2
    scaled = np.ldexp(groups, -powers[..., None])
    floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.abs(np.abs(scaled)[..., None] - floats).argmin(-1) | (scaled < 0) << 3
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8), (powers + 127).astype(np.uint8)


def packed_folder(
    source: Path, out: Path, method: str, *, bits: int = 4, group: int = 32, symmetric: bool | None = None, **config: Any
) -> Path:
    """A copy of a model folder with the linears of its layers quantized. symmetric: None takes what is usual; config: changes."""
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    about = json.loads(json.dumps(CONFIGS[method])) | config
    if symmetric is None:
        symmetric = method not in ("awq", "gptq-v2")
    if "fp" in method or method == "float-quantized":
        pass
    elif about["quant_method"] == "compressed-tensors":
        scheme = about["config_groups"]["group_0"]["weights"]
        scheme |= {"symmetric": symmetric, "num_bits": bits} | ({"group_size": group} if group else {"strategy": "channel"})
    else:
        about |= {"bits": bits, "group_size": group or -1} | ({"sym": symmetric} if "sym" in about else {"zero_point": not symmetric})
    shuffles = about.get("desc_act") or about.get("config_groups", {}).get("group_0", {}).get("weights", {}).get("actorder") == "group"
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copy(file, out / file.name)
    tensors: dict[str, Array] = {}
    rng = np.random.default_rng(0)
    for name, array in floats_of(source).items():
        if method == "mxfp4":
            if array.ndim == 3:
                for part, made in zip(("blocks", "scales"), to_mxfp4(array.swapaxes(1, 2)), strict=True):
                    tensors[f"{name}_{part}"] = np.ascontiguousarray(made)
            else:
                tensors[name] = array.astype(ml_dtypes.bfloat16)
            continue
        routers = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "correction_bias")
        if ".layers." not in name or array.ndim != 2 or name.endswith(routers):
            tensors[name] = array.astype(np.float16)
            continue
        groups = rng.permutation(np.arange(array.shape[1]) // group) if shuffles else None
        for part, made in parts_of(method, array, bits, group, symmetric, groups).items():
            # Contiguous, for save_file writes memory as it lies.
            tensors[f"{name.removesuffix('.weight')}.{part}"] = np.ascontiguousarray(made)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(values | {"quantization_config": about}), encoding="utf-8")
    return out


def floats_of(folder: Path) -> dict[str, Array]:
    """A checkpoint's own tensors, as float32."""
    headers = read_headers(folder)
    maps = {file: map_file(file) for file in {info.file for info in headers.values()}}
    return {name: view(maps[info.file], info).astype(np.float32) for name, info in headers.items()}
