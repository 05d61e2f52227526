"""gpt-oss with experts in MXFP4, from a folder and from a GGUF file, as a user runs it on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from quire.backends.cpu.backend import CpuBackend
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork, StepPlan
from quire.models.quantization import planned_cost
from quire.models.weights import load_model, load_spec
from quire.sampling_params import SamplingParams
from sample_gguf import TOKENS, tokenizer_fields, write_gguf
from sample_models import GPT_OSS, checkpoint, write_model
from sample_packed import packed_folder

CONFIG = GPT_OSS | {"vocab_size": len(TOKENS), "hidden_size": 128, "max_position_embeddings": 512, "sliding_window": 16,
                    "rope_scaling": GPT_OSS["rope_scaling"] | {"factor": 4.0, "original_max_position_embeddings": 128}}  # fmt: skip
PROMPT = np.random.default_rng(1).integers(3, 30, 45).tolist()
SIZES = {"embed_tokens": 1.0, "lm_head": 0.3, "input_layernorm": 1.0, "post_attention_layernorm": 1.0, "norm": 1.0, "experts": 0.3}
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt-oss")
    tensors = {name: (tensor * SIZES.get(name.split(".")[-2], 0.1)).astype(np.float32) for name, tensor in checkpoint(CONFIG).items()}
    return packed_folder(write_model(made / "floats", CONFIG, tensors), made / "mxfp4", "mxfp4")


def opened(model: Path, **options: Any) -> CpuBackend:
    return CpuBackend.open(EngineConfig(model=str(model), kv_memory="8MiB", max_model_len=128, **options))


def tokens(backend: CpuBackend, row: int = 0, chunks: tuple[int, ...] = (len(PROMPT),), count: int = 20) -> list[int]:
    """Greedy ones, a step each."""
    table, at, found = list(range(8 * row, 8 * row + 8)), 0, []
    for size in chunks:
        starts = [RowStart(row, PROMPT, len(PROMPT), GREEDY, 0, ())] if at == 0 else []
        work = RowWork(row, at, size, [] if at else table, at + size == len(PROMPT))
        found += backend.execute(StepPlan(starts=starts, work=[work])).tokens
        at += size
    for i in range(1, count):
        found += backend.execute(StepPlan(work=[RowWork(row, len(PROMPT) + i - 1, 1, [], True)])).tokens
    return [int(token) for token in found]


def kinds(backend: CpuBackend) -> set[str]:
    return {layer.mlp.experts.dtype for layer in backend.decoder.layers}


def test_experts_stay_what_they_are(folder: Path) -> None:
    backend = opened(folder)
    assert kinds(backend) == {"mxfp4"}
    assert {part.dtype for layer in backend.decoder.layers for part in (*layer.qkv.parts, *layer.o.parts)} == {"int8"}
    assert {part.dtype for layer in backend.decoder.layers for part in layer.mlp.router.parts} == {"bfloat16"}
    assert backend.weight_note.startswith("int8 and mxfp4 as the file has them")
    floats = tokens(opened(folder, quantize="none", dtype="float32"))  # of the same numbers; rounded activations differ
    found = tokens(backend)
    assert len(set(found)) > 3
    assert sum(a == b for a, b in zip(found, floats, strict=True)) >= 10
    cost = planned_cost(EngineConfig(model=str(folder), quantize="stored"), backend.spec)
    assert cost.expert_bytes == backend.expert_bytes()


def test_chunks_and_rows_do_not_matter(folder: Path) -> None:
    expected = tokens(opened(folder))
    for chunks, options in (((1,) * 45, {}), ((7, 20, 18), {"threads": 1}), ((40, 5), {"threads": 2})):
        assert tokens(opened(folder, **options), row=3 if not options else 0, chunks=chunks) == expected


@pytest.mark.parametrize("quantize", ["stored", "int8", "int4"])
def test_the_second_start_maps_what_the_first_packed(folder: Path, tmp_path: Path, quantize: str) -> None:
    options: dict[str, Any] = {"quantize": quantize, "cache_dir": str(tmp_path)}
    first = opened(folder, **options)
    assert len(list(tmp_path.glob("*.packed"))) == 1
    second = opened(folder, **options)
    assert kinds(first) == kinds(second) == {"mxfp4" if quantize == "stored" else quantize}
    assert tokens(first) == tokens(second) == tokens(opened(folder, quantize=quantize))


def test_gguf(folder: Path, tmp_path: Path) -> None:
    """The same numbers in a GGUF file, where the halves of a group share bytes: the same tokens."""
    stored, fields, tensors, blocks = load_file(folder / "model.safetensors"), _fields(), {}, {}
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.router": "ffn_gate_inp"}  # fmt: skip
    for name, array in stored.items():
        at, _, rest = name.removeprefix("model.").removeprefix("layers.").partition(".") if "layers" in name else ("", "", "")
        prefix = f"blk.{at}." if rest else ""
        rest = rest or name.removeprefix("model.")
        wide = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
        if rest == "self_attn.sinks":
            tensors[f"{prefix}attn_sinks.weight"] = wide
        elif rest.startswith("mlp.experts."):
            part, _, what = rest.removeprefix("mlp.experts.").rpartition("_proj_")
            split = {"gate": wide[:, ::2], "up": wide[:, 1::2]} if part == "gate_up" else {part: wide}
            for each, some in split.items():
                target = f"{prefix}ffn_{each}_exps"
                if what == "bias":
                    tensors[f"{target}.bias"] = np.ascontiguousarray(some)
                else:
                    blocks.setdefault(f"{target}.weight", {})[what] = some
        else:
            module, _, parameter = rest.rpartition(".")
            tensors[f"{prefix}{names[module]}.{parameter}"] = wide
    for name, parts in blocks.items():
        numbers = np.stack([parts["blocks"] & 15, parts["blocks"] >> 4], axis=-1).reshape(*parts["scales"].shape, 32)
        each = np.concatenate([parts["scales"][..., None], numbers[..., :16] | numbers[..., 16:] << 4], axis=-1)
        tensors[name] = each.reshape(*each.shape[:2], -1)
    file = write_gguf(tmp_path / "gpt-oss.gguf", fields, tensors, other={f"ffn_{part}_exps": "MXFP4" for part in ("gate", "up", "down")})
    model, other = load_model(file), load_model(folder)
    assert model.spec == load_spec(file)
    assert model.spec.rope == other.spec.rope
    assert model.spec.windows == other.spec.windows == (16, 0, 16, 0)
    assert dict(model.spec.stored) == dict(other.spec.stored)
    for name, wanted in other.tensors.items():
        assert np.array_equal(np.asarray(model.tensors[name], np.float32), np.asarray(wanted, np.float32)), name
    for quantize in ("stored", "none"):  # in float32, as the file has routers
        assert tokens(opened(file, quantize=quantize, dtype="float32")) == tokens(opened(folder, quantize=quantize, dtype="float32"))


def _fields() -> dict[str, Any]:
    scaling, values = CONFIG["rope_scaling"], {
        "block_count": 4, "context_length": 512, "embedding_length": 128, "feed_forward_length": 128, "expert_feed_forward_length": 128,
        "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 16, "expert_count": 5, "expert_used_count": 2,
        "rope.freq_base": 150000.0, "rope.scaling.type": "yarn",
    }  # fmt: skip
    values |= {"rope.scaling.factor": scaling["factor"], "rope.scaling.original_context_length": 128}
    return {"general.architecture": "gpt-oss", **{f"gpt-oss.{name}": value for name, value in values.items()}, **tokenizer_fields()}
