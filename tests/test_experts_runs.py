"""Mixtures of experts from files of all kinds, as a user runs them on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sample_models
from quire.backends.cpu import _native as native
from quire.backends.cpu.backend import CpuBackend
from quire.backends.memory import step_buffer_bytes
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork, StepPlan
from quire.errors import ModelLoadError
from quire.models.quantization import planned_cost
from quire.models.spec import ModelCost
from quire.models.weights import load_model, load_spec
from quire.sampling_params import SamplingParams
from sample_gguf import TOKENS, tokenizer_fields, write_gguf
from sample_packed import packed_folder

MIXTRAL = {**sample_models.MIXTRAL, "hidden_size": 192, "num_attention_heads": 6}
GLM4_MOE = {**sample_models.GLM4_MOE, "hidden_size": 192, "intermediate_size": 384, "moe_intermediate_size": 192, "n_shared_experts": 2}
ERNIE_MOE = {**sample_models.ERNIE_MOE, "hidden_size": 192, "intermediate_size": 384, "moe_intermediate_size": 192}
PROMPT = np.random.default_rng(1).integers(3, 30, 25).tolist()


def written(folder: Path, config: dict[str, Any]) -> Path:
    rng = np.random.default_rng(3)
    tensors = {name: (0.2 * rng.standard_normal(t.shape)).astype(np.float32) for name, t in sample_models.checkpoint(config).items()}
    return sample_models.write_model(folder, config, tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("experts") / "mixtral", MIXTRAL)


@pytest.fixture(scope="module", params=[MIXTRAL, GLM4_MOE, ERNIE_MOE], ids=lambda config: config["model_type"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also with experts that all positions take, and layers without any."""
    return written(tmp_path_factory.mktemp("each") / "model", request.param)


def opened(model: Path, **options: Any) -> CpuBackend:
    return CpuBackend.open(EngineConfig(model=str(model), kv_memory="8MiB", max_model_len=64, **options))


def tokens(backend: CpuBackend, count: int = 12) -> list[int]:
    """Greedy ones, a step each."""
    params = SamplingParams(temperature=0)
    table = list(range(4))
    start = RowStart(0, PROMPT, len(PROMPT), params, 0, ())
    found = list(backend.execute(StepPlan(starts=[start], work=[RowWork(0, 0, len(PROMPT), table, True)])).tokens)
    for i in range(1, count):
        work = RowWork(0, len(PROMPT) + i - 1, 1, [], True)
        found += list(backend.execute(StepPlan(work=[work])).tokens)
    return [int(token) for token in found]


def kinds(backend: CpuBackend) -> set[str]:
    return {layer.mlp.experts.dtype for layer in backend.decoder.layers}


@pytest.mark.parametrize(("method", "options", "kind"), [
    ("awq", {"group": 64}, "int4"), ("gptq", {"group": 64}, "int4"), ("pack-quantized", {"group": 64}, "int4"),
    ("int-quantized", {"bits": 8, "group": 0}, "int8"), ("float-quantized", {"bits": 8, "group": 0}, "int8"), ("fp8", {"bits": 8}, "int8"),
])  # fmt: skip
def test_checkpoints_that_are_quantized(folder: Path, tmp_path: Path, method: str, options: dict[str, Any], kind: str) -> None:
    """Routers are not, as in the files of Qwen3-30B-A3B; experts are what the file has."""
    packed = packed_folder(folder, tmp_path / method, method, **options)
    backend = opened(packed)
    assert kinds(backend) == {kind}
    assert {part.dtype for layer in backend.decoder.layers for part in layer.mlp.router.parts} == {"float16"}
    floats = tokens(opened(packed, quantize="none", dtype="float32"))  # of the same numbers; rounded activations differ
    assert sum(a == b for a, b in zip(tokens(backend), floats, strict=True)) >= 2


@pytest.mark.parametrize(("method", "options"), [("awq", {"group": 64}), ("fp8", {"bits": 8})])
def test_rows_that_are_put_into_order(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Of a checkpoint that is quantized as well: numbers, and blocks of 4 bits."""
    plain = written(tmp_path / "plain", ERNIE_MOE)
    packed = packed_folder(plain, tmp_path / method, method, **options)
    expected, model = load_model(plain), load_model(packed)
    for name in ("layers.0.q.weight", "layers.2.k.weight", "layers.2.shared.up.weight"):
        wanted = expected.tensors[name]
        assert np.abs(model.tensors[name].astype(np.float32) - wanted).max() < 0.1 * np.abs(wanted).max(), name
    backend = opened(packed)
    assert {part.dtype for layer in backend.decoder.layers for part in layer.qkv.parts} == {"int4" if method == "awq" else "int8"}
    floats = tokens(opened(packed, quantize="none", dtype="float32"))
    assert sum(a == b for a, b in zip(tokens(backend), floats, strict=True)) >= 2


def test_layers_that_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    plain = written(tmp_path / "plain", GLM4_MOE)
    tensors = {name: t.astype(np.float32) for name, t in sample_models.checkpoint(GLM4_MOE).items()}
    more = {name.replace(".3.", ".4."): t for name, t in tensors.items() if ".layers.3." in name}
    more |= {f"model.layers.4.{name}": np.zeros(3, np.float32) for name in ("enorm.weight", "shared_head.norm.weight")}
    folder = sample_models.write_model(tmp_path / "more", GLM4_MOE, tensors | more)
    with pytest.raises(ModelLoadError, match=r"tensors .*layers\.4\..* that Glm4MoeForCausalLM with"):
        load_model(folder)  # it might be a layer that config.json has forgotten
    folder = sample_models.write_model(tmp_path / "more", GLM4_MOE, tensors | more | {"model.layers.4.eh_proj.weight": np.zeros((2, 4))})
    assert load_model(folder).tensors.keys() == load_model(plain).tensors.keys()


def test_formats_of_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    found = [tokens(opened(packed_folder(folder, tmp_path / name, name, group=64))) for name in ("awq", "gptq-v2")]
    assert found[0] == found[1]


def test_experts_of_two_kinds_become_int8(folder: Path, tmp_path: Path) -> None:
    """Where one of them lacks the zeros that others have, its groups are of another kind."""
    packed = packed_folder(folder, tmp_path / "mixed", "pack-quantized", group=64, symmetric=False)
    model = load_model(packed)
    assert len({kind for name, kind in model.spec.stored if ".experts." in name}) == 1
    from safetensors.numpy import load_file, save_file

    stored = load_file(packed / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight_zero_point"
    stored[name] = np.full_like(stored[name], np.int32(-2004318072))  # 8 in each of the words' halves of bytes: the middle
    save_file(stored, packed / "model.safetensors")
    backend = opened(packed)
    assert [layer.mlp.experts.dtype for layer in backend.decoder.layers] == ["int4", "int8", "int4", "int4"]
    assert len(tokens(backend)) == 12


@pytest.mark.parametrize(("quantize_to", "group"), [("int8", None), ("int4", 32)])
def test_the_second_start_maps_what_the_first_packed(folder: Path, tmp_path: Path, quantize_to: str, group: int | None) -> None:
    options: dict[str, Any] = {"quantize": quantize_to, "group_size": group, "cache_dir": str(tmp_path)}
    first = opened(folder, **options)
    assert len(list(tmp_path.glob("*.packed"))) == 1
    second = opened(folder, **options)
    assert tokens(first) == tokens(second) == tokens(opened(folder, quantize=quantize_to, group_size=group))
    assert first.weight_bytes() == second.weight_bytes()


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    """All experts of a layer are one tensor of three axes there."""
    rng, h, f, q, kv, count = np.random.default_rng(0), 64, 96, 64, 32, 5
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), h),
        "output_norm.weight": (h,),
        "output.weight": (len(TOKENS), h),
    }
    for i in range(2):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in {
            "attn_norm": (h,), "ffn_norm": (h,), "attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, q),
            "ffn_gate_inp": (count, h), "ffn_gate_exps": (count, f, h), "ffn_up_exps": (count, f, h), "ffn_down_exps": (count, h, f),
        }.items()}  # fmt: skip
    fields = {
        "general.architecture": "qwen3moe", "qwen3moe.block_count": 2, "qwen3moe.context_length": 512, "qwen3moe.embedding_length": h,
        "qwen3moe.feed_forward_length": 128, "qwen3moe.expert_feed_forward_length": f, "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2, "qwen3moe.attention.key_length": 16, "qwen3moe.attention.value_length": 16,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6, "qwen3moe.rope.freq_base": 1e4, "qwen3moe.expert_count": count,
        "qwen3moe.expert_used_count": 2, **tokenizer_fields(),
    }  # fmt: skip
    shapes |= {f"blk.{i}.attn_{part}_norm.weight": (16,) for i in range(2) for part in "qk"}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    floats = write_gguf(tmp_path / "floats.gguf", fields, tensors)
    file = write_gguf(tmp_path / "experts.gguf", fields, tensors, other={f"ffn_{part}_exps": kind for part in ("gate", "up", "down")})
    model = load_model(file)
    assert model.spec == load_spec(file)
    assert dict(model.spec.stored).get("layers.0.experts.3.up") == {"F32": None, "Q8_0": "int8", "Q4_0": "int4:32"}[kind]
    for name, wanted in load_model(floats).tensors.items():
        error = np.abs(model.tensors[name].astype(np.float32) - wanted).max()
        assert error <= (0.5 if kind == "Q4_0" and ".experts." in name else 0.02 if kind == "Q8_0" and ".experts." in name else 1e-2), name
    backend = opened(file)
    assert kinds(backend) == {"F32": {"float32"}, "Q8_0": {"int8"}, "Q4_0": {"int4"}}[kind]
    assert {part.dtype for layer in backend.decoder.layers for part in layer.mlp.router.parts} == {"float32"}
    assert len(tokens(backend)) == 12


def step(rows: int, each: int = 1) -> StepPlan:
    return StepPlan(work=[RowWork(row, 10, each, [], True) for row in range(rows)])


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_what_is_planned_is_what_is_read(each: Path, options: dict[str, Any]) -> None:
    """The bytes of a step, experts apart. No panel is padded at these widths, but for that of a router's few outputs."""
    backend = opened(each, dtype="float32", **options)
    config = EngineConfig(model=str(each), dtype="float32", **options)
    cost = planned_cost(config, backend.spec)
    assert cost.expert_bytes == backend.expert_bytes()
    spec = backend.spec
    padding = spec.expert_layers * 4 * spec.hidden_size * (native.panel() - spec.num_experts)
    head = -spec.vocab_size % native.panel() * (spec.hidden_size * (1 if options else 4) + (2 if options else 0))
    assert cost.weight_bytes == backend.weight_bytes() - padding - head
    assert "of the " in backend.weight_note if options else not backend.weight_note
    whole = ModelCost(spec, backend.weight_bytes(), backend.head_bytes(), "float16", backend.expert_bytes())
    one, many = (whole.of(step(rows).extent()) for rows in (1, 1000))
    left_out = backend.expert_bytes() * (1 - spec.experts_per_token / spec.num_experts)
    assert one.weight_bytes == pytest.approx(backend.weight_bytes() - left_out, abs=1)
    assert many.weight_bytes == pytest.approx(backend.weight_bytes(), rel=1e-6)
    assert many.linear_flops == 1000 * one.linear_flops


def test_buffers_are_counted(each: Path) -> None:
    backend = opened(each)
    decoder, config = backend.decoder, EngineConfig(model=str(each), max_num_batched_tokens=1024)
    used = [decoder._x, decoder._normed, decoder._qkv, decoder._attended, decoder._up, decoder._scores, decoder._rows, decoder._inner]
    taken = backend.spec.experts_per_token
    per_position = sum(array.shape[1] * (taken if array is decoder._inner or array is decoder._rows else 1) for array in used)
    without_logits = step_buffer_bytes(config, backend.spec) - 4 * config.num_seqs(1 << 30) * backend.spec.vocab_size
    assert without_logits == 4 * 1024 * per_position
