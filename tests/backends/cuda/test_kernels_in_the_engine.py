"""The engine on the Triton kernels themselves, interpreted: a few tokens of every kind of step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import running
from quire.backends.cuda import opening
from quire.backends.cuda.kernels import operations as kernels
from quire.core.sequence import Request
from quire.models.weights import load_model
from quire.sampling_params import SamplingParams
from reference_model import ReferenceModel
from sample_models import GPT_OSS_SHORT, write_model

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TORCH = {"device": "torch-cpu", "dtype": "float32", "kv_dtype": "float32", "block_size": 16, "kv_debug": True, "max_num_seqs": 4}


@pytest.mark.parametrize("name", ["qwen3-tied", "mistral-window", "qwen2-windows", "mixtral", "qwen3-moe", "granitemoe", "olmo3", "gemma2",
                                  "glm4", "glm4-moe", "ernie4-5-moe"])  # fmt: skip
def test_kernels_compute_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of heads, or of all of them, and behind; a window, of all layers or of some; limits of scores and logits; a rotation of half a
    head; experts, also beside shared ones: greedy tokens of transformers, a prompt in chunks."""
    monkeypatch.setattr(opening, "operations", lambda device: kernels)
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        prompt, tokens = arrays["prompt"].tolist(), arrays["tokens"].tolist()
    engine = running.open_engine(GOLDEN / name, **TORCH, max_num_batched_tokens=24)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=3, ignore_eos=True, logprobs=1, frequency_penalty=0.5)
    requests = [Request("a", prompt, greedy, 0, ()), Request("b", prompt[:7], drawn, 1, ())]
    assert running.run(engine, requests).outputs["a", 0].token_ids == tokens[:4]


def test_kernels_compute_a_model_with_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with biases of experts, whose gates are limited."""
    monkeypatch.setattr(opening, "operations", lambda device: kernels)
    config = GPT_OSS_SHORT | {"num_hidden_layers": 2, "layer_types": GPT_OSS_SHORT["layer_types"][:2], "vocab_size": 100, "hidden_size": 32,
                        "intermediate_size": 24, "num_attention_heads": 4}  # fmt: skip
    folder = write_model(tmp_path / "model", config)
    model, prompt = load_model(folder), [17 * i % 100 for i in range(1, 30)]
    expected = ReferenceModel(model.spec, model.tensors).greedy(prompt, 4)
    engine = running.open_engine(folder, **TORCH, max_num_batched_tokens=12)
    assert engine.backend.groups.width == 2, "one layer has a window"
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [Request("a", prompt, greedy, 0, ()), Request("b", prompt[:7], greedy, 1, ())]
    assert running.run(engine, requests).outputs["a", 0].token_ids == expected
