"""Mixtures of experts: a row gives what the linears of its experts give it, whoever else is in the step."""

import numpy as np
import pytest

from quire.backends.cpu import _native as native

pytestmark = pytest.mark.usefixtures("isa", "threads")
HIDDEN, INNER = 96, 160
KINDS = [("float32", None, 0), ("float16", None, 0), ("bfloat16", None, 0), ("float32", "int8", 0), ("float32", "int8", 32),
         ("float32", "int4", 32)]  # fmt: skip


def packed(rng, count, n, k, kind=KINDS[0], gated=False):
    """One linear of each expert, and its weights [n, k] (gate, up) in float32."""
    dtype, quantize, group = kind
    weights = (rng.standard_normal((count, 1 + gated, n, k)) / k**0.5).astype(np.float32)
    stored = weights.astype(np.float16) if dtype == "float16" else weights
    if dtype == "bfloat16":
        stored = (weights.view(np.uint32) >> 16).astype(np.uint16)
    return tuple(native.pack_linear(list(each), quantize, group, gated) for each in stored), weights


def make(count, taken, kind=KINDS[0], sum_to_one=True, gated=True, hidden=HIDDEN, inner=INNER, seed=0, **choice):
    rng = np.random.default_rng(seed)
    up, wide_up = packed(rng, count, inner, hidden, kind, gated)
    down, wide_down = packed(rng, count, hidden, inner, kind)
    return native.Experts(up, down, taken, sum_to_one, **choice), (up, down), (wide_up, wide_down)


def inputs(m, count, hidden=HIDDEN, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, hidden)).astype(np.float32), rng.standard_normal((m, count)).astype(np.float32)


def run(experts, x, scores, taken, inner=INNER, out=None, accumulate=False, activation="silu"):
    out = np.full(x.shape, np.nan, np.float32) if out is None else out
    rows, inside = (np.full((len(x) * taken, width), np.nan, np.float32) for width in (x.shape[1], inner))
    native.experts(experts, x, scores, out, rows, inside, accumulate, activation)
    return out


def expected(weights, x, scores, taken, sum_to_one=True, correction=None, sigmoid=False, scale=1.0):
    """In float64."""
    ups, downs = (each.astype(np.float64) for each in weights)
    out = np.zeros(x.shape)
    for row, score in enumerate(scores.astype(np.float64)):
        shares = 1 / (1 + np.exp(-score)) if sigmoid else np.exp(score - score.max()) / np.exp(score - score.max()).sum()
        chosen = np.argsort(-(shares if correction is None else shares + correction), kind="stable")[:taken]
        total = (shares[chosen].sum() if sum_to_one else 1) / scale
        for e in chosen:
            gate, up = (ups[e] @ x[row].astype(np.float64)) if len(ups[e]) == 2 else (None, ups[e][0] @ x[row])
            inner = up * gate / (1 + np.exp(-gate)) if gate is not None else up / (1 + np.exp(-up))
            out[row] += shares[e] / total * (downs[e][0] @ inner)
    return out


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize(("count", "taken", "gated"), [(1, 1, True), (5, 1, False), (8, 3, True), (130, 7, True), (6, 6, False)])
def test_matches_float64(count, taken, gated, sum_to_one):
    experts, _, weights = make(count, taken, sum_to_one=sum_to_one, gated=gated)
    for m in [1, 2, 9, 40]:
        x, scores = inputs(m, count)
        exact = expected(weights, x, scores, taken, sum_to_one)
        assert np.abs(run(experts, x, scores, taken) - exact).max() < 1e-5
        residual = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
        added = run(experts, x, scores, taken, out=residual.copy(), accumulate=True)
        assert np.array_equal(added, residual + run(experts, x, scores, taken))


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize(("count", "taken"), [(1, 1), (8, 3), (130, 7)])
def test_choices_by_shares(count, taken, sigmoid, corrected, sum_to_one):
    """Of sigmoids, or of a softmax; what is chosen by is not what is weighed by; alone, and among so many that threads divide them."""
    correction = (np.random.default_rng(5).standard_normal(count) / 4).astype(np.float32) if corrected else None
    choice = {"sum_to_one": sum_to_one, "correction": correction, "sigmoid": sigmoid, "scale": 2.5}
    experts, _, weights = make(count, taken, **choice)
    for m in [1, 3, 40, 300]:
        x, scores = inputs(m, count)
        found = run(experts, x, scores, taken)
        part = slice(0, 40)
        assert np.abs(found[part] - expected(weights, x[part], scores[part], taken, **choice)).max() < 2e-5
        for row in (0, m // 2, m - 1):
            assert np.array_equal(run(experts, x[row : row + 1], scores[row : row + 1], taken)[0], found[row])


def test_shares_that_vanish():
    """All of them: nothing is added, and nothing is NaN; infinite scores are sigmoids of 0 and 1."""
    experts, _, _ = make(4, 2, sigmoid=True, correction=np.zeros(4, np.float32))
    x, _ = inputs(3, 4)
    found = run(experts, x, np.array([[-200] * 4, [-np.inf, np.inf, 0, -np.inf], [0, np.nan, 0, 0]], np.float32), 2)
    assert not found[0].any()
    assert np.isfinite(found[1]).all()
    assert np.isnan(found[2]).all()
    experts, _, _ = make(4, 2, correction=np.array([0, 0, 2, 2], np.float32))
    found = run(experts, x, np.array([[200, 200, 0, 0], [np.inf, 0, 0, 0], [-np.inf] * 4], np.float32), 2)
    assert not found[0].any()
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_expert_gives_what_its_linears_give(kind):
    """Of one expert, whose weight is 1: bit for bit."""
    experts, (up, down), _ = make(7, 1, kind)
    assert experts.nbytes == sum(each.nbytes for each in (*up, *down))
    for m in [1, 3, 8, 70, 400]:
        x, scores = inputs(m, 7, seed=m)
        found = run(experts, x, scores, 1)
        for e in range(7):
            rows = np.flatnonzero(scores.argmax(1) == e)
            inner, out = np.empty((len(rows), INNER), np.float32), np.empty((len(rows), HIDDEN), np.float32)
            native.linear(up[e], x[rows], inner, None, False, "silu")
            native.linear(down[e], inner, out)
            assert np.array_equal(found[rows], out)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_alone_and_among_others(kind):
    hidden, inner = 576, 1152  # so many panels that a few rows may go against several at once
    experts, _, _ = make(9, 3, kind, hidden=hidden, inner=inner)
    x, scores = inputs(300, 9, hidden)
    scores[::4] = scores[0]  # and a crowd at some
    whole = run(experts, x, scores, 3, inner)
    for threads in [1, 2, 3]:
        native.set_num_threads(threads)
        for m in [1, 1, 1, 2, 3, 5, 8, 17, 40, 111, 300] * 2:  # the ways to read the weights take turns
            first = int(np.random.default_rng(m).integers(0, 300 - m + 1))
            part = slice(first, first + m)
            assert np.array_equal(run(experts, x[part], scores[part], 3, inner), whole[part]), (threads, m)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_biases(kind, gated):
    """Of an expert's linears, added before its share is taken of it: of one expert alone bit for bit what they give."""
    _, (up, down), _ = make(7, 1, kind, gated=gated)
    rng = np.random.default_rng(4)
    up_bias, down_bias = (rng.standard_normal((7, width)).astype(np.float32) for width in ((1 + gated) * INNER, HIDDEN))
    experts = native.Experts(up, down, 1, True, up_bias, down_bias)
    activation = "swiglu_oai" if gated else "gelu"
    for m in [1, 3, 70]:
        x, scores = inputs(m, 7, seed=m)
        found = run(experts, x, scores, 1, activation=activation)
        for e in range(7):
            rows = np.flatnonzero(scores.argmax(1) == e)
            inner, out = np.empty((len(rows), INNER), np.float32), np.empty((len(rows), HIDDEN), np.float32)
            native.linear(up[e], x[rows], inner, up_bias[e], False, activation)
            native.linear(down[e], inner, out, down_bias[e])
            assert np.array_equal(found[rows], out)
    x, scores = inputs(30, 7)
    both, without = (run(native.Experts(up, down, 3, True, *given), x, scores, 3, activation=activation)
                     for given in ((up_bias, down_bias), (up_bias, 0 * down_bias)))  # fmt: skip
    shares = np.exp(scores.astype(np.float64))
    shares[np.argsort(np.argsort(-scores, axis=1), axis=1) >= 3] = 0
    np.testing.assert_allclose(both - without, shares / shares.sum(1, keepdims=True) @ down_bias, atol=2e-5)


def test_equal_scores_take_the_first():
    experts, _, _ = make(6, 2)
    x, _ = inputs(3, 6)
    scores = np.array([[1, 1, 1, 1, 1, 1], [0, 3, 1, 3, 3, 0], [-np.inf] * 6], np.float32)
    found = run(experts, x, scores, 2)
    clear = np.array([[9, 9, 0, 0, 0, 0], [0, 9, 0, 9, 0, 0]], np.float32)
    assert np.array_equal(found[:2], run(experts, x[:2], clear, 2))
    assert np.isnan(found[2]).all()  # softmax of nothing but -inf


def test_what_is_not_finite_stays_in_its_row():
    experts, _, _ = make(6, 2)
    x, scores = inputs(12, 6)
    clean = run(experts, x, scores, 2)
    scores[3, 4], scores[7, 0], x[9, 5] = np.nan, np.inf, np.nan
    found = run(experts, x, scores, 2)
    others = [row for row in range(12) if row not in (3, 7, 9)]
    assert np.array_equal(found[others], clean[others])
    assert np.isnan(found[[3, 7, 9]]).all()


def test_experts_that_nobody_takes_are_not_read():
    rng = np.random.default_rng(0)
    up, down = packed(rng, 4, INNER, HIDDEN, gated=True)[0], packed(rng, 3, HIDDEN, INNER)[0]
    bad = native.pack_linear(np.full((HIDDEN, INNER), np.nan, np.float32))
    experts = native.Experts(up, (*down, bad), 2, True)
    x, scores = inputs(20, 4)
    scores[:, 3] = -50.0
    assert np.isfinite(run(experts, x, scores, 2)).all()


def test_out_may_be_x():
    experts, _, _ = make(5, 2)
    x, scores = inputs(33, 5)
    clean = run(experts, x, scores, 2)
    assert np.array_equal(run(experts, x, scores, 2, out=x), clean)


@pytest.mark.parametrize("choice", [{}, {"sigmoid": True, "correction": np.linspace(0, 0.3, 8, dtype=np.float32)}], ids=["", "shares"])
def test_a_recording_chooses_anew(choice):
    experts, _, _ = make(8, 2, **choice)
    x, scores = inputs(4, 8)
    out, rows, inner = np.empty_like(x), np.empty((8, HIDDEN), np.float32), np.empty((8, INNER), np.float32)
    calls = native.Recording()
    with calls:
        native.experts(experts, x, scores, out, rows, inner, False, "silu")
    other_x, other_scores = inputs(4, 8, seed=9)
    x[:], scores[:] = other_x, other_scores
    calls.run()
    assert np.array_equal(out, run(experts, other_x, other_scores, 2))


def test_what_comes_next_changes_nothing():
    experts, _, _ = make(8, 2, hidden=576, inner=320)
    x, scores = inputs(20, 8, 576)
    clean = run(experts, x, scores, 2, 320)
    experts.set_then(native.pack_linear(np.ones((500, 576), np.float32)))
    assert np.array_equal(run(experts, x, scores, 2, 320), clean)


def test_wrong_use():
    rng = np.random.default_rng(0)
    up, down = packed(rng, 3, INNER, HIDDEN, gated=True)[0], packed(rng, 3, HIDDEN, INNER)[0]
    other = packed(rng, 1, INNER, HIDDEN, ("float16", None, 0), True)[0]
    for args, says in [
        (((), (), 1, True), "up: at least one expert"),
        ((up, down[:2], 1, True), "as many experts: 3 and 2"),
        (((*up[:2], *other), down, 1, True), "up: the linears of all experts must be alike"),
        ((up, up, 1, True), r"down must be \[96, 160\], not \[160, 96\]"),
        ((up, down, 0, True), "taken is 0: choose from 1 to the 3 experts"),
        ((up, down, 4, True), "taken is 4"),
        ((up, down, 1, True, np.zeros((3, INNER), np.float32)), r"up_bias must be \[3, 320\], not \[3, 160\]"),
        ((up, down, 1, True, None, np.zeros((2, HIDDEN), np.float32)), r"down_bias must be \[3, 96\], not \[2, 96\]"),
        ((up, down, 1, True, None, None, np.zeros(4, np.float32)), "correction must"),
    ]:
        with pytest.raises(ValueError, match=says):
            native.Experts(*args)
    with pytest.raises(TypeError):
        native.Experts(list(up), list(down), 1, True)
    experts = native.Experts(up, down, 2, True)
    x, scores = inputs(4, 3)
    rows, inner, out = np.empty((8, HIDDEN), np.float32), np.empty((8, INNER), np.float32), np.empty_like(x)
    for call, says in [
        ((x[:, :90], scores, out, rows, inner), r"x must be \[4, 96\]"),
        ((x, scores[:3], out, rows, inner), r"scores must be \[4, 3\]"),
        ((x, scores, out[:3], rows, inner), r"out must be \[4, 96\]"),
        ((x, scores, out, rows[:7], inner), r"rows must be \[8, 96\], not \[7, 96\]"),
        ((x, scores, out, rows, inner[:, :159]), r"inner must be \[8, 160\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            native.experts(experts, *call)
    native.experts(experts, x[:0], scores[:0], out[:0], rows[:0], inner[:0])
