"""Constrained outputs are the same whatever happens to their sequences, and whether forced tokens are sampled or not."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

import running
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams
from quire.structured import Structured
from quire.text.tokenizer import Tokenizer
from server.harness import EMBEDDED

SCHEMA = {
    "type": "object",
    "properties": {
        "identifier": {"type": "integer", "minimum": 0},
        "description": {"type": "string", "maxLength": 20},
        "categories": {"type": "array", "items": {"enum": ["first category", "second category"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["identifier", "description", "categories"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {"structured": Structured.json(SCHEMA)},
    {"structured": Structured.json(SCHEMA, whitespace=""), "n": 2, "temperature": 1.2},
    {"structured": Structured.regex("(ab|[0-9]{1,5} )*x"), "ignore_eos": True, "repetition_penalty": 1.2},
    {"structured": Structured.choice(["a rather long choice", "a rather long one", "another"]), "best_of": 3},
    {"structured": Structured.json_object(), "bad_words": ["class", "name"], "min_tokens": 10},
    {"bad_words": ["import", "return x", "os"], "temperature": 0.0},
    {"allowed_token_ids": list(range(60, 120)), "top_p": 0.9},
    {},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "all together": {},
    "chunks of 1": {"max_num_batched_tokens": 1, "max_num_seqs": 3},
    "chunks of 7, blocks of 4": {"max_num_batched_tokens": 7, "block_size": 4},
    "no cache, no speculation": {"prefix_caching": False, "speculation": "off"},
    "swap": {"swap_memory": "64MiB", "admission": "watermark", "kv_debug": True},
}


def requests(logprobs: int | None) -> list[Request]:
    tokenizer = Tokenizer.load(EMBEDDED)
    prompts = ["import os\n", "x = "]
    return [
        Request(f"{i}-{j}", tokenizer.encode(prompt), SamplingParams(**{"max_tokens": 40, "logprobs": logprobs, **kind}), 10 * i + j, (0,))
        for i, kind in enumerate(KINDS)
        for j, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def reference() -> dict[tuple[str, int], running.Output]:
    """Each request alone, every token sampled."""
    engine = running.open_engine(EMBEDDED, constrained=True, prefix_caching=False, speculation="off")
    made: dict[tuple[str, int], running.Output] = {}
    for request in requests(logprobs=2):
        made |= running.run(engine, [request]).outputs
    return made


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("logprobs", [None, 2])
def test_outputs_do_not_depend_on_anything_else(reference: Any, variant: str, logprobs: int | None) -> None:
    engine = running.open_engine(EMBEDDED, constrained=True, **VARIANTS[variant])
    found = running.run(engine, requests(logprobs), preempt_every=9).outputs
    assert found.keys() == reference.keys()
    for key, output in found.items():
        assert output.token_ids == reference[key].token_ids, key
        assert (output.finish_reason, output.stop_reason) == (reference[key].finish_reason, reference[key].stop_reason)
        if logprobs is not None:
            assert output.logprobs == reference[key].logprobs


@pytest.mark.parametrize("logprobs", [None, 2])
def test_guesses_change_nothing(reference: Any, logprobs: int | None) -> None:
    engine = running.open_engine(EMBEDDED, constrained=True, speculation_positions=64)
    run = running.run(engine, requests(logprobs), preempt_every=9, outputs_to_guess=reference)
    assert {key: output.token_ids for key, output in run.outputs.items()} == {key: output.token_ids for key, output in reference.items()}
    assert 50 < run.stats.tokens_accepted < run.stats.tokens_drafted


def test_what_is_forced_is_not_sampled(reference: Any) -> None:
    engine = running.open_engine(EMBEDDED, constrained=True, speculation="off")
    one = requests(None)[2]
    run = running.run(engine, [one])
    generated = sum(len(output.token_ids) for output in run.outputs.values())
    assert run.stats.tokens_sampled < generated / 2


def test_complete_ones_are_what_was_asked_for(reference: Any) -> None:
    import json

    tokenizer, complete = Tokenizer.load(EMBEDDED), 0
    for (request, _), output in reference.items():
        kind, text = KINDS[int(request[0])], tokenizer.decode(output.token_ids)
        assert output.finish_reason in ("stop", "length")
        if kind.get("structured") in (KINDS[0]["structured"], KINDS[1]["structured"]) and output.finish_reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
            complete += 1
        if "bad_words" in kind and "structured" not in kind:
            assert "import" not in text
        if "allowed_token_ids" in kind:
            assert set(output.token_ids) <= set(range(60, 120))
    assert complete > 1
