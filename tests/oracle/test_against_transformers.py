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
from oracle.models import CASES, TOLERANCE, Case, build, decisive_prompt, logits, save  # noqa: E402

pytestmark = pytest.mark.oracle
PROMPT, STEPS = 45, 64


@dataclass
class Saved:
    """A case as transformers saved it, and what transformers makes of it."""

    model: Model
    folder: Path
    prompt: list[int]
    chosen: list[int]
    logits: np.ndarray[Any, Any]
    """[PROMPT + STEPS, vocab] of prompt and chosen tokens."""

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
    yield Saved(model, folder, prompt, chosen, logits(oracle, prompt + chosen).double().numpy())
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
    [{}, {"max_num_batched_tokens": 8, "block_size": 8}, {"max_num_batched_tokens": 1, "block_size": 4}, {"threads": 1, "block_size": 64}],
    ids=str,
)
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
    rows = saved.logits[PROMPT - 1 : -1]
    expected = rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)
    for row, (logprob, rank, top) in zip(expected, entries, strict=True):
        assert rank == 1
        assert abs(logprob - row.max()) < 0.01
        assert len(top) == 5
        for token, value in top:
            assert abs(value - row[token]) < 0.01


def request(name: str, prompt: list[int], **params: Any) -> Any:
    from quire.core.sequence import Request
    from quire.sampling_params import SamplingParams

    return Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, **params), seed=0, eos_token_ids=(2, 3))


def running() -> Any:
    import running

    return running
