"""The draw: the reference against float64 and against the CPU's kernel, the Triton kernels (interpreted) against the reference."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.backends.cuda.kernels import sampling as kernels
from quire.backends.cuda.kernels import selection
from quire.backends.cuda.reference import sampling as reference
from quire.backends.cuda.sampling_tensors import SamplingTensors

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
DTYPES = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "seed": np.uint64, "position": np.int64}
PLAIN = [
    {},
    {"temperature": 0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1e-30},
    {"temperature": 1e-42},
    {"temperature": 1e30},
]
TRUNCATED = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": 10**6}, {"top_k": 200}, {"top_p": 0.0}, {"top_p": 1e-6}, {"top_p": 0.5}, {"top_p": 0.95},
    {"top_p": 0.999999}, {"min_p": 0.1}, {"min_p": 1.0}, {"min_p": 1e-6}, {"top_k": 20, "top_p": 0.7}, {"min_p": 0.01, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5}, {"temperature": 0, "top_k": 3, "top_p": 0.1},
    {"temperature": 3.0, "top_p": 0.9}, {"temperature": 1e-30, "top_p": 0.9, "min_p": 0.5},
]  # fmt: skip


def tensors(params):
    values = {name: np.array([p.get(name, DEFAULTS[name]) for p in params], dtype) for name, dtype in DTYPES.items()}
    values["seed"] = values["seed"].view(np.int64)
    return SamplingTensors(**{name: torch.from_numpy(value) for name, value in values.items()})


def draw(module, logits, params):
    """Tokens and statuses, as lists."""
    logits = logits if isinstance(logits, torch.Tensor) else torch.from_numpy(logits)
    before = logits.clone()
    tokens, status = module.sample(logits, tensors(params))
    assert tokens.dtype == status.dtype == torch.int32
    assert torch.equal(before.nan_to_num(7.0), logits.nan_to_num(7.0))
    return tokens.tolist(), status.tolist()


def rows_of(params, vocab, seed=0):
    """Logits of different widths, and a seed and a position for each of params; some of them large."""
    rng = np.random.default_rng(seed + vocab)
    logits = (rng.standard_normal((len(params), vocab)) * rng.choice([0.1, 1, 4], (len(params), 1))).astype(np.float32)
    return logits, [p | {"seed": int(rng.integers(2**64, dtype=np.uint64)), "position": int(rng.integers(2**40))} for p in params]


def uniform(seed, position):
    """Philox 4x32-10 in whole numbers, written from the paper."""
    key, counter = [seed % 2**32, seed >> 32], [position % 2**32, position >> 32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return ((counter[0] * 2**32 + counter[1]) >> 11) / 2**53


def kept(logits, p, nudge):
    """What remains to draw from: ascending ids and their probabilities, in float64. nudge: scales top_p and min_p."""
    z = logits.astype(np.float64)
    temperature = float(np.float32(p["temperature"]))
    if temperature == 0:
        return np.array([z.argmax()]), np.ones(1)
    w = np.exp(np.maximum((z - z.max()) / temperature, -1e4))
    ids = np.argsort(-z, kind="stable")
    ids = ids[(w[ids] > 0) & (w[ids] >= min(1, np.float32(p["min_p"]) * nudge))]
    ids = ids[: p["top_k"]] if p["top_k"] > 0 else ids
    if p["top_p"] < 1:
        mass = np.cumsum(w[ids])
        ids = ids[: int(np.searchsorted(mass, np.float32(p["top_p"]) * nudge * mass[-1])) + 1]
    ids = np.sort(ids)
    return ids, w[ids] / w[ids].sum()


def acceptable(logits, p):
    """The tokens that the law allows for a seed and a position, with some room for float32 at each border."""
    p = DEFAULTS | p
    u, allowed = uniform(p["seed"], p["position"]), set()
    for nudge in (1 - 3e-6, 1.0, 1 + 3e-6):
        ids, probability = kept(logits, p, nudge)
        for v in (u - 3e-6, u, u + 3e-6):
            allowed.add(int(ids[min(int(np.searchsorted(np.cumsum(probability), v, side="right")), len(ids) - 1)]))
    return allowed


@triton.jit
def _uniforms(seed, position, out, count):
    for i in range(count):
        tl.store(out + i, selection.uniform(tl.load(seed + i), tl.load(position + i)))


def test_uniform_is_philox():
    """The known answer of Random123 for a zero key and counter (kat_vectors), and whole numbers for others."""
    assert uniform(0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53
    rng = np.random.default_rng(1)
    pairs = [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**63 - 1), (2**63, 2**31), (2**63 + 5, 2**32), (2**32, 2**31 - 1)]
    pairs += [(int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(2**63))) for _ in range(20)]
    seed = torch.from_numpy(np.array([s for s, _ in pairs], np.uint64).view(np.int64))
    position = torch.tensor([p for _, p in pairs])
    expected = [uniform(s, p) for s, p in pairs]
    assert reference._uniform(seed, position).tolist() == expected
    out = torch.zeros(len(pairs), dtype=torch.float64)
    _uniforms[(1,)](seed, position, out, len(pairs))
    assert out.tolist() == expected


@pytest.mark.parametrize("vocab", [1, 5, 97, 1000, 5003])
def test_reference_draws_from_what_the_law_keeps(vocab):
    logits, params = rows_of((PLAIN + TRUNCATED) * 6, vocab)
    tokens, status = draw(reference, logits, params)
    assert not any(status)
    for row, p in enumerate(params):
        assert tokens[row] in acceptable(logits[row], p), (row, p)


@pytest.mark.parametrize("vocab", [1, 5, 97, 1000, 5003, 40_000])
def test_reference_draws_what_the_cpu_draws(vocab):
    native = pytest.importorskip("quire.backends.cpu._native")
    logits, params = rows_of((PLAIN + TRUNCATED) * (20 if vocab < 10_000 else 3), vocab, seed=1)
    logits[::7] = np.round(logits[::7], 1)  # ties
    logits[3, : vocab // 2], logits[4, 0], logits[5, -1], logits[6, :] = -np.inf, np.nan, np.inf, -np.inf
    arrays = {name: np.array([p.get(name, DEFAULTS[name]) for p in params], dtype) for name, dtype in DTYPES.items()}
    tokens, status = np.zeros(len(params), np.int32), np.zeros(len(params), np.int32)
    native.sample(logits, tokens, status, **arrays)
    assert draw(reference, logits, params) == (tokens.tolist(), status.tolist())


@pytest.mark.parametrize("vocab", [1, 5, 97, 1000])
def test_kernels_draw_what_the_reference_draws(vocab):
    some = {1: TRUNCATED[::3], 5: TRUNCATED[1::3], 97: TRUNCATED[::2], 1000: TRUNCATED[1::2]}  # a row takes the interpreter long
    logits, params = rows_of(PLAIN + some[vocab], vocab, seed=2)
    assert draw(kernels, logits, params) == draw(reference, logits, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_of_several_chunks_and_of_all_dtypes(dtype):
    """More than one chunk of tokens, and more than one tile of runs. 16 bits make many ties."""
    vocab = 5003
    some = [{}, {"temperature": 0}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.95, "temperature": 0.7}, {"min_p": 0.02}, {"top_k": 3000}]
    logits, params = rows_of(some, vocab, seed=3)
    logits = torch.from_numpy(logits).to(dtype)
    padded = torch.full((len(some), vocab + 21), math.nan, dtype=dtype)  # rows that are apart
    padded[:, :vocab] = logits
    expected = draw(reference, logits, params)
    assert draw(kernels, padded[:, :vocab], params) == expected
    for row, p in enumerate(params):
        assert expected[0][row] in acceptable(logits[row].float().numpy(), p)


def test_ties_go_to_the_lower_id():
    z = np.zeros((1, 200), np.float32)
    z[0, [20, 50, 51, 130]] = 3
    z[0, 0] = -0.0
    cases = [
        ({"temperature": 0}, {20}), ({"top_k": 2}, {20, 50}), ({"top_k": 3}, {20, 50, 51}), ({"top_k": 6}, {20, 50, 51, 130, 0, 1}),
        ({"top_k": 4, "top_p": 0.5}, {20, 50}), ({"top_k": 4, "top_p": 0.51}, {20, 50, 51}), ({"top_p": 0.0}, {20}),
        ({"top_k": 3, "top_p": 0.5, "min_p": 1.0}, {20, 50}), ({"min_p": 1.0}, {20, 50, 51, 130}),
    ]  # fmt: skip
    for module, count in ((reference, 60), (kernels, 1)):
        params = [p | {"seed": i} for p, _ in cases for i in range(count)]
        tokens, _ = draw(module, np.repeat(z, len(params), 0), params)
        for i, (p, expected) in enumerate(cases):
            found = set(tokens[i * count : (i + 1) * count])
            assert found == expected if module is reference else found <= expected, p
        assert tokens == draw(reference, np.repeat(z, len(params), 0), params)[0]


@pytest.mark.parametrize("module", [reference, kernels])
def test_damaged_logits_are_reported(module):
    logits = np.zeros((7, 100), np.float32)
    logits[0, 50], logits[1, 99], logits[2, 3], logits[3], logits[4, :99] = np.nan, np.nan, np.inf, -np.inf, -np.inf
    logits[5, :] = np.nan
    logits[6, :] = [np.inf] * 50 + [np.nan] * 50
    for p in ({}, {"temperature": 0}, {"top_p": 0.5, "top_k": 3}):
        tokens, status = draw(module, logits, [p] * 7)
        assert status == [1, 1, 1, 2, 0, 1, 1]
        assert tokens == [-1, -1, -1, -1, 99, -1, -1]
    none = SamplingTensors(**{f.name: getattr(tensors([{}]), f.name)[:0] for f in fields(SamplingTensors) if f.name != "truncates"})
    assert [len(x) for x in module.sample(torch.zeros(0, 100), none)] == [0, 0]


@pytest.mark.parametrize("module", [reference, kernels])
def test_logits_far_apart(module):
    """Of all sizes that float32 has: the search is over their bits, and ends."""
    z = np.zeros((1, 300), np.float32)
    z[0, :8] = [-3.4e38, -1e30, -1e-40, 1e-40, 0.0, 3.0, 2.999999, -1e38]
    z[0, 8:60] = -np.inf
    z[0, 60:] = -1e30
    large = z.copy()
    large[0, 100:103] = [3.3e38, 3.4e38, 3.4e38]
    cases = [(z, {"top_k": 2}), (z, {"top_k": 250}), (z, {"top_p": 0.8}), (z, {"top_p": 0.99}), (z, {"min_p": 0.04}), (large, {"top_k": 3})]
    cases += [(large, {"top_p": 0.6}), (large, {}), (large, {"temperature": 3e38, "top_p": 0.9}), (large, {"temperature": 0})]
    params = [p | {"seed": 9, "position": i} for i, (_, p) in enumerate(cases)]
    logits = np.concatenate([x for x, _ in cases])
    tokens, status = draw(module, logits, params)
    assert not any(status)
    for row, p in enumerate(params):
        assert tokens[row] in acceptable(logits[row], p), p


@pytest.mark.parametrize("module", [reference, kernels])
def test_a_row_is_drawn_as_if_it_were_alone(module):
    some = [{}, {"top_k": 5}, {"temperature": 0}, {"top_p": 0.7}, {"min_p": 0.05, "top_p": 0.9}]
    logits, params = rows_of(some, 333, seed=4)
    logits[1, 7] = np.nan
    tokens, status = draw(module, logits, params)
    assert draw(module, logits[::-1].copy(), params[::-1]) == (tokens[::-1], status[::-1])
    for row in (0, 3, 4):
        assert draw(module, logits[row : row + 1], params[row : row + 1]) == (tokens[row : row + 1], status[row : row + 1])


@pytest.mark.parametrize("module", [reference, kernels])
def test_no_row_truncates(module):
    """The host may say so; nothing is different then."""
    logits, params = rows_of(PLAIN, 500, seed=5)
    given = tensors(params)
    given.truncates = False
    tokens, status = module.sample(torch.from_numpy(logits), given)
    assert (tokens.tolist(), status.tolist()) == draw(module, logits, params)


def test_frequencies():
    logits = np.repeat(np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))[None], 20_000, 0)
    for p, expected in (({}, [0.5, 0.25, 0.15, 0.1]), ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0])):
        tokens, _ = draw(reference, logits, [p | {"seed": 5, "position": i} for i in range(len(logits))])
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / len(logits), expected, atol=4 * math.sqrt(0.25 / len(logits)))


MIXES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-3, 0.2, 0.7, 1.0, 1.3, 20.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 30, 66]),
        "top_p": st.one_of(st.sampled_from([1.0, 0.0]), st.floats(0, 1, width=32)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
        "seed": st.integers(0, 2**64 - 1),
        "position": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(p=MIXES, seed=st.integers(0, 1000), vocab=st.sampled_from([2, 33, 67, 300]), digits=st.sampled_from([0, 1, 6]))
def test_any_mix_of_parameters(p, seed, vocab, digits):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((1, vocab)) * 3, digits).astype(np.float32)
    logits[0, rng.random(vocab) < 0.1] = -np.inf
    logits[0, rng.integers(vocab)] = 1.0
    allowed = acceptable(logits[0], p)
    assert draw(reference, logits, [p])[0][0] in allowed
    assert draw(kernels, logits, [p])[0][0] in allowed
