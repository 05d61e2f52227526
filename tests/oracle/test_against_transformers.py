"""Every family against transformers: spec, loader and reference model first, then Quire's CPU backend and engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.models.weights import Model, load_model
from reference_model import ReferenceModel, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from oracle.models import CASES, TOLERANCE, Case, build, decisive_prompt, logits, save, states  # noqa: E402

pytestmark = pytest.mark.oracle
PROMPT, STEPS = 45, 64
TORCH = {"device": "torch-cpu", "dtype": "float32", "threads": 1, "block_size": 8}
"""The CUDA backend, on PyTorch's operations."""


@dataclass
class Saved:
    """A case as transformers saved it, and what transformers makes of it."""

    model: Model
    folder: Path
    prompt: list[int]
    chosen: list[int]
    logits: np.ndarray[Any, Any]
    """[PROMPT + STEPS, vocab] of prompt and chosen tokens."""
    states: np.ndarray[Any, Any]
    """[PROMPT + STEPS, embedding size] what lm_head reads of them."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.chosen


@pytest.fixture(scope="module", params=CASES, ids=lambda c: c.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    case: Case = request.param
    torch.set_num_threads(1)
    oracle = build(case)
    folder = save(oracle, tmp_path_factory.mktemp(case.name))
    prompt, chosen = decisive_prompt(oracle, PROMPT, STEPS)
    model = load_model(folder)
    tokens = prompt + chosen
    yield Saved(model, folder, prompt, chosen, logits(oracle, tokens).double().numpy(), states(oracle, tokens).double().numpy())
    model.close()


def test_spec(saved: Saved) -> None:
    spec = saved.model.spec
    assert spec.num_parameters() == sum(array.size for array in saved.model.tensors.values())
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 3))


def test_reference_model(saved: Saved) -> None:
    assert relative_error(ReferenceModel(saved.model.spec, saved.model.tensors).logits(saved.tokens), saved.logits) < 1e-5


@pytest.mark.parametrize("chunks", [[PROMPT, 1], [PROMPT + STEPS], [1], [7], [3, 40, 2]], ids=str)
def test_logits(saved: Saved, chunks: list[int]) -> None:
    """The whole prompt and then token by token, everything at once, and in uneven chunks, across many small blocks."""
    from decoding import decode_logits

    for block_size in (4, 16):
        found = decode_logits(saved.model, saved.tokens, chunks, block_size=block_size)
        assert relative_error(found, saved.logits) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_num_batched_tokens": 8, "block_size": 8}, {"max_num_batched_tokens": 1, "block_size": 4},
        {"threads": 1, "block_size": 64}, {**TORCH, "max_num_batched_tokens": 20},
    ],
    ids=str,
)  # fmt: skip
def test_greedy_tokens(saved: Saved, options: dict[str, Any]) -> None:
    engine = running().open_engine(saved.folder, kv_dtype="float32", **options)
    assert running().run(engine, [request("a", saved.prompt)]).outputs["a", 0].token_ids == saved.chosen


def test_greedy_tokens_after_preemption(saved: Saved) -> None:
    """Four copies in a pool that holds two of them at their full length."""
    length, block_size = PROMPT + STEPS, 8
    memory = 2 * (-(-length // block_size)) * block_size * saved.model.spec.kv_bytes_per_token("float32")
    engine = running().open_engine(saved.folder, kv_dtype="float32", block_size=block_size, kv_memory=str(memory), max_model_len=length)
    done = running().run(engine, [request(name, saved.prompt) for name in "abcd"], preempt_every=5)
    assert done.stats.preemptions > 0
    for name in "abcd":
        assert done.outputs[name, 0].token_ids == saved.chosen


def test_logprobs(saved: Saved) -> None:
    """Reported log-probabilities are those of the unmodified logits."""
    engine = running().open_engine(saved.folder, kv_dtype="float32")
    entries = running().run(engine, [request("a", saved.prompt, logprobs=5)]).outputs["a", 0].logprobs
    for row, (logprob, rank, top) in zip(log_softmax(saved.logits[PROMPT - 1 : -1]), entries, strict=True):
        assert rank == 1
        assert abs(logprob - row.max()) < 0.01
        assert len(top) == 5
        for token, value in top:
            assert abs(value - row[token]) < 0.01


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 8, "block_size": 8}, {**TORCH, "deterministic": True}], ids=str)
def test_prompt_logprobs(saved: Saved, options: dict[str, Any]) -> None:
    """Of every token of a prompt behind the first, with its rank among all tokens."""
    engine = running().open_engine(saved.folder, kv_dtype="float32", **options)
    params = {"max_tokens": 0, "prompt_logprobs": 4}
    entries = running().run(engine, [request("a", saved.tokens, **params)]).outputs["a", 0].prompt_logprobs
    assert entries is not None
    rows = log_softmax(saved.logits[:-1])
    for row, token, (logprob, rank, top) in zip(rows, saved.tokens[1:], entries, strict=True):
        assert abs(logprob - row[token]) < 0.01
        near = int((np.abs(row - row[token]) < 0.01).sum())  # tokens whose order float32 may decide in another way
        assert abs(rank - 1 - int((row > row[token]).sum())) < near
        assert [value for _, value in top] == pytest.approx(np.sort(row)[::-1][:4], abs=0.01)
        for other, value in top:
            assert abs(value - row[other]) < 0.01


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7, "block_size": 4}], ids=str)
def test_pooled_states(saved: Saved, pooling: str, options: dict[str, Any]) -> None:
    """The vectors of /v1/embeddings, before they are cut and normalised."""
    engine = running().open_engine(saved.folder, kv_dtype="float32", **options)
    vector = running().run(engine, [request("a", saved.tokens, pooling, max_tokens=0)]).outputs["a", 0].vector
    states = saved.states * saved.model.spec.logit_scale
    expected = states.mean(0) if pooling == "mean" else states[-1]
    assert relative_error(np.array([vector]), expected[None]) < TOLERANCE


def log_softmax(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    most = rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows - most).sum(-1, keepdims=True)) - most


def request(name: str, prompt: list[int], pooling: str | None = None, **params: Any) -> Any:
    from quire.core.sequence import Request
    from quire.sampling_params import SamplingParams

    params = {"temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True, **params}
    return Request(name, prompt, SamplingParams(**params), seed=0, eos_token_ids=(2, 3), pooling=pooling)


def running() -> Any:
    import running

    return running
