"""Models with quantized weights against the same in float32, and what the command line says about them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sample_models
from quire.backends.cpu import _native as native
from quire.backends.cpu.backend import CpuBackend
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork
from quire.models.weights import resolve_model
from quire.sampling_params import SamplingParams

FIXTURES = Path(__file__).parents[2] / "fixtures" / "golden"
GATED = {"intermediate_size": 192}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**sample_models.LLAMA, **GATED},
    "mistral": {**sample_models.MISTRAL, **GATED},
    "qwen2, tied": {**sample_models.QWEN2, **GATED, "tie_word_embeddings": True},
    "qwen3": {**sample_models.QWEN3, **GATED},
    "mixtral": sample_models.MIXTRAL,
    "qwen3-moe": sample_models.QWEN3_MOE,
    "granitemoe": sample_models.GRANITE_MOE,
    "ernie, with biases": {**sample_models.ERNIE, **GATED, "use_bias": True},
    "glm4": {**sample_models.GLM4, **GATED},
    "gpt2": sample_models.GPT2,
    "opt": {**sample_models.OPT, "ffn_dim": 192},
    "opt, post-norm, a narrower embedding": {
        **sample_models.OPT, "ffn_dim": 192, "do_layer_norm_before": False, "word_embed_proj_dim": 64,
    },
}  # fmt: skip
BOUNDS = {("int8", None): 0.05, ("int8", 32): 0.05, ("int4", None): 0.4}
"""Relative error of logits (root of the summed squares); that of unrelated logits is 1.4. One int4 weight is off by 8 % on average,
so that random models of four layers come to 11 to 26 %, and to 1 to 3 % with int8."""


def logits(folder: Path, tokens: list[int], **options: Any) -> np.ndarray:
    backend = CpuBackend.open(EngineConfig(model=str(folder), kv_memory="64MiB", kv_dtype="float32", max_model_len=128, **options))
    backend._rows.begin(RowStart(0, tokens, len(tokens), SamplingParams(), 0, ()))
    batch = backend._rows.batch([RowWork(0, 0, len(tokens), list(range(-(-len(tokens) // 16))), True, 0)])
    batch.asked = None  # logits of every position, not of the last one only
    return backend.decoder.forward(batch).copy()


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_near_those_of_float32(name: str, isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    config = MODELS[name]
    tensors = {key: (0.2 * rng.standard_normal(t.shape)).astype(np.float32) for key, t in sample_models.checkpoint(config).items()}
    folder = sample_models.write_model(tmp_path / "model", config, tensors)
    tokens = rng.integers(3, 999, 40).tolist()
    before = native.isa()
    native.set_isa(isa)
    try:
        reference = logits(folder, tokens)
        for (quantize, group_size), bound in BOUNDS.items():
            found = logits(folder, tokens, quantize=quantize, group_size=group_size)
            error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
            # Of experts whose scores are nearly equal another one may be taken.
            assert 1e-5 < error < bound * (2 if "num_experts_per_tok" in config else 1), (quantize, group_size)
    finally:
        native.set_isa(before)


def test_the_embedded_model_says_the_same_with_int8_and_nearly_so_with_int4() -> None:
    tokens = [0, *np.random.default_rng(1).integers(1, 4096, 12).tolist()]
    reference = logits(resolve_model("embedded"), tokens)
    for options, bound in (({"quantize": "int8"}, 0.03), ({"quantize": "int4"}, 0.2), ({"quantize": "int4", "group_size": 64}, 0.2)):
        found = logits(resolve_model("embedded"), tokens, **options)
        assert np.linalg.norm(found - reference) / np.linalg.norm(reference) < bound


def test_dtype_is_the_width_of_what_is_not_quantized() -> None:
    tokens = [0, 17, 300]
    wide = logits(resolve_model("embedded"), tokens, quantize="int8", dtype="float32")
    assert np.array_equal(wide, logits(resolve_model("embedded"), tokens, quantize="int8"))  # bfloat16 holds no more
    narrow = CpuBackend.open(EngineConfig(quantize="int4", dtype="float16", kv_memory="16MiB"))
    assert narrow.decoder.embed.dtype == np.float16
    assert [part.dtype for part in narrow.decoder.layers[0].qkv.parts] == ["int4"]
    assert [part.dtype for part in narrow.decoder.lm_head.parts] == ["int8"]
    assert narrow.weight_note.startswith("int4 in groups of 32, lm_head int8 with one scale for each output: 4 MB")
    assert narrow.weight_bytes() == narrow.decoder.weight_bytes() > narrow.head_bytes() == 4096 * 256 + 2 * 4096


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--quantize", "q4"], "--quantize 'q4' is not supported; choose from: int8, int4"),
        (["--quantize", "int4", "--group-size", "48"], "--group-size 48 is not supported; choose from: 0, 32, 64, 128"),
        (["--quantize", "int4", "--group-size", "0"], "--group-size 0 is not supported with --quantize int4; choose from: 32, 64, 128"),
        (
            ["--quantize", "int4", "--group-size", "128"],
            "--group-size 128 does not divide the 704 inputs of layers.0.down: choose 32 or 64",
        ),
        (["--group-size", "32"], "--group-size 32 is for quantized weights: add --quantize int8 or int4, or leave it out"),
        (["--cache-dir", "x"], "--cache-dir keeps quantized weights"),
        (
            ["--quantize", "int8", "--cache-dir", "/dev/null/x"],
            "--cache-dir /dev/null/x can't be written: Not a directory; choose a folder",
        ),
        (["--quantise=int8"], "unrecognized arguments: --quantise=int8 (did you mean --quantize?)"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(args: list[str], says: str) -> None:
    for command in (["run", "-p", "x"], ["bench", "throughput"]):
        done = subprocess.run([sys.executable, "-P", "-m", "quire.cli.main", *command, *args], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_group_that_fits_no_layer_names_one() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quire.cli.main", "run", str(FIXTURES / "opt"), "-p", "x", "--quantize", "int4"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--group-size 32 does not divide the 24 inputs of layers.0.q: no group size does for all of this model's layers" in done.stderr
