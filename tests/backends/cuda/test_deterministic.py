"""--deterministic on PyTorch operations: a request's bytes do not depend on its company, on chunks, cache hits or preemption."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import running
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

FIXTURES = Path(__file__).parents[2] / "fixtures" / "golden"
MODELS = {"embedded": "embedded", "qwen3-moe": FIXTURES / "qwen3-moe", "qwen2-windows": FIXTURES / "qwen2-windows"}
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=0, prompt_logprobs=1),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=40, n=2, max_tokens=20, ignore_eos=True, logprobs=0),
]


def requests(vocab_size: int) -> list[Request]:
    prompts = [[token % vocab_size for token in range(50, 60 + 17 * i)] for i in range(6)]
    return [Request(f"{i}", prompt, PARAMS[i % 3], seed=i, eos_token_ids=()) for i, prompt in enumerate(prompts)]


def outputs(model: str, run_alone: bool = False, preempt_every: int = 0, **options: Any) -> dict[tuple[str, int], running.Output]:
    fixed = {
        "device": os.environ.get("QUIRE_TEST_DEVICE", "torch-cpu"),
        "max_num_seqs": 16,
        "dtype": "float32",
        "kv_dtype": "float32",
        "deterministic": True,
    }
    engine = running.open_engine(MODELS[model], **{**fixed, **options})
    together = requests(engine.backend.spec.vocab_size)
    groups = [[request] for request in together] if run_alone else [together]
    return {key: output for group in groups for key, output in running.run(engine, group, preempt_every=preempt_every).outputs.items()}


@cache
def expected(model: str) -> dict[tuple[str, int], running.Output]:
    return outputs(model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"run_alone": True},
        {"run_alone": True, "prefix_caching": False, "cuda_graphs": False},
        {"max_num_batched_tokens": 13, "block_size": 8},
        {"preempt_every": 6, "block_size": 16},
        {"speculation": "prompt-lookup", "max_num_seqs": 2},
    ],
    ids=str,
)
def test_the_same_bytes(model: str, options: dict[str, Any]) -> None:
    assert outputs(model, **options) == expected(model)
