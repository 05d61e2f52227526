"""GGUF files: the same model as the folder that llama.cpp converted, and a message for whatever is wrong.

fixtures/gguf holds the models of fixtures/golden (but OPT's, which llama.cpp does not have) as llama.cpp's own converter wrote them
(convert_hf_to_gguf.py of llama-cpp-python 0.3.36, each in the width of its weights, with a made-up vocabulary).
"""

from __future__ import annotations

import os
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quire.config import EngineConfig, model_name
from quire.errors import ConfigError, ModelLoadError
from quire.gguf import TYPES, read_gguf
from quire.models.families import spec_from_config
from quire.models.families.gguf import ARCHITECTURES, config_of
from quire.models.spec import TransformerSpec
from quire.models.weights import load_model, load_spec, resolve_model, weight_files
from sample_gguf import TOKENS, tiny_fields, tiny_tensors, tokenizer_fields, write_gguf

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONVERTED = sorted((FIXTURES / "gguf").glob("*.gguf"))
# What the format, or the converter, does not keep: windows of Llama's relatives, which layers rotate, a context, and Mistral's own name.
LOST = {
    "mistral-window": {"architecture": "LlamaForCausalLM", "windows": ()},
    "qwen2-windows": {"windows": ()},
    "starcoder2": {"windows": ()},
    "smollm3": {"ropes": ()},
    "glm": {"max_positions": 24},  # the converter knows older names of the field, and else takes the width
}


def fails(path: Path, *parts: str) -> None:
    """Neither spec nor weights come of it, and the message has all parts."""
    with pytest.raises(ModelLoadError) as error:
        load_model(path)
    for part in parts:
        assert part in error.value.message


@pytest.mark.parametrize("path", CONVERTED, ids=lambda path: path.stem)
def test_the_same_model_as_before_it_was_converted(path: Path) -> None:
    before, after = load_model(FIXTURES / "golden" / path.stem), load_model(path)
    expected = replace(before.spec, bos_token_id=1, eos_token_ids=(2, 3), sampling_defaults=(), **LOST.get(path.stem, {}))
    if expected.rope is not None:
        assert after.spec.rope is not None
        found, wanted = after.spec.rope.inverse_frequencies(256), expected.rope.inverse_frequencies(256)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert after.spec.rope.magnitude == pytest.approx(expected.rope.magnitude, rel=1e-6)
        ropes = tuple(after.spec.rope if each == expected.rope else each for each in expected.ropes)
        expected = replace(expected, rope=after.spec.rope, ropes=ropes, norm_offset=0.0)  # what norms lack has been added
    for field in fields(expected):
        value, wanted = getattr(after.spec, field.name), getattr(expected, field.name)
        assert value == (pytest.approx(wanted, rel=1e-6) if isinstance(wanted, float) else wanted), field.name
    assert after.spec == load_spec(path)
    assert dict.fromkeys(after.tensors) == dict.fromkeys(before.tensors)
    for name, array in before.tensors.items():
        wanted = array.astype(np.float32) + (before.spec.norm_offset if name.endswith("norm.weight") else 0)
        np.testing.assert_array_equal(after.tensors[name].astype(np.float32), wanted, err_msg=name)
    assert after.nbytes == sum(array.nbytes for array in after.tensors.values())


def test_every_architecture_was_converted() -> None:
    assert {read_gguf(path).architecture for path in CONVERTED} == set(ARCHITECTURES)


def test_table_of_types() -> None:
    for kind, (name, values, nbytes) in TYPES.items():
        assert gguf.GGMLQuantizationType(kind).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (values, nbytes)


@pytest.mark.parametrize(("kind", "quantized", "dtype"), [
    ("F32", "", "float32"), ("F16", "", "float16"), ("BF16", "", "bfloat16"), ("Q4_0", "stored", "float16"), ("Q8_0", "int8", "float16"),
    ("Q5_1", "int8", "float16"),
])  # fmt: skip
def test_widths(tmp_path: Path, kind: str, quantized: str, dtype: str) -> None:
    tensors = tiny_tensors()
    model = load_model(write_gguf(tmp_path / "a.gguf", tiny_fields(), tensors, kind))
    assert (model.spec.quantized, model.spec.dtype) == (quantized, dtype)
    assert model.nbytes == sum(array.nbytes for array in model.tensors.values())
    type_ = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.dequantize(gguf.quants.quantize(tensors["blk.1.ffn_down.weight"], type_), type_)
    found = model.tensors["layers.1.down.weight"]
    np.testing.assert_array_equal(found, stored.astype(found.dtype))
    # q and k are put back into the order of half-split rotation: head 1, dimension 3 was row 16 + 2 * 3.
    rows = gguf.quants.dequantize(gguf.quants.quantize(tensors["blk.0.attn_q.weight"], type_), type_)
    np.testing.assert_array_equal(model.tensors["layers.0.q.weight"][16 + 3], rows[16 + 6].astype(found.dtype))
    np.testing.assert_array_equal(model.tensors["layers.0.q.weight"][16 + 8 + 3], rows[16 + 7].astype(found.dtype))
    model.release()
    np.testing.assert_array_equal(model.tensors["layers.1.down.weight"], found)


def test_what_a_quantized_file_is_packed_as() -> None:
    plain = EngineConfig()
    assert plain.as_stored("").quantize is None
    assert plain.as_stored("int8").quantize == "int8"
    assert EngineConfig(quantize="none").as_stored("int8").quantize is None
    assert EngineConfig(quantize="int4").as_stored("int8").quantize == "int4"
    assert plain.as_stored("stored").quantize == EngineConfig(quantize="stored").as_stored("stored").quantize == "stored"
    assert EngineConfig(quantize="stored").as_stored("int8").quantize == "int8"
    assert EngineConfig(device="torch-cpu").as_stored("stored").quantize is None  # a GPU computes in floats unless it is told
    assert EngineConfig(group_size=64, cache_dir="x").as_stored("int8").group_size == 64
    with pytest.raises(ConfigError, match="--group-size 32 is for quantized weights"):
        EngineConfig(group_size=32, quantize="none").as_stored("int8")


def test_fields(tmp_path: Path) -> None:
    """End-of-text ids, sampling defaults, a context, a head's size; numbers as their authors wrote them."""
    more = {
        "general__sampling__temp": 0.6,
        "general__sampling__top_k": 20,
        "tokenizer__ggml__eot_token_id": 5,
        "llama__attention__key_length": 16,
    }
    spec = load_spec(write_gguf(tmp_path / "a.gguf", tiny_fields(**more), tiny_tensors()))
    assert spec.eos_token_ids == (2, 5, 3)  # what the file names first, then by their texts: <|im_end|>
    assert dict(spec.sampling_defaults) == {"temperature": 0.6, "top_k": 20}
    assert (spec.norm_eps, spec.head_dim, spec.max_positions, spec.tied) == (1e-05, 16, 128, False)
    for types, ends in ((None, (2, 3)), ([2, 3, 3, 4] + [1] * 28, (2, 3)), ([2, 3, 3, 1] + [1] * 28, (2,))):
        fields = tiny_fields(tokenizer__ggml__token_type=types, tokenizer__ggml__eos_token_ids=[2])
        assert load_spec(write_gguf(tmp_path / "d.gguf", fields, tiny_tensors())).eos_token_ids == ends
    tokens = [{5: "<|return|>", 6: "<|call|>", 7: "<|end|>"}.get(i, token) for i, token in enumerate(TOKENS)]
    for names, ends in ((tokens, (5, 2, 3, 6)), ([*tokens[:6], "<|x|>", *tokens[7:]], (5, 2, 3, 7))):  # gpt-oss goes on after <|end|>
        more = {"tokenizer__ggml__tokens": names, "tokenizer__ggml__eos_token_id": 5, "tokenizer__ggml__token_type": [3] * len(TOKENS)}
        assert load_spec(write_gguf(tmp_path / "e.gguf", tiny_fields(**more), tiny_tensors())).eos_token_ids == ends
    old = load_spec(write_gguf(tmp_path / "c.gguf", tiny_fields(llama__rope__scale_linear=4.0), tiny_tensors()))
    assert old.rope is not None
    assert (old.rope.scaling, old.rope.factor) == ("linear", 4.0)
    tensors = tiny_tensors()
    del tensors["output.weight"]
    assert load_spec(write_gguf(tmp_path / "b.gguf", tiny_fields(), tensors)).tied


def test_several_parts(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_fields(), tiny_tensors(), split_max_tensors=8)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = load_model(write_gguf(tmp_path / "whole", tiny_fields(), tiny_tensors()))
    model = load_model(parts[0])
    assert all(np.array_equal(model.tensors[name], array) for name, array in whole.tensors.items())
    assert weight_files(parts[0]) == parts
    assert model_name(parts[0]) == "m"
    merged = write_gguf(tmp_path / "merged.gguf", tiny_fields(split__count=0), tiny_tensors())  # as llama-gguf-split --merge leaves it
    assert load_spec(merged) == whole.spec
    merged.unlink()
    fails(parts[1], "is part 2 of 3: give the first one, m-00001-of-00003.gguf")
    parts[2].rename(tmp_path / "elsewhere")
    fails(parts[0], "m-00003-of-00003.gguf is missing", "of 3 parts")
    (tmp_path / "elsewhere").unlink()
    parts[0].rename(tmp_path / "renamed.gguf")
    fails(tmp_path / "renamed.gguf", "one of 3 parts, which must be called NAME-00001-of-00003.gguf")


def test_where_a_file_is_found(tmp_path: Path) -> None:
    """By its name, whatever that is, or in a folder that holds nothing else."""
    file = write_gguf(tmp_path / "sha256-0123", tiny_fields(), tiny_tensors())
    assert resolve_model(file) == file
    assert model_name(file) == "sha256-0123"
    folder = tmp_path / "folder"
    folder.mkdir()
    fails(folder, "has no config.json")
    inside = folder / "a.Q4_K_M.gguf"
    file.rename(inside)
    assert resolve_model(folder) == inside
    assert model_name(inside) == "a.Q4_K_M"
    assert load_spec(folder) == load_spec(inside)
    (folder / "b.gguf").write_bytes(inside.read_bytes())
    fails(folder, "holds 2 GGUF files (a.Q4_K_M.gguf, b.gguf): give one of them")
    os.mkfifo(tmp_path / "pipe.gguf")
    fails(tmp_path / "pipe.gguf", "is a file and no GGUF")  # at once, and not when somebody writes to it
    (tmp_path / "text").write_text("no")
    fails(tmp_path / "text", "is a file and no GGUF")


def test_what_gemma3_is_known_to_do(tmp_path: Path) -> None:
    def read(**changes: Any) -> TransformerSpec:
        path = write_gguf(
            tmp_path / "a.gguf", tiny_fields("gemma3", **changes), {"token_embd.weight": np.zeros((len(TOKENS), 64), np.float32)}
        )
        return spec_from_config(*config_of(read_gguf(path), {}))

    seven = {"gemma3__block_count": 7, "gemma3__attention__sliding_window": 32}
    spec = read(**seven)
    assert spec.windows == (32,) * 5 + (0, 32)
    assert spec.tied
    assert [rope.theta for rope in spec.ropes if rope] == [1e4] * 5 + [5e3, 1e4]
    found = read(**seven, gemma3__attention__sliding_window_pattern=[True, False] * 3 + [True], gemma3__rope__freq_base_swa=500.0)
    assert found.windows == (32, 0) * 3 + (32,)
    assert [rope.theta for rope in found.ropes if rope] == [500.0, 5e3] * 3 + [500.0]
    assert read(**seven, gemma3__attention__sliding_window_pattern=2).windows == (32, 0) * 3 + (32,)
    whole = read(gemma3__block_count=7)  # no window: of no layer
    assert (whole.windows, {rope.theta for rope in whole.ropes if rope}) == ((), {5e3})
    assert spec.scale == 16**-0.5
    assert read(gemma3__block_count=62).scale == (64 // 4) ** -0.5
    assert read(gemma3__block_count=62, gemma3__attention__key_length=8, gemma3__rope__dimension_count=8).scale == (64 // 4) ** -0.5
    for odd in ("seven", 0, 2**32 - 1):
        with pytest.raises(ModelLoadError, match="'num_hidden_layers' must be an integer"):
            read(gemma3__block_count=odd)
    assert read(**seven, gemma3__final_logit_softcapping=30.0).logit_softcap == 30.0


@pytest.mark.parametrize("name", ["glm", "ernie", "llama-biases-linear"])
def test_q_k_and_v_as_one(tmp_path: Path, name: str) -> None:
    """As in files of ChatGLM and the first GLM-4, and wherever the converter was told to: the order of q and k is within."""
    path = FIXTURES / "gguf" / f"{name}.gguf"
    tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}
    for i in range(2):
        for parameter in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{i}.attn_{part}.{parameter}") for part in "qkv"]
            tensors[f"blk.{i}.attn_qkv.{parameter}"] = np.concatenate(parts)
    expected, found = load_model(path), load_model(write_gguf(tmp_path / "a.gguf", read_gguf(path).fields, tensors))
    assert replace(found.spec, dtype=expected.spec.dtype) == expected.spec
    for tensor, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[tensor], array.astype(np.float32), err_msg=tensor)


@pytest.mark.parametrize(("changes", "parts"), [
    ({"general__architecture": "mamba"}, ["the architecture 'mamba'; supported: ", "gemma3, ", "gpt2, granite, "]),
    ({"general__architecture": "clip", "general__type": "mmproj"}, ["not a language model but of the type 'mmproj'"]),
    ({"llama__block_count": None}, ["a.gguf", "has no field llama.block_count"]),
    ({"llama__block_count": 3}, ["lacks 9 tensors (blk.2.attn_norm.weight [64]"]),
    ({"llama__attention__head_count_kv": [2, 1]}, ["layers that differ in llama.attention.head_count_kv ([2, 1])"]),
    ({"llama__attention__head_count": "four"}, ["'num_attention_heads' must be an integer"]),
    ({"llama__attention__head_count": 0}, ["'num_attention_heads' must be an integer from 1"]),
    ({"llama__embedding_length": 96, "llama__rope__dimension_count": 24}, ["shape", "ask for"]),
    ({"llama__rope__dimension_count": 8}, ["rotates 8 of 16 dimensions"]),
    ({"llama__rope__scaling__type": "su"}, ["the rope type 'su'", "supported: linear, yarn"]),
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": -1.0}, ["'factor' must be a number above 0"]),
    ({"llama__attention__layer_norm_rms_epsilon": None}, ["has no field llama.attention.layer_norm_rms_epsilon"]),
    ({"llama__rope__scaling__attn_factor": 1.2}, ["attn_factor without the factors"]),
    ({"llama__odd": [1] * ((1 << 22) + 1)}, ["has 4,194,305 entries in 'llama.odd', and at most 4,194,304 are read"]),
    ({"llama__expert_count": 8}, ["has no field llama.expert_used_count"]),
    ({"llama__expert_count": 8, "llama__expert_used_count": 9}, ["'num_experts_per_tok' 9 is more than the 8 experts"]),
    ({"llama__expert_count": 8, "llama__expert_used_count": 2}, ["lacks 8 tensors (blk.0.ffn_gate_inp.weight [8, 64]"]),
    ({"llama__expert_count": 8, "llama__expert_used_count": 2, "llama__expert_gating_func": 2}, ["llama.expert_gating_func 2, which"]),
    ({"llama__expert_count": 8, "llama__expert_used_count": 2, "llama__expert_shared_count": 1}, ["llama.expert_shared_count 1, which"]),
    ({"general__architecture": "qwen3", "qwen3__expert_count": 8}, ["is a mixture of 8 experts, which is not supported for qwen3"]),
    ({"llama__rope__dimension_sections": [4, 2, 2, 0]}, ["rotates by positions in a picture (llama.rope.dimension_sections [4, 2, 2, 0])"]),
    ({"general__architecture": "qwen3moe", "qwen3moe__expert_count": 8, "qwen3moe__expert_group_count": 4}, ["group_count 4, which"]),
    ({"llama__attention__causal": False}, ["sees what comes after a token"]),
    ({"llama__attention__value_length": 8, "llama__attention__key_length": 16}, ["keys of 16 and values of 8"]),
    ({"general__sampling__temp": -1.0}, ["temperature"]),
])  # fmt: skip
def test_wrong_fields(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    fails(write_gguf(tmp_path / "a.gguf", tiny_fields(**changes), tiny_tensors()), *parts)


@pytest.mark.parametrize(("name", "changes", "part"), [
    ("glm4moe", {"expert_gating_func": 1}, "expert_gating_func 1, which is not supported"),
    ("glm4moe", {"expert_group_count": 2}, "expert_group_count 2, which is not supported"),
    ("glm4moe", {"nextn_predict_layers": 2}, "has 2 layers that guess further tokens, where 0 or 1 are supported"),
    ("glm4moe", {"rope.dimension_sections": [8, 8, 8, 0]}, "rotates by positions in a picture"),
    ("glm4moe", {"expert_shared_count": 0}, "'n_shared_experts' must be an integer from 1"),
    ("glm4moe", {"expert_shared_count": 2}, "blk.1.ffn_gate_shexp.weight of the shape [16, 24], and its fields ask for [32, 24]"),
    ("glm4moe", {"leading_dense_block_count": 2}, "lacks 3 tensors (blk.1.ffn_gate.weight"),
    ("dots1", {"expert_gating_func": 1}, "expert_gating_func 1, which is not supported"),
    ("ernie4_5-moe", {"expert_gating_func": 2}, "expert_gating_func 2, which is not supported"),
    ("ernie4_5-moe", {"expert_weights_scale": 2.0}, "expert_weights_scale 2.0, which is not supported"),
    ("ernie4_5-moe", {"interleave_moe_layer_step": 0}, "'moe_layer_interval' must be an integer from 1"),
])  # fmt: skip
def test_mixtures_that_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], part: str) -> None:
    fields, tensors = converted(name)
    fails(write_gguf(tmp_path / "a.gguf", fields | {f"{name}.{field}": value for field, value in changes.items()}, tensors), part)


def test_what_is_left_out_of_mixtures(tmp_path: Path) -> None:
    """A layer that guesses further tokens; and a correction may have lost an axis of one, as llama.cpp's tools write it."""
    fields, tensors = converted("glm4moe")
    assert fields["glm4moe.block_count"] == 4
    expected = load_model(write_gguf(tmp_path / "a.gguf", fields, tensors))
    more = {f"blk.3.{part}.weight": np.zeros((4, 4), np.float32) for part in ("nextn.eh_proj", "attn_q")}
    assert load_model(write_gguf(tmp_path / "b.gguf", fields, tensors | more)).spec == expected.spec
    fails(write_gguf(tmp_path / "c.gguf", fields | {"glm4moe.nextn_predict_layers": 0}, tensors | more), "blk.3.attn_norm.weight")
    fields, tensors = converted("ernie4_5-moe")
    flat = {name: tensor[0] if "exp_probs_b" in name else tensor for name, tensor in tensors.items()}
    assert [flat[name].shape for name in flat if "exp_probs_b" in name] == [(5,), (5,)]
    found = [load_model(write_gguf(tmp_path / f"{i}.gguf", fields, each)).tensors for i, each in enumerate((tensors, flat))]
    for name in ("layers.1.correction.bias", "layers.2.correction.bias"):
        np.testing.assert_array_equal(found[0][name], found[1][name])


def converted(architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors of a fixture, in float32."""
    path = next(path for path in CONVERTED if read_gguf(path).architecture == architecture)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def test_wrong_tensors(tmp_path: Path) -> None:
    good, path = tiny_tensors(), tmp_path / "a.gguf"
    fails(write_gguf(path, tiny_fields(), {}), "has no token_embd.weight: it holds a tokenizer")
    fails(write_gguf(path, tiny_fields(), good | {"blk.0.ffn_gate_inp.weight": good["output_norm.weight"]}),
          "has 1 tensor (blk.0.ffn_gate_inp.weight [64]) that the architecture llama does not have")  # fmt: skip
    fails(write_gguf(path, tiny_fields(), good | {"output_norm.weight": np.zeros(64, np.int32)}), "output_norm.weight in the type I32")
    fails(write_gguf(path, tiny_fields(), good | {"rope_freqs.weight": np.zeros(8, np.float32)}), "a factor in rope_freqs.weight")
    fails(write_gguf(path, tiny_fields(), good | {"rope_freqs.weight": np.ones(5, np.float32)}), "5 factors", "8 frequencies")
    fails(write_gguf(path, tiny_fields(), good | {"output.weight": good["output.weight"][:, :32].copy()}), "output.weight of the shape")


def test_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    whole = write_gguf(path, tiny_fields(), tiny_tensors()).read_bytes()
    for length, part in ((0, "no GGUF"), (3, "no GGUF"), (20, "is cut short"), (300, "is cut short"), (len(whole) - 1, "is cut short")):
        path.write_bytes(whole[:length])
        fails(path, part)
    path.write_bytes(whole[:4] + b"\0\0\0\3" + whole[8:])
    fails(path, "is big endian")
    path.write_bytes(whole[:4] + b"\1\0\0\0" + whole[8:])
    fails(path, "is of version 1")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelLoadError, match="is a Git LFS pointer"):
        read_gguf(path)


def test_any_damage_is_a_message(tmp_path: Path) -> None:
    """Bytes changed anywhere in the header, or cut off: a ModelLoadError or a model, never another exception, and soon."""
    path, rng = tmp_path / "a.gguf", random.Random(0)
    whole = write_gguf(path, tiny_fields(), tiny_tensors(), "Q8_0").read_bytes()
    header = whole.index(b"blk.1.ffn_up.weight") + 100
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            damaged[rng.randrange(header)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            load_model(path) if damaged[:4] == b"GGUF" else resolve_model(path)
        except ModelLoadError:
            refused += 1
    assert refused > 500


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama", **tokenizer_fields()}, {})
    fails(path, "it holds a tokenizer")
    assert read_gguf(path).fields["tokenizer.ggml.tokens"] == TOKENS
