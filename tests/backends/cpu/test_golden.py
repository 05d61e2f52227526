"""The backend against what transformers computed (tests/oracle/make_golden.py): logits of every position, greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import running
from decoding import decode_logits
from quire.backends.cpu import _native as native
from quire.core.sequence import Request
from quire.models.families import FAMILIES
from quire.models.weights import Model, load_model
from quire.sampling_params import SamplingParams
from reference_model import ReferenceModel, relative_error

GOLDEN = sorted(folder.parent for folder in (Path(__file__).parents[2] / "fixtures" / "golden").glob("*/golden.npz"))
TOLERANCE = 1e-4
"""Of logits, relative to the largest of the row."""
ROUNDED = 2e-2
"""The same where linears round what they read to bfloat16 (AVX-512 BF16): now and then a number is just over the middle in one
computation and just below it in another."""


@dataclass
class Golden:
    folder: Path
    model: Model
    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray[Any, Any]
    """[prompt + tokens, vocab]"""


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    model = load_model(request.param)
    with np.load(request.param / "golden.npz") as arrays:
        yield Golden(request.param, model, arrays["prompt"].tolist(), arrays["tokens"].tolist(), arrays["logits"].astype(np.float64))
    model.close()


def test_every_family_has_a_fixture() -> None:
    assert {load_model(folder).spec.architecture for folder in GOLDEN} == {name for name in FAMILIES if "Conditional" not in name}


def test_reference_model(golden: Golden) -> None:
    """Spec, loader and the reference model: what the other tests lean on."""
    found = ReferenceModel(golden.model.spec, golden.model.tensors).logits(golden.prompt + golden.tokens)
    assert relative_error(found, golden.logits) < 1e-5


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("chunks", [[1000], [41, 1], [7], [1, 30, 2]], ids=str)
def test_logits(golden: Golden, chunks: list[int], isa: str) -> None:
    before = native.isa()
    native.set_isa(isa)
    try:
        tokens, expected, tolerance = golden.prompt + golden.tokens, golden.logits, TOLERANCE
        if native.arithmetic(golden.model.spec.dtype) == "bfloat16":
            expected, tolerance = ReferenceModel(golden.model.spec, golden.model.tensors, rounds=True).logits(tokens), ROUNDED
        for block_size in (4, 16, 128):
            found = decode_logits(golden.model, tokens, chunks, block_size=block_size)
            assert relative_error(found, expected) < tolerance
            assert np.median([relative_error(*rows) for rows in zip(found, expected, strict=True)]) < TOLERANCE
    finally:
        native.set_isa(before)


def test_logits_with_a_narrower_cache(golden: Golden) -> None:
    """float16 KV, the default: rounded keys and values, so only close."""
    found = decode_logits(golden.model, golden.prompt + golden.tokens, [41, 1], kv_dtype="float16", dtype="float32")
    assert relative_error(found, golden.logits) < 2e-2


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5, "block_size": 4}, {"threads": 1, "block_size": 64}], ids=str)
def test_greedy_tokens(golden: Golden, options: dict[str, Any]) -> None:
    engine = running.open_engine(golden.folder, dtype="float32", kv_dtype="float32", **options)
    assert running.run(engine, [greedy("a", golden)]).outputs["a", 0].token_ids == golden.tokens


def test_greedy_tokens_after_preemption(golden: Golden) -> None:
    """Four copies in a pool that holds two of them at their full length."""
    length = len(golden.prompt) + len(golden.tokens)
    memory = 2 * (-(-length // 8)) * 8 * golden.model.spec.kv_bytes_per_token("float32")
    engine = running.open_engine(
        golden.folder, dtype="float32", kv_dtype="float32", block_size=8, kv_memory=str(memory), max_model_len=length
    )
    done = running.run(engine, [greedy(name, golden) for name in "abcd"], preempt_every=5)
    assert done.stats.preemptions > 0
    assert all(done.outputs[name, 0].token_ids == golden.tokens for name in "abcd")


def greedy(name: str, golden: Golden) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=len(golden.tokens), ignore_eos=True)
    return Request(name, golden.prompt, params, seed=0, eos_token_ids=golden.model.spec.eos_token_ids)
