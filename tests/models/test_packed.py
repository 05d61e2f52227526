"""Checkpoints whose linears are quantized: what becomes of the numbers in them, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quire.backends.cpu import _native as native
from quire.errors import ModelLoadError
from quire.models.families import spec_from_config
from quire.models.weights import load_model, load_spec, read_headers, resolve_model
from quire.models.weights.packed import _E4M3
from sample_models import ERNIE, GLM4, LLAMA, PHI3, checkpoint, write_model
from sample_packed import ORDER, floats_of, packed_folder, parts_of, round_to, words

SIZES = {"num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 192, "torch_dtype": "float16"}  # fmt: skip

W4 = {"config_groups": {"a": {"weights": {"num_bits": 4}}}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {}, "int4:32+offsets"),
    ("awq", {"symmetric": True}, "int4:32"),
    ("gptq", {}, "int4:32"),
    ("gptq", {"symmetric": False}, "int4:32+offsets"),
    ("gptq", {"group": 16}, "int8"),
    ("gptq", {"bits": 8}, "int8"),
    ("gptq", {"bits": 8, "symmetric": False}, "int8"),
    ("gptq", {"desc_act": True}, "int8"),
    ("gptq-v2", {}, "int4:32+offsets"),
    ("gptq-v2", {"symmetric": True, "group": 0}, "int4:64"),
    ("pack-quantized", {}, "int4:32"),
    ("pack-quantized", {"symmetric": False}, "int4:32+offsets"),
    ("pack-quantized", {"group": 0}, "int4:64"),
    ("pack-quantized", {"bits": 8}, "int8"),
    ("int-quantized", {"bits": 8, "group": 0}, "int8"),
    ("float-quantized", {"bits": 8}, "int8"),
    ("fp8", {"bits": 8}, "int8"),
    ("fp8-tensor", {"bits": 8}, "int8"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), LLAMA | SIZES)


@pytest.mark.parametrize(("method", "options", "kind"), CASES, ids=lambda value: str(value))
def test_numbers_of_every_format(llama: Path, tmp_path: Path, method: str, options: dict[str, Any], kind: str) -> None:
    """The floats are (number - zero) * scale, and blocks make the same of them."""
    folder = packed_folder(llama, tmp_path / "m", method, **options)
    model, plain = load_model(folder), load_model(llama)
    assert {each for name, each in model.spec.stored if name.startswith("layers")} == {kind}
    assert dict(model.spec.stored)["embed" if model.spec.tied else "lm_head"] == "int8"
    assert load_spec(folder).stored == model.spec.stored
    bits, group = options.get("bits", 4), options.get("group", 32)
    for name, shape in plain.spec.tensor_shapes().items():
        found, weight = model.tensors[name], plain.tensors[name].astype(np.float32)
        assert found.shape == shape
        if not name.startswith("layers.") or len(shape) != 2:
            assert np.array_equal(found, weight.astype(np.float16))
            assert model.blocks(name) is None
            continue
        assert found.dtype == np.float16
        if method in ("float-quantized", "fp8", "fp8-tensor"):  # three bits of fraction
            assert np.linalg.norm(found - weight) < 0.04 * np.linalg.norm(weight)
            parts = parts_of(method, weight, 8, 0, True)
            scale = parts["weight_scale_inv" if method == "fp8" else "weight_scale"]
            block = 48 if method == "fp8" else 1 << 20
            at = np.arange(shape[0]) // (48 if method == "fp8" else 1), np.arange(shape[1]) // block
            each = scale[at[0]][:, at[1]] if scale.ndim else scale
            assert np.array_equal(found, (parts["weight"].astype(np.float32) * each).astype(np.float16))
            continue
        if not options.get("desc_act"):
            symmetric = options.get("symmetric", method not in ("awq", "gptq-v2"))
            numbers, scales, zeros = round_to(weight, bits, group, symmetric)
            index = np.arange(shape[1]) // (group or shape[1])
            exact = ((numbers - zeros[:, index]).astype(np.float32) * scales.astype(np.float32)[:, index]).astype(np.float16)
            assert np.array_equal(found, exact), name
        assert np.linalg.norm(found - weight) < (0.15 if bits == 4 else 0.01) * np.linalg.norm(weight)
        kept = model.blocks(name)
        assert (kept is None) == (kind == "int8")
        if kept is not None:
            assert kept[0] == kind
            packed = native.pack_blocks(kept[1](), kind)
            x = np.random.default_rng(0).standard_normal((5, shape[1])).astype(np.float32)
            native.linear(packed, x, out := np.empty((5, shape[0]), np.float32))
            assert np.linalg.norm(out - x @ found.T.astype(np.float32)) < 0.015 * np.linalg.norm(out)
    assert model.nbytes == sum(array.nbytes for array in model.tensors.values())


def test_parts_of_a_fused_tensor(tmp_path: Path) -> None:
    """Phi-3 stores q, k and v as one, and gate and up."""
    rope = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    source = write_model(tmp_path / "phi3", PHI3 | SIZES | {"rope_scaling": rope})
    for method in ("awq", "gptq", "pack-quantized"):
        model, plain = load_model(packed_folder(source, tmp_path / method, method)), load_model(source)
        for part in ("q", "k", "v", "gate", "up", "o"):
            name = f"layers.1.{part}.weight"
            weight, found = plain.tensors[name].astype(np.float32), model.tensors[name]
            assert found.shape == weight.shape
            assert np.linalg.norm(found - weight) < 0.15 * np.linalg.norm(weight)
            kept = model.blocks(name)
            assert kept is not None
            assert len(kept[1]()) == len(weight)


@pytest.mark.parametrize(
    "config", [ERNIE | {"head_dim": 16, "use_bias": True}, GLM4 | {"head_dim": 16}], ids=lambda config: config["model_type"]
)
@pytest.mark.parametrize(("method", "options"), [
    ("awq", {}), ("gptq", {}), ("gptq", {"desc_act": True}), ("pack-quantized", {}), ("int-quantized", {"bits": 8, "group": 0}),
    ("fp8", {}),
])  # fmt: skip
def test_another_order_of_rotated_dimensions(tmp_path: Path, config: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    """Floats and blocks of q and k get the order that the kernels rotate in, as weights that are not quantized do."""
    config = config | SIZES
    source = write_model(tmp_path / "m", config, checkpoint(config, np.float16))
    model, plain = load_model(packed_folder(source, tmp_path / method, method, **options)), load_model(source)
    half = (16 if config["model_type"] == "ernie4_5" else 8) // 2
    stored = floats_of(source)
    for part in ("q", "k"):
        name = f"layers.1.{part}.weight"
        weight, found = plain.tensors[name].astype(np.float32), model.tensors[name].astype(np.float32)
        first = stored[f"model.layers.1.self_attn.{part}_proj.weight"]
        for i in range(half):  # of the second head: neighbours become halves
            assert np.array_equal(weight[16 + i], first[16 + 2 * i])
            assert np.array_equal(weight[16 + half + i], first[16 + 2 * i + 1])
        assert np.array_equal(weight[16 + 2 * half : 32], first[16 + 2 * half : 32])
        assert np.linalg.norm(found - weight) < 0.15 * np.linalg.norm(weight)
        bias = f"layers.1.{part}.bias"
        assert np.array_equal(model.tensors[bias], plain.tensors[bias])
        if (kept := model.blocks(name)) is not None:
            packed = native.pack_blocks(kept[1](), kept[0])
            x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
            native.linear(packed, x, out := np.empty((5, len(weight)), np.float32))
            assert np.linalg.norm(out - x @ found.T) < 0.015 * np.linalg.norm(out)


def test_small_floats() -> None:
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(_E4M3[every], every.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_orders_of_words() -> None:
    """As in the formats' definitions: the first of a word is lowest, and AWQ's outputs take turns."""
    row = np.arange(8)[None]
    assert words(row, 4).view(np.uint32)[0, 0] == 0x76543210
    assert words(row, 4, ORDER).view(np.uint32)[0, 0] == 0x75316420
    assert words(row[:, :4], 8).view(np.uint32)[0, 0] == 0x03020100


@pytest.mark.parametrize(("change", "says"), [
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: awq, gptq, fp8, mxfp4"),
    ({"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 32}, "version 'gemv' is not supported"),
    ({"quant_method": "awq", "bits": 3, "group_size": 32}, "bits 3 is not supported"),
    ({"quant_method": "gptq", "bits": 2, "group_size": 32}, "bits 2 is not supported .only 4 and 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "'group_size' must be an integer from 1"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*down.*": {"bits": 8}}}, "'dynamic'.* not supported"),
    (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not supported"),
    (COMPRESSED | {"format": ["a"]}, "format .* is not supported"),
    (COMPRESSED | {"format": "float-quantized", "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "type 'int' is not supported"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
    ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "'weight_block_size' must be two numbers above 0"),
    (COMPRESSED | {"config_groups": {"a": {}, "b": {}}}, "must have one group"),
    (COMPRESSED | {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "type 'float' is not supported"),
    (COMPRESSED | {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}}, "rounded activations"),
    (COMPRESSED | {"format": "int-quantized", "config_groups": {"a": {"weights": {"num_bits": 8, "symmetric": False}}}}, "zeros of weig"),
    (COMPRESSED | W4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    (COMPRESSED | W4 | {"transform_config": {"config_groups": {}}}, "'transform_config'"),
    ([4], "'quantization_config' is not an object"),
])  # fmt: skip
def test_configurations_that_are_refused(llama: Path, tmp_path: Path, change: Any, says: str) -> None:
    folder = packed_folder(llama, tmp_path / "m", "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": change}))
    with pytest.raises(ModelLoadError, match=f"config.json.*{says}"):
        load_spec(folder)


def damage(folder: Path, change: dict[str, Any]) -> None:
    """change: part of the second layer's q → array, or None to leave it out."""
    tensors = load_file(folder / "model.safetensors")
    prefix = next(name for name in tensors if ".1." in name and name.endswith(("q_proj.qweight", "q_proj.weight_packed"))).rpartition(".")[
        0
    ]
    for part, value in change.items():
        if value is None:
            tensors.pop(f"{prefix}.{part}")
        else:
            tensors[f"{prefix}.{part}"] = np.ascontiguousarray(value(tensors[f"{prefix}.{part}"]))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("method", "change", "says"), [
    ("gptq", {"scales": None}, "lacks 1 tensor .layers.1.self_attn.q_proj.weight"),
    ("gptq", {"qweight": None, "qzeros": None, "g_idx": None}, r"q_proj.scales is there, but no .*q_proj.qweight"),
    ("awq", {"qzeros": None}, "q_proj has no zeros, and its quantization is not symmetric"),
    ("gptq", {"scales": lambda a: a[:-1]}, r"q_proj.scales is F16 .* 64 inputs, 64 outputs and 2 groups has F32 or F16 or BF16 \[2, 64\]"),
    ("gptq", {"qzeros": lambda a: a.astype(np.int64)}, "q_proj.qzeros is I64"),
    ("gptq", {"qweight": lambda a: a[:3]}, "has the shape .*, which is not that of numbers in groups of 32"),
    ("gptq", {"qweight": lambda a: a.ravel()}, "has the shape .*, which is not that of numbers"),
    ("gptq", {"qweight": lambda a: a[:, :32], "scales": lambda a: a[:, :32], "qzeros": lambda a: a[:, :4]}, "has the shape"),
    ("gptq", {"g_idx": lambda a: a + 1}, "g_idx names groups from 1 to 2, and there are 2"),
    ("pack-quantized", {"weight_scale": lambda a: a[:, :1]}, "q_proj.weight_scale is F16"),
])  # fmt: skip
def test_parts_that_do_not_fit(llama: Path, tmp_path: Path, method: str, change: dict[str, Any], says: str) -> None:
    folder = packed_folder(llama, tmp_path / "m", method)
    damage(folder, change)
    with pytest.raises(ModelLoadError, match=says):
        load_model(folder)


def test_a_configuration_and_tensors_that_disagree(llama: Path, tmp_path: Path) -> None:
    folder = packed_folder(llama, tmp_path / "m", "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "quantization_config"}))
    with pytest.raises(ModelLoadError, match="lacks"):
        load_model(folder)
    save_file({name: array.astype(np.float16) for name, array in floats_of(llama).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"config.json says that the model is quantized, but no linear is"):
        load_model(folder)


def test_biases_that_tools_add(llama: Path, tmp_path: Path) -> None:
    """Zeros say nothing; a model that has none refuses others."""
    folder = packed_folder(llama, tmp_path / "m", "gptq")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.qweight")).removesuffix("qweight") + "bias"
    save_file(tensors | {name: np.zeros(64, np.float16)}, folder / "model.safetensors")
    assert "layers.0.o.bias" not in load_model(folder).tensors
    save_file(tensors | {name: np.ones(64, np.float16)}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"o_proj.bias is not zero, and LlamaForCausalLM .* has no such bias"):
        load_model(folder)


def test_a_configuration_in_a_file_of_its_own(llama: Path, tmp_path: Path) -> None:
    folder = packed_folder(llama, tmp_path / "m", "gptq")
    stored = load_model(folder).spec.stored
    config = json.loads((folder / "config.json").read_text())
    about = config.pop("quantization_config")
    del about["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(about))
    assert load_model(folder).spec.stored == stored == load_spec(folder).stored

    save_file({name: array.astype(np.float16) for name, array in floats_of(llama).items()}, folder / "model.safetensors")
    assert load_model(folder).spec.stored == load_spec(folder).stored == ()  # left over from another model


def test_inputs_in_order_whatever_the_configuration_says(llama: Path, tmp_path: Path) -> None:
    folder = packed_folder(llama, tmp_path / "m", "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert "int4:32" in {kind for _, kind in load_model(folder).spec.stored}


def test_linears_that_are_not_quantized(llama: Path, tmp_path: Path) -> None:
    """Plan and load go by the tensors."""
    folder = packed_folder(llama, tmp_path / "m", "gptq")
    tensors, plain = load_file(folder / "model.safetensors"), floats_of(llama)
    for name in [name for name in tensors if ".mlp." in name]:
        del tensors[name]
    tensors |= {name: array.astype(np.float16) for name, array in plain.items() if ".mlp." in name}
    save_file(tensors, folder / "model.safetensors")
    stored = dict(load_model(folder).spec.stored)
    assert (stored["layers.0.q"], stored["layers.0.up"]) == ("int4:32", "int8")
    assert dict(load_spec(folder).stored) == stored
    (folder / "model.safetensors").unlink()
    assert dict(load_spec(folder).stored)["layers.0.up"] == "int4:32"  # as far as the configuration tells


@pytest.mark.parametrize("method", ["int-quantized", "float-quantized", "fp8"])
def test_scales_of_activations_say_nothing(llama: Path, tmp_path: Path, method: str) -> None:
    folder = packed_folder(llama, tmp_path / "m", method, bits=8, group=0)
    tensors = raw(folder)
    expected = load_model(folder).tensors["layers.0.q.weight"]
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(("weight_scale", "weight_scale_inv"))}
    extra = {f"{module}.{part}": np.ones(1, np.float32) for module in modules for part in ("input_scale", "activation_scale")}
    if method == "int-quantized":
        extra |= {f"{module}.weight_zero_point": np.zeros((1, 1), np.int8) for module in modules}
    save_file(tensors | extra, folder / "model.safetensors")
    assert np.array_equal(load_model(folder).tensors["layers.0.q.weight"], expected)
    if method == "int-quantized":
        zeros = {name: array + 1 for name, array in extra.items() if name.endswith("zero_point")}
        save_file(tensors | extra | zeros, folder / "model.safetensors")
        with pytest.raises(ModelLoadError, match="zeros of weights in 'int-quantized' are not supported"):
            load_model(folder)


def raw(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of any dtype, float8 too, which the library's numpy does not know."""
    headers = read_headers(folder)
    data = (folder / "model.safetensors").read_bytes()
    dtypes = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "I8": np.int8, "F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}
    return {
        name: np.frombuffer(data[info.offset : info.offset + info.nbytes], dtypes[info.dtype]).reshape(info.shape)
        for name, info in headers.items()
    }


def test_scales_in_bfloat16(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compressed-tensors usually has them; also where ml_dtypes is not installed."""
    folder = packed_folder(llama, tmp_path / "m", "pack-quantized")
    expected, tensors = load_model(folder).tensors["layers.0.q.weight"], raw(folder)
    scales = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items() if name.endswith("weight_scale")}
    save_file(tensors | scales, folder / "model.safetensors")
    found = load_model(folder).tensors["layers.0.q.weight"]
    np.testing.assert_allclose(found, expected, rtol=2**-8)
    assert not np.array_equal(found, expected)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert np.array_equal(load_model(folder).tensors["layers.0.q.weight"], found)


def test_one_scale_by_its_other_name(llama: Path, tmp_path: Path) -> None:
    folder = packed_folder(llama, tmp_path / "m", "fp8-tensor")
    expected, tensors = load_model(folder).tensors["layers.0.q.weight"], raw(folder)
    save_file({name.replace("weight_scale", "weight_scale_inv"): array for name, array in tensors.items()}, folder / "model.safetensors")
    assert np.array_equal(load_model(folder).tensors["layers.0.q.weight"], expected)


def test_blocks_larger_than_the_linear(llama: Path, tmp_path: Path) -> None:
    folder = packed_folder(llama, tmp_path / "m", "fp8-tensor", weight_block_size=[1 << 22, 1 << 22])
    tensors = {name.replace("weight_scale", "weight_scale_inv"): array for name, array in raw(folder).items()}
    save_file({name: a.reshape(1, 1) if name.endswith("_inv") else a for name, a in tensors.items()}, folder / "model.safetensors")
    assert np.isfinite(load_model(folder).tensors["layers.0.q.weight"]).all()


REAL = {
    "Qwen2.5-7B-Instruct-AWQ": {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
                                "zero_point": True},
    "Qwen2.5-7B-Instruct-GPTQ-Int4": {"batch_size": 1, "bits": 4, "damp_percent": 0.01, "desc_act": False, "exllama_config": {"version": 1},
                                      "group_size": 128, "quant_method": "gptq", "sym": True, "true_sequential": True},
    "Llama-3.1-8B-Instruct-quantized.w4a16": {"config_groups": {"group_0": {"input_activations": None, "output_activations": None,
        "targets": ["Linear"], "weights": {"actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 128,
        "num_bits": 4, "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}}},
        "format": "pack-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}},
    "Qwen3-8B-FP8": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "Llama-3.1-8B-Instruct-FP8-dynamic": {"config_groups": {"group_0": {"input_activations": {"dynamic": True, "num_bits": 8,
        "strategy": "token", "symmetric": True, "type": "float"}, "output_activations": None, "targets": ["Linear"], "weights": {
        "dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}}}, "format": "float-quantized",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed"},
}  # fmt: skip
"""What such models on the Hub say, in short."""


@pytest.mark.parametrize("name", REAL)
def test_configurations_as_they_are_published(name: str) -> None:
    spec = spec_from_config(LLAMA | {"hidden_size": 3072, "intermediate_size": 8192, "quantization_config": REAL[name]})
    kind = {"AWQ": "int4:128+offsets", "Int4": "int4:128", "w4a16": "int4:128"}.get(name.rpartition("-")[2].rpartition(".")[2], "int8")
    assert {each for layer, each in spec.stored if layer.startswith("layers")} == {kind}
    assert dict(spec.stored)["lm_head"] == "int8"


def test_the_embedding_is_no_linear(tmp_path: Path) -> None:
    source = resolve_model("embedded")
    folder = packed_folder(source, tmp_path / "m", "gptq")
    tensors = load_file(folder / "model.safetensors")
    one = next(name for name in tensors if name.endswith("q_proj.qweight")).removesuffix(".qweight")
    rows = tensors[name := next(name for name in tensors if "embed" in name)].shape[0]
    del tensors[name]
    for part in ("qweight", "scales", "qzeros", "g_idx"):
        array = tensors[f"{one}.{part}"]
        wide = np.repeat(array, rows // 256, axis=1) if array.ndim == 2 else array
        tensors[f"{name.removesuffix('.weight')}.{part}"] = np.ascontiguousarray(wide)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"embed_tokens.weight, which is looked up, is quantized"):
        load_model(folder)
