"""The sampler: every step of its contract against a plain reference, and the same token whoever is next to it."""

import math

import numpy as np
import pytest

from quire.backends.cpu import _native as native
from quire.backends.cpu.sampler import Reported

pytestmark = pytest.mark.usefixtures("isa")


def flat(lists):
    start = np.cumsum([0] + [len(x) for x in lists], dtype=np.int32)
    return start, np.array([t for x in lists for t in x], np.int32)


def sample(logits, *, params=None, num_logprobs=None, mask=None):
    """params: one dict a row (or one for all). Returns tokens, status, and the log probabilities if asked for."""
    rows = len(logits)
    params = [params or {}] * rows if not isinstance(params, list) else params
    arrays = {}
    for name, dtype, default in (
        ("temperature", np.float32, 1.0), ("top_k", np.int32, 0), ("top_p", np.float32, 1.0), ("min_p", np.float32, 0.0),
        ("repetition_penalty", np.float32, 1.0), ("frequency_penalty", np.float32, 0.0), ("presence_penalty", np.float32, 0.0),
        ("seed", np.uint64, 0), ("position", np.int64, 0),
    ):  # fmt: skip
        arrays[name] = np.array([p.get(name, default) for p in params], dtype)
    for name in ("prompt", "output", "banned", "bias"):
        arrays[f"{name}_start"], arrays[f"{name}_ids"] = flat([list(p.get(name, ())) for p in params])
    arrays["bias_values"] = np.array([b for p in params for b in p.get("bias", {}).values()], np.float32)
    tokens, status = np.full(rows, -7, np.int32), np.full(rows, -7, np.int32)
    logs = {}
    if num_logprobs is not None:
        num_logprobs = np.array(num_logprobs, np.int32)
        width = max(0, *num_logprobs)
        logs = {"logprob": np.zeros(rows, np.float32), "rank": np.zeros(rows, np.int32),
                "top_ids": np.zeros((rows, width), np.int32), "top_logprobs": np.zeros((rows, width), np.float32)}  # fmt: skip
        arrays |= {"num_logprobs": num_logprobs, **logs}
    native.sample(logits, tokens, status, allowed_mask=mask, **arrays)
    return (tokens, status, logs) if logs else (tokens, status)


def order(z):
    """Ids, likeliest first, ties by lower id."""
    return np.argsort(-z, kind="stable").tolist()


def kept(logits, p, nudge=1.0):
    """What remains to draw from: ascending ids and their probabilities, in float64. nudge: scales top_p and min_p."""
    z = logits.astype(np.float64)
    z[list(p.get("banned", ()))] = -np.inf
    for t, b in p.get("bias", {}).items():
        z[t] += b
    for t in set(p.get("prompt", ())) | set(p.get("output", ())):
        r = np.float64(np.float32(p.get("repetition_penalty", 1)))
        z[t] = z[t] / r if z[t] > 0 else z[t] * r
    for t in set(p.get("output", ())):
        z[t] -= p.get("frequency_penalty", 0) * list(p["output"]).count(t) + p.get("presence_penalty", 0)
    temperature = p.get("temperature", 1)
    if temperature == 0:
        return np.array([z.argmax()]), np.ones(1)
    w = np.exp((z - z.max()) / temperature)
    ids = np.array(order(z))
    ids = ids[(w[ids] > 0) & (w[ids] >= min(1, np.float32(p.get("min_p", 0)) * nudge))]
    if p.get("top_k", 0) > 0:
        ids = ids[: p["top_k"]]
    if p.get("top_p", 1) < 1:
        mass = np.cumsum(w[ids])
        ids = ids[: max(1, int(np.searchsorted(mass, np.float32(p["top_p"]) * nudge * mass[-1])) + 1)]
    ids = np.sort(ids)
    return ids, w[ids] / w[ids].sum()


def acceptable(logits, p):
    """The tokens that the contract allows for a seed and position, with some room for float32 at each border."""
    u, allowed = native.uniform(p["seed"], p.get("position", 0)), set()
    for nudge in (1 - 3e-6, 1.0, 1 + 3e-6):
        ids, probability = kept(logits, p, nudge)
        for v in (u - 3e-6, u, u + 3e-6):
            allowed.add(int(ids[min(int(np.searchsorted(np.cumsum(probability), v, side="right")), len(ids) - 1)]))
    return allowed


def test_uniform_is_philox():
    """Known answers of Random123 for a zero key and counter, and for all ones (kat_vectors)."""
    assert native.uniform(0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53
    values = np.array([native.uniform(s, p) for s in range(40) for p in range(250)])
    assert len(set(values.tolist())) == len(values)
    assert abs(values.mean() - 0.5) < 0.01
    assert 0 <= values.min() < 0.001 < 0.999 < values.max() < 1
    assert native.uniform(2**64 - 1, 2**63) != native.uniform(2**32 - 1, 2**63)


SETTINGS = [
    {}, {"temperature": 0}, {"temperature": 0.3}, {"temperature": 5.0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_k": 7},
    {"top_k": -1}, {"top_k": 10**6}, {"top_k": 200}, {"top_p": 0.0}, {"top_p": 0.5}, {"top_p": 0.95}, {"top_p": 0.999999}, {"min_p": 0.1},
    {"min_p": 1.0}, {"min_p": 1e-6}, {"top_k": 20, "top_p": 0.7}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
    {"min_p": 0.01, "top_p": 0.8},
    {"repetition_penalty": 1.3, "prompt": [1, 2, 2, 3], "output": [3, 4, 4]},
    {"repetition_penalty": 0.5, "prompt": [0], "output": []},
    {"frequency_penalty": 0.7, "presence_penalty": 0.2, "prompt": [5], "output": [1, 1, 1, 6], "temperature": 0.8},
    {"frequency_penalty": -1.5, "output": [2] * 6, "top_p": 0.6},
    {"banned": [0, 3, 4], "temperature": 0}, {"bias": {2: 100.0, 5: -100.0}}, {"bias": {2: -3.0, 4: 2.5, 6: 1.0}, "top_k": 3},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1, "output": [1, 0, 1], "prompt": [2, 2],
     "banned": [1], "bias": {0: 1.0}, "temperature": 0.9, "min_p": 0.001, "top_k": 40, "top_p": 0.97},
]  # fmt: skip


@pytest.mark.parametrize("vocab", [8, 65, 1025, 5003, 40_009])
def test_draws_from_what_the_contract_keeps(vocab):
    rng = np.random.default_rng(vocab)
    params = [s | {"seed": int(rng.integers(2**63)), "position": int(rng.integers(10**6))} for s in SETTINGS for _ in range(6)]
    logits = (rng.standard_normal((len(params), vocab)) * rng.choice([0.1, 1, 4], (len(params), 1))).astype(np.float32)
    tokens, status = sample(logits, params=params)
    assert not status.any()
    for row, p in enumerate(params):
        assert tokens[row] in acceptable(logits[row], p), (row, p)
    # The same row alone, and in another place.
    for row in range(0, len(params), 7):
        assert sample(logits[row : row + 1], params=[params[row]])[0][0] == tokens[row]
    assert np.array_equal(sample(logits[::-1].copy(), params=params[::-1])[0], tokens[::-1])


def test_ties_go_to_the_lower_id():
    z = np.zeros((1, 200), np.float32)
    z[0, [20, 50, 51, 130]] = 3
    assert sample(z, params={"temperature": 0})[0][0] == 20
    several = np.repeat(z, 60, 0)
    for params, expected in (({"top_k": 2}, {20, 50}), ({"top_k": 3}, {20, 50, 51}), ({"top_k": 6}, {20, 50, 51, 130, 0, 1}),
                             ({"top_k": 4, "top_p": 0.5}, {20, 50}), ({"top_k": 4, "top_p": 0.51}, {20, 50, 51})):  # fmt: skip
        rows = [params | {"seed": i} for i in range(60)]
        assert set(sample(several, params=rows)[0].tolist()) == expected


def test_frequencies():
    z = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))[None]
    rows = 20_000
    logits = np.repeat(z, rows, 0)
    for p, expected in (
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.5}, [0.7246, 0.1812, 0.0652, 0.029]),
    ):
        tokens, _ = sample(logits, params=[p | {"seed": 5, "position": i} for i in range(rows)])
        counts = np.bincount(tokens, minlength=4) / rows
        np.testing.assert_allclose(counts, expected, atol=4 * math.sqrt(0.25 / rows))
        assert (counts[np.array(expected) == 0] == 0).all()


@pytest.mark.parametrize("vocab", [3, 64, 1000, 4097, 20_011])
def test_log_probabilities_are_those_of_the_raw_logits(vocab):
    rng = np.random.default_rng(vocab)
    logits = np.round(rng.standard_normal((6, vocab)) * 3, 1).astype(np.float32)  # rounded, for ties
    params = [{"temperature": 0.1, "banned": [order(z)[0]], "seed": i} for i, z in enumerate(logits)]
    wanted = [0, 1, 3, -1, min(vocab, 50), vocab]
    tokens, status, logs = sample(logits, params=params, num_logprobs=wanted)
    assert not status.any()
    for row, (z, n) in enumerate(zip(logits.astype(np.float64), wanted, strict=True)):
        if n < 0:
            continue
        exact = z - z.max() - np.log(np.exp(z - z.max()).sum())
        assert abs(logs["logprob"][row] - exact[tokens[row]]) < 2e-6 * max(1, abs(exact[tokens[row]]))
        assert logs["rank"][row] == 1 + (z > z[tokens[row]]).sum()
        assert logs["top_ids"][row, :n].tolist() == order(z)[:n]
        np.testing.assert_allclose(logs["top_logprobs"][row, :n], exact[order(z)[:n]], rtol=2e-6, atol=2e-6)
        assert (logs["top_ids"][row, n:] == -1).all()
        assert (logs["top_logprobs"][row, n:] == -np.inf).all()


def test_masks():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((40, 77)).astype(np.float32)
    allowed = rng.random((40, 77)) < 0.1
    allowed[:, 76] = True
    allowed[5] = False
    padded = np.zeros((40, 96), bool)
    padded[:, :77] = allowed
    mask = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    for given in (mask, mask.view(np.int32)):
        tokens, status = sample(logits, params=[{"seed": i} for i in range(40)], mask=given)
        assert status[5] == 2
        assert tokens[5] == -1
        rest = np.arange(40) != 5
        assert not status[rest].any()
        assert allowed[rest, tokens[rest]].all()


def test_damaged_logits_are_reported():
    logits = np.zeros((6, 100), np.float32)
    logits[0, 50], logits[1, 99], logits[2, 3], logits[3], logits[4, :99] = np.nan, np.nan, np.inf, -np.inf, -np.inf
    for p in ({}, {"temperature": 0}, {"top_p": 0.5}, {"repetition_penalty": 2.0, "output": [1]}):
        tokens, status = sample(logits, params=p)
        assert status.tolist() == [1, 1, 1, 2, 0, 0]
        assert tokens[:5].tolist() == [-1, -1, -1, -1, 99]
    tokens, status, logs = sample(logits, params={}, num_logprobs=[2] * 6)
    assert logs["rank"][:5].tolist() == [-1, -1, -1, -1, 1]
    assert logs["top_ids"][4].tolist() == [99, 0]
    assert logs["logprob"][4] == 0
    banned = {"banned": list(range(100))}
    assert sample(logits[5:], params=banned)[1][0] == 2


def test_large_vocabulary_and_flat_distributions():
    """Where the cheap bounds leave many candidates."""
    vocab = 50_000
    rng = np.random.default_rng(3)
    logits = np.stack([rng.standard_normal(vocab) * 1e-3, np.zeros(vocab), rng.standard_normal(vocab), np.linspace(-5, 5, vocab)]).astype(
        np.float32
    )
    for p in ({"top_p": 0.9}, {"top_p": 1 - 2**-24}, {"top_k": 20_000}, {"top_k": 600, "top_p": 0.5}, {"min_p": 0.5, "top_p": 0.3}, {}):
        tokens, status = sample(logits, params=p | {"seed": 11, "position": 12})
        assert not status.any()
        for row, z in enumerate(logits):
            assert tokens[row] in acceptable(z, p | {"seed": 11, "position": 12}), (row, p)


def test_wrong_calls():
    logits = np.zeros((2, 10), np.float32)
    for wrong in ({"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"min_p": 1.5}, {"top_p": -0.1},
                  {"repetition_penalty": 0.0}, {"prompt": [10]}, {"output": [-1]}, {"banned": [10]}, {"bias": {10: 1.0}},
                  {"bias": {1: math.nan}}, {"frequency_penalty": math.inf}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample(logits, params=wrong)
    with pytest.raises(ValueError, match="allowed_mask"):
        sample(np.zeros((2, 33), np.float32), params={}, mask=np.zeros((2, 1), np.uint32))
    with pytest.raises(TypeError, match="allowed_mask"):
        sample(logits, params={}, mask=np.zeros((2, 1), np.int64))
    for index in ([0, 1], [-2, 0]):
        with pytest.raises(ValueError, match="mask_index"):
            native.sample(
                logits, np.zeros(2, np.int32), np.zeros(2, np.int32), temperature=np.ones(2, np.float32), seed=np.zeros(2, np.uint64),
                position=np.zeros(2, np.int64), allowed_mask=np.zeros((1, 1), np.uint32), mask_index=np.array(index, np.int32),
            )  # fmt: skip
    with pytest.raises(TypeError, match="logits"):
        sample(logits.astype(np.float64), params={})


@pytest.mark.parametrize("vocab", [1, 7, 97, 2500])
def test_score_reports_what_sample_reports(isa, vocab):
    """Of tokens that are there already; bit for bit, with the same ranks and the same most likely ones."""
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((40, vocab)) * 3).astype(np.float32)
    logits[5, :] = 1.5  # all the same
    logits[6, : vocab // 2] = -np.inf
    count = np.array([min(vocab, i % 6) for i in range(40)], np.int32)
    drawn = sample_with_logprobs(logits, count)
    scored = Reported(count)
    status = np.full(40, 9, np.int32)
    native.score(logits, drawn["tokens"], status, **scored.arrays())
    assert not status.any()
    assert [scored.entry(i) for i in range(40)] == drawn["entries"]


def sample_with_logprobs(logits, count):
    reported = Reported(count)
    tokens, status = np.zeros(len(logits), np.int32), np.zeros(len(logits), np.int32)
    at, ones = np.arange(len(logits)), np.ones(len(logits), np.float32)
    native.sample(logits, tokens, status, temperature=ones, seed=at.astype(np.uint64), position=at, **reported.arrays())
    return {"tokens": tokens, "entries": [reported.entry(i) for i in range(len(logits))]}


def test_score_of_the_other_tokens(isa):
    """A token that is no sampler's choice, and one that can't be; logits that are no numbers end in a status."""
    logits = np.zeros((4, 33), np.float32)
    logits[0, 4], logits[1, 4], logits[2, 7], logits[3, :] = 2.0, -np.inf, np.nan, -np.inf
    reported, status = Reported(np.array([0, 2, 0, 0], np.int32)), np.zeros(4, np.int32)
    native.score(logits, np.array([9, 4, 0, 0], np.int32), status, **reported.arrays())
    assert status.tolist() == [0, 0, 1, 2]
    (value, rank), top = reported.entry(0).token, reported.entry(0).top
    assert (rank, top) == (2, [])
    assert value == pytest.approx(-np.log(32 + np.exp(2.0)), rel=1e-6)
    assert reported.entry(1).token == (-np.inf, 33)
    assert [token for token, _ in reported.entry(1).top] == [0, 1]
    with pytest.raises(ValueError, match=r"tokens\[0\] is 33"):
        native.score(logits, np.array([33, 0, 0, 0], np.int32), status, **reported.arrays())


def test_only_the_greatest_logit_has_the_greatest_logprob(isa):
    """Logits one step of float32 apart, whose log-probabilities would round to the same number: evaluation harnesses call a token
    the greedy choice where its log-probability equals the greatest one."""
    logits = np.full((2, 50_000), 0.001, np.float32)
    logits[:, 11] = np.float32(0.0010001)
    logits[:, 40] = np.nextafter(np.float32(0.0010001), np.float32(1))
    reported, status = Reported(np.array([3, 3], np.int32)), np.zeros(2, np.int32)
    native.score(logits, np.array([11, 40], np.int32), status, **reported.arrays())
    second, first = reported.entry(0), reported.entry(1)
    assert (first.token[1], second.token[1]) == (1, 2)
    assert first.top == second.top
    assert [token for token, _ in first.top[:2]] == [40, 11]
    assert first.token[0] == first.top[0][1] > first.top[1][1] == second.token[0]
