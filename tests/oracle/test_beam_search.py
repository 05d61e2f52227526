"""Beam search against transformers: the same small models, the same hypotheses, scores and log-probabilities."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import pytest

from quire.core.beam import BeamSearch, EarlyStopping, Hypothesis

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from oracle.models import VOCAB, Case, build, heads, prompt  # noqa: E402

pytestmark = pytest.mark.oracle
SPREAD = 2.0
"""Standard deviation of the logits: neither flat nor certain."""
ENDS = (2, 3)
END_BIAS = 4.5
"""Added to the logits of the end tokens, so that beams end now and then."""
TOLERANCE = 1e-4
EARLY: list[EarlyStopping] = [False, True, "never"]
PENALTIES = [-0.5, 0.0, 0.6, 1.0, 2.0]
MAX_TOKENS = 12
CASES = [
    Case("llama-gqa", "llama", heads(4, 2)),
    Case("qwen3-head-dim", "qwen3", heads(5, 5, head_dim=16, hidden_size=40)),
    Case("gpt2-untied", "gpt2", {"n_head": 4, "tie_word_embeddings": False}),
]


class Oracle:
    """One model and one prompt.

    The model is in double precision, so that its logits, which transformers rounds to float32, are the same with and
    without a KV cache, in any batch; near ties of two beams are then as rare as float32 makes them.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.model = build(case).double()
        self.prompt = prompt(11, seed)
        with torch.no_grad():
            head = self.model.get_output_embeddings()
            head.weight.mul_(SPREAD / self.model(torch.tensor([self.prompt])).logits.std())
            head.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=torch.double))
            head.bias[list(ENDS)] = END_BIAS
        self.model.generation_config.eos_token_id = None
        self.row = cache(self._row)

    def _row(self, tokens: tuple[int, ...]) -> list[tuple[int, float]]:
        """(token, log-probability) after the prompt and ``tokens``, most likely first, the whole vocabulary."""
        with torch.no_grad():
            logits = self.model(torch.tensor([[*self.prompt, *tokens]]), use_cache=False).logits[0, -1].float()
        values, ids = torch.log_softmax(logits, -1).sort(descending=True, stable=True)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def ours(self, search: BeamSearch) -> tuple[list[Hypothesis], int]:
        """The hypotheses and the number of steps taken."""
        live: list[tuple[int, ...]] = [()]
        steps = 0
        while live:
            moves = search.advance([self.row(tokens)[: search.num_candidates] for tokens in live])
            live = [(*live[m.parent], m.token) for m in moves]
            steps += 1
        return search.hypotheses(), steps

    def theirs(
        self, width: int, count: int, ends: list[int], max_tokens: int, penalty: float, early: EarlyStopping
    ) -> tuple[list[list[int]], list[float], list[list[float]], int]:
        """Tokens, scores and log-probabilities of each hypothesis, and the number of steps."""
        out = self.model.generate(
            torch.tensor([self.prompt]), do_sample=False, num_beams=width, num_return_sequences=count, max_new_tokens=max_tokens,
            length_penalty=penalty, early_stopping=early, eos_token_id=ends or None, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, output_logits=True,
        )  # fmt: skip
        lengths = (out.beam_indices >= 0).sum(1).tolist()
        tokens = out.sequences[:, len(self.prompt) :].tolist()
        logprobs = self.model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False).tolist()
        return (
            [row[:length] for row, length in zip(tokens, lengths, strict=True)],
            out.sequences_scores.tolist(),
            [row[:length] for row, length in zip(logprobs, lengths, strict=True)],
            len(out.scores),
        )


@pytest.fixture(scope="module", params=[(c, s) for c in CASES for s in (0, 1)], ids=lambda p: f"{p[0].name}-{p[1]}")
def oracle(request: pytest.FixtureRequest) -> Oracle:
    torch.set_num_threads(1)
    return Oracle(*request.param)


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_same_hypotheses(oracle: Oracle, width: int, early: EarlyStopping) -> None:
    """Every length penalty with no, one and two end tokens, at the full length and at shorter ones in turn; n in turn too."""
    seen: Counter[str] = Counter()
    for number, (num_ends, penalty) in enumerate(itertools.product([0, 1, 2], PENALTIES)):
        ends = list(ENDS[:num_ends])
        count = 1 + number % width
        for max_tokens in {1 + number % 11, 1 + (number + 6) % 11, MAX_TOKENS}:
            search = BeamSearch(width, max_tokens, ends, length_penalty=penalty, early_stopping=early, num_return=count)
            found, steps = oracle.ours(search)
            tokens, scores, logprobs, their_steps = oracle.theirs(width, count, ends, max_tokens, penalty, early)
            what = f"n={count} ends={ends} penalty={penalty} max_tokens={max_tokens}"
            assert [h.token_ids for h in found] == tokens, what
            assert [h.score for h in found] == pytest.approx(scores, abs=TOLERANCE), what
            for hypothesis, expected in zip(found, logprobs, strict=True):
                assert hypothesis.logprobs == pytest.approx(expected, abs=TOLERANCE), what
            assert steps == their_steps, what
            seen.update(h.finish_reason for h in found)
            seen["early"] += steps < max_tokens
    assert min(seen["stop"], seen["length"], seen["early"]) > 0, seen


@pytest.mark.parametrize("ends", [0, 1, 2])
def test_width_one_is_transformers_greedy(oracle: Oracle, ends: int) -> None:
    ids = list(ENDS[:ends])
    (found,), _ = oracle.ours(BeamSearch(1, MAX_TOKENS, ids))
    with torch.no_grad():
        out = oracle.model.generate(
            torch.tensor([oracle.prompt]), do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=ids or None, pad_token_id=0
        )
    assert found.token_ids == out[0, len(oracle.prompt) :].tolist()
