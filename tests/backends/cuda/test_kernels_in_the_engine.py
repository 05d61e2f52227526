"""The engine on the Triton kernels themselves, interpreted: a few tokens of every kind of step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import running
from quire.backends.cuda import opening
from quire.backends.cuda.kernels import operations as kernels
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TORCH = {"device": "torch-cpu", "dtype": "float32", "kv_dtype": "float32", "block_size": 16, "kv_debug": True, "max_num_seqs": 4}


@pytest.mark.parametrize("name", ["qwen3-tied", "mistral-window", "mixtral", "qwen3-moe", "granitemoe"])
def test_kernels_compute_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with norms; a window; experts: greedy tokens of transformers, a prompt in chunks."""
    monkeypatch.setattr(opening, "operations", lambda device: kernels)
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        prompt, tokens = arrays["prompt"].tolist(), arrays["tokens"].tolist()
    engine = running.open_engine(GOLDEN / name, **TORCH, max_num_batched_tokens=24)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=3, ignore_eos=True, logprobs=1, frequency_penalty=0.5)
    requests = [Request("a", prompt, greedy, 0, ()), Request("b", prompt[:7], drawn, 1, ())]
    assert running.run(engine, requests).outputs["a", 0].token_ids == tokens[:4]
