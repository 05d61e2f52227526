"""Model folders: what loads, what each view holds, and every message that a broken folder gets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.errors import ModelLoadError
from quire.models.families import find_family
from quire.models.weights import load_model, load_spec, read_headers, resolve_model
from sample_models import GEMMA3_VISION, GPT2, LLAMA, OPT, QWEN3, Tensors, checkpoint, write_model, write_safetensors


def fails(folder: Path | str, *parts: str) -> str:
    """load_model refuses the folder with one sentence that contains every part, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ModelLoadError) as error:
            load_model(folder)
    for part in parts:
        assert part in error.value.message
    return error.value.message


@pytest.mark.parametrize("config", [LLAMA, QWEN3, GPT2, OPT], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", [True, False])
def test_round_trip(tmp_path: Path, config: dict[str, Any], dtype: Any, prefix: bool) -> None:
    tensors = checkpoint(config, dtype, prefix)
    model = load_model(write_model(tmp_path, config, tensors))
    assert model.folder == tmp_path
    assert model.spec.dtype == np.dtype(dtype).name  # what is stored counts, not what config.json says
    assert {name: array.shape for name, array in model.tensors.items()} == model.spec.tensor_shapes()
    assert model.spec.num_parameters() == sum(array.size for array in model.tensors.values())
    family = find_family(config)
    stored = {family.strip(name): array for name, array in tensors.items()}
    for name, source in family.sources(model.spec).items():
        expected = stored[source.name].T if source.transpose else stored[source.name]
        array = model.tensors[name]
        np.testing.assert_array_equal(array, expected[slice(*source.rows)] if source.rows else expected)
        assert array.dtype == dtype
        assert not array.flags.owndata  # a view, nothing copied
        assert not array.flags.writeable
    kept = model.tensors["embed.weight"]
    model.close()
    assert not model.tensors
    assert np.isfinite(kept.astype(np.float32)).all()  # a view outlives close


def test_fused_qkv_of_gpt2(tmp_path: Path) -> None:
    tensors = checkpoint(GPT2)
    model = load_model(write_model(tmp_path, GPT2, tensors))
    fused = tensors["transformer.h.2.attn.c_attn.weight"]
    for n, name in enumerate("qkv"):
        np.testing.assert_array_equal(model.tensors[f"layers.2.{name}.weight"], fused[:, n * 96 : (n + 1) * 96].T)
        np.testing.assert_array_equal(
            model.tensors[f"layers.2.{name}.bias"], tensors["transformer.h.2.attn.c_attn.bias"][n * 96 : (n + 1) * 96]
        )


def test_harmless_buffers_are_left_out(tmp_path: Path) -> None:
    gpt2 = checkpoint(GPT2, prefix=False)
    for i in range(4):
        gpt2[f"h.{i}.attn.bias"] = np.zeros((1, 1, 8, 8), np.float32)
        gpt2[f"h.{i}.attn.masked_bias"] = np.zeros((), np.float32)
    load_model(write_model(tmp_path / "a", GPT2, gpt2))
    llama = checkpoint(LLAMA)
    llama["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float64)  # nor does its dtype matter
    load_model(write_model(tmp_path / "b", LLAMA, llama))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_what_sees_is_left_out(tmp_path: Path, prefix: str) -> None:
    tensors = {name.replace("language_model.model.", prefix): array for name, array in checkpoint(GEMMA3_VISION).items()}
    expected = load_model(write_model(tmp_path / "a", GEMMA3_VISION, tensors))
    outer = prefix.removesuffix("language_model.").removeprefix("language_model.model.")  # where they lie today
    for name in ("vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias", "multi_modal_projector.mm_soft_emb_norm.weight"):
        tensors[outer + name] = np.zeros(3, np.float32)
    found = load_model(write_model(tmp_path / "b", GEMMA3_VISION, tensors))
    assert found.spec == expected.spec
    assert found.tensors.keys() == expected.tensors.keys() == found.spec.tensor_shapes().keys()
    tensors["audio_tower.weight"] = np.zeros(3, np.float32)
    fails(write_model(tmp_path / "c", GEMMA3_VISION, tensors), "audio_tower.weight")


def test_tied(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = checkpoint(config)
    embed = tensors["model.embed_tokens.weight"]
    both = {**tensors, "lm_head.weight": embed}
    assert "lm_head.weight" not in load_model(write_model(tmp_path, config, both)).tensors
    del both["model.embed_tokens.weight"]  # tied tensors are stored once, under either name
    np.testing.assert_array_equal(load_model(write_model(tmp_path, config, both)).tensors["embed.weight"], embed)
    other = embed.copy()
    other[-1, -1] += 1
    fails(write_model(tmp_path, config, {**tensors, "lm_head.weight": other}), "ties lm_head to the embedding", "differs")
    fails(write_model(tmp_path, config, {**tensors, "lm_head.weight": embed[1:]}), "lm_head.weight has the shape [999, 96]", "[1000, 96]")
    fails(write_model(tmp_path, LLAMA, tensors), "lacks 1 tensor (lm_head.weight [1000, 96])")


def test_mixed_dtypes_and_odd_alignment(tmp_path: Path) -> None:
    tensors = checkpoint(LLAMA, ml_dtypes.bfloat16)
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].astype(np.float32)
    write_model(tmp_path, LLAMA, tensors)
    body = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(body[:8], "little")
    text = body[8 : 8 + length] + b" "  # data starts at an odd byte: legal, though no writer does it
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body[8 + length :])
    model = load_model(tmp_path)
    assert model.spec.dtype == "bfloat16"
    assert model.tensors["final_norm.weight"].dtype == np.float32
    for name, array in model.tensors.items():
        assert array.flags.aligned, name
    np.testing.assert_array_equal(model.tensors["final_norm.weight"], tensors["model.norm.weight"])


def shard(folder: Path, config: dict[str, Any]) -> Tensors:
    """A model in two files; returns all of its tensors."""
    tensors = checkpoint(config)
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (folder / "config.json").write_text(json.dumps(config))
    for file, part in parts.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    edit_index(folder, {name: file for file, part in parts.items() for name in part})
    return tensors


def edit_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def resident(file: Path) -> int:
    """Bytes of a mapped file that this process holds in memory."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            size += 1024 * int(line.split()[1])
    return size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what is resident")
def test_released_weights_are_not_resident_and_read_again_when_used(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA, checkpoint(LLAMA, dtype=np.float32))
    model = load_model(tmp_path)
    before = {name: tensor.copy() for name, tensor in model.tensors.items()}
    file = tmp_path / "model.safetensors"
    assert resident(file) >= sum(tensor.nbytes for tensor in before.values())
    model.release()
    assert resident(file) == 0
    assert all(np.array_equal(model.tensors[name], tensor) for name, tensor in before.items())


def test_shards(tmp_path: Path) -> None:
    tensors = shard(tmp_path, LLAMA)
    model = load_model(tmp_path)
    np.testing.assert_array_equal(model.tensors["layers.3.down.weight"], tensors["model.layers.3.mlp.down_proj.weight"])
    headers = read_headers(tmp_path)
    assert headers.keys() == tensors.keys()
    assert headers["model.norm.weight"].shape == (96,)
    assert len({info.file for info in headers.values()}) == 2


def test_broken_shards(tmp_path: Path) -> None:
    shard(tmp_path, LLAMA)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    table = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(iter(table))
    edit_index(tmp_path, {**table, name: second.name})
    fails(tmp_path, f"places the tensor '{name}' in {second.name}")
    edit_index(tmp_path, {**table, "model.more": first.name})
    fails(tmp_path, "places the tensor 'model.more'")
    edit_index(tmp_path, {**table, name: "../model.safetensors"})
    fails(tmp_path, "not a file name in its own folder")
    edit_index(tmp_path, [])
    fails(tmp_path, "has no 'weight_map'")
    edit_index(tmp_path, table)
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    fails(tmp_path, "is both in", first.name, second.name)
    second.write_bytes(whole[:-100])
    fails(tmp_path, second.name, "is cut short", f"describes {len(whole)} bytes, the file has {len(whole) - 100}")
    second.unlink()
    fails(tmp_path, f"{second} is missing", "expects 19 tensors in it")


def edit(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


NORM = "model.norm.weight"
MALFORMED: list[tuple[dict[str, Any], list[str]]] = [
    ({"cut": 4}, ["is cut short", "download it again"]),
    ({"pad": 4}, ["bytes, but its header describes only"]),
    ({"change": edit(NORM, shape=[97])}, ["F32 [97], needs 388 bytes but has 384"]),
    ({"change": edit(NORM, shape=[-96])}, ["shape [-96]"]),
    ({"change": edit(NORM, shape=96)}, ["shape 96"]),
    ({"change": edit(NORM, shape=[True])}, ["shape [True]"]),
    ({"change": edit(NORM, shape=[1 << 60])}, ["shape [1152921504606846976]"]),
    ({"change": edit(NORM, dtype="F33")}, ["unknown dtype 'F33'"]),
    ({"change": edit(NORM, data_offsets=[8, 4])}, ["data_offsets [8, 4]"]),
    ({"change": edit(NORM, data_offsets=[0, 384])}, ["starts at byte"]),
    ({"change": edit(NORM, data_offsets=[1 << 40, (1 << 40) + 384])}, ["starts at byte"]),
    ({"change": lambda header: header[NORM].pop("dtype")}, ["lacks dtype, shape or data_offsets"]),
    ({"change": lambda header: header.update({NORM: 3})}, ["lacks dtype, shape or data_offsets"]),
]


@pytest.mark.parametrize(("broken", "parts"), MALFORMED, ids=lambda v: v[0] if isinstance(v, list) else None)
def test_malformed_file(tmp_path: Path, broken: dict[str, Any], parts: list[str]) -> None:
    write_model(tmp_path, LLAMA)
    file = tmp_path / "model.safetensors"
    write_safetensors(file, checkpoint(LLAMA), **broken)
    assert fails(tmp_path, *parts).startswith(str(file))


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "has 0 bytes"),
        (b"\x08\0\0", "has 3 bytes"),
        (b"\xff" * 64, "is not a safetensors file"),
        (b"\x40\0\0\0\0\0\0\0{}", "is cut short: its header ends at byte 72, the file at byte 10"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a JSON object"),
        (b"\x02\0\0\0\0\0\0\0{'", "has a malformed header"),
        (b"\x02\0\0\0\0\0\0\0\xff\xfe", "has a malformed header"),
        (b'\x0f\0\0\0\0\0\0\0{"a":1, "a": 2}', "'a' is there twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x02\0\0\0\0\0\0\0{}", "lacks 39 tensors (embed_tokens.weight [1000, 96], layers.0"),
    ],
)
def test_not_safetensors(tmp_path: Path, body: bytes, part: str) -> None:
    write_model(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").write_bytes(body)
    fails(tmp_path, part)


def test_wrong_tensors(tmp_path: Path) -> None:
    tensors = checkpoint(LLAMA)
    less = {name: array for name, array in tensors.items() if "mlp" not in name}
    fails(
        write_model(tmp_path, LLAMA, less), "lacks 12 tensors (layers.0.mlp.gate_proj.weight [200, 96]", "and 8 more)", "LlamaForCausalLM"
    )
    more = {**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(96, np.float32)}
    fails(write_model(tmp_path, LLAMA, more), "has 1 tensor (layers.0.self_attn.q_proj.bias [96] (model.safetensors))", "does not have")
    name = "model.layers.0.mlp.up_proj.weight"
    fails(
        write_model(tmp_path, LLAMA, {**tensors, name: tensors[name].T.copy()}),
        "mlp.up_proj.weight has the shape [96, 200]",
        "asks for [200, 96]",
    )
    fails(write_model(tmp_path, LLAMA, {**tensors, name: tensors[name].astype(np.float64)}), "has the dtype F64; supported: F32, F16, BF16")
    fails(write_model(tmp_path, LLAMA, {**tensors, "norm.weight": tensors[NORM]}), "'norm.weight' is there twice")
    gpt2 = checkpoint(GPT2)
    name = "transformer.h.0.attn.c_attn.weight"
    fails(
        write_model(tmp_path, GPT2, {**gpt2, name: gpt2[name][:, :-1]}),
        "c_attn.weight has the shape [96, 287], config.json asks for [96, 288]",
    )


def test_broken_folders(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "there is no folder or file", "nowhere", "'embedded'")
    fails(tmp_path, "has no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(tmp_path, "adapter: merge it")
    config = tmp_path / "config.json"
    config.write_text("{")
    fails(tmp_path, str(config), "is not valid JSON")
    config.write_bytes(b"\xff")
    fails(tmp_path, "is not valid JSON")
    config.write_text("[]")
    fails(tmp_path, "is not a JSON object")
    config.write_text(json.dumps({**LLAMA, "hidden_act": "swoosh"}))
    fails(tmp_path, str(config), "hidden_act 'swoosh'")
    config.write_text(json.dumps(LLAMA))
    fails(tmp_path, "has neither model.safetensors nor")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    fails(tmp_path, "has neither", "found: model.gguf")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    fails(tmp_path, "pytorch_model.bin", "never loaded", "save_pretrained")
    (tmp_path / "generation_config.json").write_text("nope")
    fails(tmp_path, "generation_config.json is not valid JSON")
    fails(tmp_path / "pytorch_model.bin", "is a file and no GGUF: give the folder")


def test_resolve_and_spec_alone(tmp_path: Path) -> None:
    assert resolve_model("embedded").name == "embedded"
    assert (resolve_model("embedded") / "__init__.py").exists()
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    spec = load_spec(tmp_path)  # no weights needed
    assert (spec.dtype, spec.eos_token_ids) == ("bfloat16", (9, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_files_of_the_reference_writer(tmp_path: Path, dtype: Any) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = checkpoint(LLAMA, dtype)
    write_model(tmp_path, LLAMA)
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(load_model(tmp_path).tensors["layers.0.k.weight"], tensors["model.layers.0.self_attn.k_proj.weight"])
    write_model(tmp_path, LLAMA, tensors)
    assert safetensors.load_file(tmp_path / "model.safetensors").keys() == tensors.keys()  # and it reads ours
