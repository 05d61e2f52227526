"""The rows' parameters, from requests to the kernel: what the others of a step ask for changes nothing."""

import numpy as np
import pytest

from quire.backends.cpu.sampler import Sampler
from quire.backends.rows import Rows
from quire.core.plan import RowStart, StepResult
from quire.sampling_params import SamplingParams

VOCAB, LENGTH = 500, 12

PLAIN = SamplingParams(temperature=0.9)
KINDS = [
    PLAIN,
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.4),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=0.0, repetition_penalty=3.0),
    SamplingParams(temperature=0.0, frequency_penalty=2.0),
    SamplingParams(temperature=0.0, presence_penalty=2.0),
    SamplingParams(temperature=0.0, logit_bias={7: 100.0}),
    SamplingParams(temperature=0.0, min_tokens=10),
    SamplingParams(logprobs=3),
    SamplingParams(temperature=0.5, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.2, logprobs=0, min_tokens=10),
]


def start(row, params, seed):
    rng = np.random.default_rng(seed)
    return RowStart(row, rng.integers(0, VOCAB, LENGTH).tolist(), 5, params, seed=seed, stop_ids=(11, VOCAB + 3))


def logits_of(seeds):
    """Some tokens of each row's history, and its stop token, are likely: penalties and bans decide."""
    rows = []
    for seed in seeds:
        z = np.random.default_rng(100 + seed).standard_normal(VOCAB).astype(np.float32)
        z[start(0, PLAIN, seed).tokens[6:9]] += 3
        z[11] += 3.5
        rows.append(z)
    return np.stack(rows)


@pytest.fixture
def sampler():
    return Sampler(Rows(len(KINDS), 64, 16), VOCAB)


def begin(sampler, starts):
    for one in starts:
        sampler._rows.begin(one)
        sampler.begin(one)


def draw(sampler, rows, seeds, masks=()):
    rows = np.array(rows, np.int32)
    result = StepResult()
    sampler.sample(logits_of(seeds), rows, np.full(len(rows), LENGTH, np.int64), result, masks)
    return result


def test_a_row_is_sampled_as_if_it_were_alone(sampler):
    begin(sampler, [start(row, params, row) for row, params in enumerate(KINDS)])
    rows = list(range(len(KINDS)))
    together = draw(sampler, rows, rows)
    assert not together.errors
    for row in rows:
        alone = draw(sampler, [row], [row])
        assert alone.tokens[0] == together.tokens[row], KINDS[row]
        assert alone.logprobs[0] == together.logprobs[row], KINDS[row]
        assert (alone.logprobs[0] is None) == (KINDS[row].logprobs is None)


@pytest.mark.parametrize("row", range(1, len(KINDS)))
def test_every_parameter_has_an_effect_and_leaves_with_its_request(sampler, row):
    params = KINDS[row]

    def answers():
        results = [draw(sampler, [0], [seed]) for seed in range(40) if not begin(sampler, [start(0, params, seed)])]
        return [(result.tokens[0], result.logprobs[0]) for result in results]

    special = answers()
    params = SamplingParams(temperature=params.temperature)
    plain = answers()
    assert special != plain
    fresh = Sampler(Rows(1, 64, 16), VOCAB)
    for seed, (token, logprobs) in enumerate(plain):
        begin(fresh, [start(0, params, seed)])
        assert draw(fresh, [0], [seed]).tokens[0] == token
        assert logprobs is None


def test_masks_are_of_their_rows_alone():
    rows = Rows(8, 64, 16)
    sampler = Sampler(rows, VOCAB)
    seeds = range(len(KINDS[:8]))
    for row in seeds:
        sampled = start(row, KINDS[row], row)
        rows.begin(sampled)
        sampler.begin(sampled)
    plain = draw(sampler, seeds, seeds).tokens
    words = -(-VOCAB // 32)
    rng = np.random.default_rng(3)
    masks = [None if row % 2 else rng.integers(0, 1 << 32, words + 1, dtype=np.uint32).tobytes() for row in seeds]
    masks[4] = np.array([1 << 9] + [0] * words, np.uint32).tobytes()
    found = draw(sampler, seeds, seeds, masks).tokens
    assert found[1::2] == plain[1::2]
    assert found[4] == 9
    for row in range(0, 8, 2):
        assert masks[row][found[row] >> 3] >> (found[row] & 7) & 1
    masks[0] = bytes(4 * words)
    failed = draw(sampler, seeds, seeds, masks)
    assert failed.tokens == [-1, *found[1:]]
    assert "no token may be chosen" in failed.errors[0]
