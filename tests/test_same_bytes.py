"""Same bytes: a request's tokens and log-probabilities depend on model, prompt, parameters and seed, and on nothing else.

The same requests run under {block size} x {chunk budget} x {batch mix} x {forced preemption} x {threads}, on every
instruction set that this machine has, and are compared bit for bit.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import running
from quire.backends.cpu import _native as native
from quire.core.sequence import Request
from quire.models.weights import resolve_model
from quire.sampling_params import SamplingParams

FIXTURES = Path(__file__).parent / "fixtures" / "golden"
MODELS = ["embedded", "mistral", "qwen3", "gpt2", "opt"]
"""The embedded model, and tiny ones with a sliding window, head norms, learned positions and biases."""

VARIANTS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "three at a time": {"max_num_seqs": 3},
    "chunks of 1": {"max_num_batched_tokens": 1, "max_num_seqs": 2},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 33": {"max_num_batched_tokens": 33, "block_size": 4},
    "block size 4": {"block_size": 4},
    "block size 8": {"block_size": 8},
    "block size 32": {"block_size": 32, "max_num_batched_tokens": 50},
    "block size 128": {"block_size": 128},
    "one thread": {"threads": 1},
    "three threads": {"threads": 3, "max_num_batched_tokens": 61},
    "NaN in fresh blocks": {"kv_debug": True, "block_size": 16, "max_num_batched_tokens": 40},
}


def folder_of(model: str) -> Path:
    if model == "embedded":
        return resolve_model("embedded")
    found = sorted(FIXTURES.glob(f"{model}*"))
    assert found, f"no fixture for {model}"
    return found[0]


def requests_for(vocab_size: int, context: int, eos: tuple[int, ...]) -> list[Request]:
    """Greedy and sampled requests of many lengths, with every sampling parameter in use somewhere."""
    rng = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "n": 2},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {3: 4.0, 5: -100.0}},
        {"temperature": 0.0, "min_tokens": 6, "logprobs": 0},
    ]
    requests = []
    for i in range(12):
        # One is longer than the positions after which attention merges partial results.
        length = min(600 if i == 3 else rng.choice([1, 2, 15, 16, 17, 40, 63, 64, 65, 130]), context - 40)
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        params = SamplingParams(**{"logprobs": 3, "max_tokens": rng.randrange(8, 24), **kinds[i % len(kinds)]})
        requests.append(Request(f"r{i}", prompt, params, seed=1000 + i, eos_token_ids=eos))
    return requests


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("model", MODELS)
def test_outputs_do_not_depend_on_company_chunks_blocks_threads_or_preemption(model: str, isa: str) -> None:
    folder = folder_of(model)
    before = native.isa()
    native.set_isa(isa)
    try:
        engine = running.open_engine(folder)
        spec = engine.backend.spec
        context = engine.limits.max_model_len
        requests = requests_for(spec.vocab_size, context, spec.eos_token_ids)
        reference = running.run(engine, requests)
        assert len(reference.outputs) == sum(r.params.n for r in requests)
        for name, options in VARIANTS.items():
            assert running.run(running.open_engine(folder, **options), requests).outputs == reference.outputs, name
        shuffled = random.Random(1).sample(requests, len(requests))
        assert running.run(running.open_engine(folder), shuffled).outputs == reference.outputs, "another order of arrival"

        longest = max(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for r in requests)  # the pool holds just that one
        tiny = -(-longest // 16) * 16 * spec.kv_bytes_per_token("float16")
        squeezed = running.run(running.open_engine(folder, kv_memory=str(tiny), max_model_len=longest), requests)
        assert squeezed.stats.preemptions > 0
        assert squeezed.outputs == reference.outputs, "preemption"
    finally:
        native.set_isa(before)


def test_a_seed_decides_and_only_where_it_should() -> None:
    engine = running.open_engine(folder_of("embedded"))
    prompt = [5, 6, 7]

    def tokens(seed: int, **params: Any) -> list[int]:
        request = Request("a", prompt, SamplingParams(max_tokens=12, ignore_eos=True, **params), seed)
        return running.run(engine, [request]).outputs[("a", 0)].token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1, temperature=0.0) == tokens(2, temperature=0.0)
