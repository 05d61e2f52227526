"""Beam search of the whole engine (forks, copies on write, paged KV) against transformers' generate, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire.core.sequence import Request
from quire.models.weights import resolve_model
from quire.sampling_params import SamplingParams

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers  # noqa: E402

from oracle.models import VOCAB, Case, build, heads, prompt, save  # noqa: E402

pytestmark = pytest.mark.oracle
CASES = [
    Case("llama-gqa", "llama", heads(4, 2)),
    Case("qwen3-head-dim", "qwen3", heads(5, 5, head_dim=16, hidden_size=40)),
    Case("gpt2-untied", "gpt2", {"n_head": 4, "tie_word_embeddings": False}),
]
SEARCHES: list[dict[str, Any]] = [
    {"beam_width": 2},
    {"beam_width": 4, "n": 4, "early_stopping": True},
    {"beam_width": 4, "n": 2, "length_penalty": 0.0},
    {"beam_width": 6, "n": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"beam_width": 3, "n": 1, "length_penalty": -0.5},
]
SPREAD = 2.5
"""Standard deviation of the logits: beams are decided by more than rounding."""


def sharpen(model: Any, tokens: list[int]) -> None:
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(SPREAD / model(torch.tensor([tokens])).logits.std())


def theirs(model: Any, tokens: list[int], search: dict[str, Any], max_tokens: int, eos: list[int]) -> list[list[int]]:
    with torch.no_grad():
        sequences = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            num_beams=search["beam_width"],
            num_return_sequences=search.get("n", 1),
            length_penalty=search.get("length_penalty", 1.0),
            early_stopping=search.get("early_stopping", False),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=eos,
            pad_token_id=VOCAB + 1,
        )
    return [[t for t in row[len(tokens) :].tolist() if t != VOCAB + 1] for row in sequences]


def ours(folder: Path, tokens: list[int], search: dict[str, Any], max_tokens: int, eos: list[int], **options: Any) -> list[list[int]]:
    import running

    engine = running.open_engine(folder, kv_dtype="float32", dtype="float32", **options)
    request = Request("a", tokens, SamplingParams(max_tokens=max_tokens, **search), 0, tuple(eos))
    outputs = running.run(engine, [request], preempt_every=4 if options else 0).outputs
    return [outputs["a", i].token_ids for i in range(search.get("n", 1))]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_small_models(case: Case, search: dict[str, Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = build(case)
    tokens = prompt(21)
    sharpen(model, tokens)
    folder = save(model, tmp_path)
    eos = sorted({row[3] for row in theirs(model, tokens, {"beam_width": 6, "n": 6}, 8, [])})[:2]  # so that some of them end
    for ends in ([], eos):
        expected = theirs(model, tokens, search, 14, ends)
        assert ours(folder, tokens, search, 14, ends) == expected
        assert ours(folder, tokens, search, 14, ends, block_size=4, max_num_batched_tokens=5, max_num_seqs=6) == expected


def test_the_embedded_model() -> None:
    folder = resolve_model("embedded")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    search = {"beam_width": 6, "n": 6}
    for text in ("def fibonacci(n):", "import os\n\n", "class Stack:\n    def push(self, item):\n"):
        tokens = tokenizer(text)["input_ids"]
        assert ours(folder, tokens, search, 24, [0]) == theirs(model, tokens, search, 24, [0])
