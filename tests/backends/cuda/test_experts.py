"""Mixtures of experts: in PyTorch and in Triton, against float64."""

import math

import numpy as np
import pytest
import torch

from backends.cuda.layer_cases import ACTIVATIONS, GATED, assert_close, every_dtype, exact, normal, same
from quire.backends.cuda.kernels import experts as kernels
from quire.backends.cuda.kernels.linear import FLOAT32, TILES
from quire.backends.cuda.quantize import quantize_weight
from quire.backends.cuda.reference import experts as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""numpy's, of NaN and infinities in the interpreter."""
both = pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "kernels"])


def routed(scores, taken, sum_to_one):
    """In float64: chosen, weights."""
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :taken]
    shares = np.exp(scores - scores.max(1, keepdims=True))
    own = np.take_along_axis(shares, chosen, 1)
    return chosen, own / (own if sum_to_one else shares).sum(1, keepdims=True)


def mixed(x, up, down, chosen, weights, activation="silu", gated=True, biases=None):
    """In float64."""
    out = np.zeros_like(x)
    up_bias, down_bias = biases or (np.zeros(weight.shape[:2]) for weight in (up, down))
    for row, (those, shares) in enumerate(zip(chosen, weights, strict=True)):
        for expert, share in zip(those, shares, strict=True):
            inner = up[expert] @ x[row] + up_bias[expert]
            inner = GATED[activation](*np.split(inner, 2)) if gated else ACTIVATIONS[activation](inner)
            out[row] += share * (down[expert] @ inner + down_bias[expert])
    return out


def model(experts, hidden, inner, dtype, gated=True):
    """up, down; of a size that leaves what is in between ordinary numbers."""
    up = normal(2, experts, (1 + gated) * inner, hidden) / math.sqrt(hidden)
    return up.to(dtype), (normal(3, experts, hidden, inner) / math.sqrt(inner)).to(dtype)


def quantized_weights(weights, kind):
    """Numbers and scales of each expert's up, and down."""
    for weight in weights:
        numbers, scales = zip(*(quantize_weight(each, kind) for each in weight), strict=True)
        yield torch.stack(numbers), torch.stack(scales)


# ---- route


@both
@every_dtype
@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize(("rows", "experts", "taken"), [(1, 1, 1), (5, 4, 2), (3, 128, 8), (7, 40, 40), (2, 512, 10)])
def test_route(ops, dtype, sum_to_one, rows, experts, taken):
    scores = (normal(1, rows, experts) * 3).to(dtype)
    chosen, weights = ops.route(scores, taken, sum_to_one)
    expected = routed(exact(scores), taken, sum_to_one)
    assert (chosen.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert np.array_equal(chosen.numpy(), expected[0])
    assert np.allclose(exact(weights), expected[1], rtol=2e-6, atol=0)


@both
@every_dtype
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize(("rows", "experts", "taken"), [(1, 1, 1), (3, 128, 8), (7, 40, 40)])
def test_route_by_shares(ops, dtype, sigmoid, corrected, sum_to_one, rows, experts, taken):
    """What is chosen by is not what is weighed by."""
    scores = normal(1, rows, experts).to(dtype)
    correction = normal(2, experts) / 4 if corrected else None
    chosen, weights = ops.route(scores, taken, sum_to_one, sigmoid, correction, 2.5)
    wide = exact(scores)
    shares = 1 / (1 + np.exp(-wide)) if sigmoid else np.exp(wide) / np.exp(wide).sum(1, keepdims=True)
    by = shares.astype(np.float32) + (exact(correction).astype(np.float32) if corrected else 0)
    own = np.take_along_axis(shares, chosen.numpy().astype(np.int64), 1)
    assert np.allclose(exact(weights), 2.5 * own / (own.sum(1, keepdims=True) if sum_to_one else 1), rtol=4e-6, atol=0)
    # Of two that differ by a rounding either may come first.
    ranked = np.take_along_axis(by, chosen.numpy().astype(np.int64), 1)
    assert np.allclose(ranked, -np.sort(-by, axis=1)[:, :taken], rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == taken for row in chosen.tolist())


@both
def test_shares_that_vanish(ops):
    scores = torch.tensor([[-200.0] * 4, [-math.inf, math.inf, 0.0, -math.inf], [0.0, math.nan, 0.0, 0.0]])
    chosen, weights = ops.route(scores, 2, True, True, torch.zeros(4), 1.0)
    assert chosen.tolist() == [[0, 1], [1, 2], [0, 1]]
    assert weights[:2].tolist() == [[0.0, 0.0], pytest.approx([2 / 3, 1 / 3])]
    assert weights[2].isnan().all()
    scores = torch.tensor([[200.0, 200.0, 0.0, 0.0], [math.inf, 0.0, 0.0, 0.0], [-math.inf] * 4])
    chosen, weights = ops.route(scores, 2, True, False, torch.tensor([0.0, 0.0, 2.0, 2.0]), 1.0)
    assert chosen[0].tolist() == [2, 3]
    assert not weights[0].any()
    assert weights[1:].isnan().all()


@both
def test_of_equal_scores_the_first_are_taken(ops):
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, -1.0], [-3.0, -0.0, -2.0, 0.0, -3.0], [7.0] * 5])
    chosen, weights = ops.route(scores, 3, True)
    assert chosen.tolist() == [[1, 2, 4], [0, 1, 2], [1, 3, 2], [0, 1, 2]]
    assert torch.allclose(weights[[0, 1, 3]], torch.tensor(1 / 3))


@both
def test_scores_far_apart(ops):
    scores = torch.tensor([[-1e30, 3e38, -3e38, 1e-40, -math.inf], [-math.inf, -1e-40, -math.inf, -1.0, -2.0]])
    chosen, weights = ops.route(scores, 4, False)
    assert chosen.tolist() == [[1, 3, 0, 2], [1, 3, 4, 0]]
    assert weights[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert weights[1, 3] == 0


@both
def test_a_nan_makes_its_row_nan_and_no_other(ops):
    scores = normal(1, 4, 6)
    alone = [ops.route(scores[i : i + 1].clone(), 2, True) for i in range(4)]
    scores[1, 4], scores[3] = math.nan, -math.nan
    chosen, weights = ops.route(scores, 2, True)
    assert chosen[[1, 3]].tolist() == [[0, 1], [0, 1]]
    assert weights[[1, 3]].isnan().all()
    for i in (0, 2):
        assert same(chosen[i], alone[i][0][0])
        assert same(weights[i], alone[i][1][0])


# ---- sort


@pytest.mark.parametrize(("rows", "experts", "taken", "tile"), [(2, 4, 2, 16), (33, 7, 3, 16), (40, 3, 3, 32), (300, 16, 8, 128)])
@pytest.mark.parametrize("few", [False, True])
def test_rows_are_sorted_into_tiles(monkeypatch, rows, experts, taken, tile, few):
    """Every pair once, those of an expert side by side and in their order, in the least number of tiles. few: some experts take all."""
    monkeypatch.setattr(kernels, "SORTED", 64)
    scores = normal(1, rows, experts)
    scores[:, :taken] += 100.0 * few
    chosen, _ = kernels.route(scores, taken, True)
    pairs = rows * taken
    slots = min(experts, pairs) + (pairs - min(experts, pairs)) // tile
    order, tiles = torch.full((pairs,), -1, dtype=torch.int32), torch.full((3, slots), -1, dtype=torch.int32)
    kernels._sort.launch((experts,), (chosen, order, tiles, pairs, slots), (experts, kernels._padded(experts), tile, kernels.SORTED))
    flat = chosen.reshape(-1)
    assert torch.equal(order.long(), flat.sort(stable=True).indices)
    found = [each for each in tiles.T.tolist() if each[1] < each[2]]
    assert found == tiles.T.tolist()[: len(found)]
    counts = torch.bincount(flat, minlength=experts).tolist()
    assert len(found) == sum(-(-count // tile) for count in counts)
    end = 0
    for expert, first, after in found:
        assert first == end
        assert after - first <= tile
        assert (flat[order[first:after].long()] == expert).all()
        end = after
    assert end == pairs


# ---- experts


@both
@every_dtype
@pytest.mark.parametrize(
    ("rows", "experts", "taken", "hidden", "inner"),
    [(1, 4, 2, 24, 32), (1, 1, 1, 64, 16), (5, 8, 3, 40, 16), (17, 5, 5, 128, 24), (70, 4, 2, 128, 72), (9, 40, 1, 72, 40)],
)
def test_experts(ops, dtype, rows, experts, taken, hidden, inner):
    """Experts with one row, some, and none; all that there are."""
    x, (up, down) = normal(1, rows, hidden, dtype=dtype), model(experts, hidden, inner, dtype)
    scores = normal(4, rows, experts)
    scores[:, 0] += 1.0
    chosen, weights = ops.route(scores, taken, True)
    got = ops.experts(x, up, None, None, down, None, None, chosen, weights, "silu", False)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    expected = mixed(exact(x), exact(up), exact(down), chosen.tolist(), exact(weights))
    assert_close(got, expected, dtype)
    wide = torch.cat([x, normal(5, rows, 40, dtype=dtype)], 1)
    assert_close(ops.experts(wide[:, :hidden], up, None, None, down, None, None, chosen, weights, "silu", True), expected, dtype)


@both
def test_an_expert_of_many_tiles_beside_others_of_none(ops):
    x, (up, down) = normal(1, 70, 48), model(6, 48, 16, torch.float32)
    chosen = torch.tensor([[4, 1]] * 70, dtype=torch.int32)
    weights = normal(2, 70, 2)
    expected = mixed(exact(x), exact(up), exact(down), chosen.tolist(), exact(weights))
    assert_close(ops.experts(x, up, None, None, down, None, None, chosen, weights, "silu", False), expected, torch.float32)


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_experts_of_other_kinds(ops, activation, gated):
    x, (up, down) = normal(1, 6, 40), model(5, 40, 24, torch.float32, gated)
    chosen, weights = ops.route(normal(4, 6, 5), 2, False)
    expected = mixed(exact(x), exact(up), exact(down), chosen.tolist(), exact(weights), activation, gated)
    assert_close(ops.experts(x, up, None, None, down, None, None, chosen, weights, activation, False), expected, torch.float32)


@both
@every_dtype
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_experts_with_biases(ops, dtype, kind, rows):
    """Of gates beyond their limit, too; and what a router makes nothing of takes no bias."""
    experts, hidden, inner = 5, 72, 40
    x, weights = 3 * normal(1, rows, hidden, dtype=dtype), model(experts, hidden, inner, dtype if kind is None else torch.float32)
    biases = [3 * normal(seed, experts, n, dtype=dtype) for seed, n in ((5, 2 * inner), (6, hidden))]
    chosen, shares = ops.route(normal(4, rows, experts), 2, True)
    shares[0] = 0.0
    scales, wide = (None, None), [exact(weight) for weight in weights]
    if kind is not None:
        weights, scales = zip(*quantized_weights(weights, kind), strict=True)
        wide = [exact(numbers.float()) * exact(each)[..., None] for numbers, each in zip(weights, scales, strict=True)]
    got = ops.experts(x, weights[0], biases[0], scales[0], weights[1], biases[1], scales[1], chosen, shares, "swiglu_oai", False)
    expected = mixed(exact(x), *wide, chosen.tolist(), exact(shares), "swiglu_oai", biases=[exact(each) for each in biases])
    assert not got[0].any()
    if rows > 1:
        assert_close(got, expected, dtype)


@both
def test_experts_without_gates_with_biases(ops):
    x, (up, down) = normal(1, 6, 40), model(5, 40, 24, torch.float32, gated=False)
    biases = normal(5, 5, 24), normal(6, 5, 40)
    chosen, weights = ops.route(normal(4, 6, 5), 2, False)
    expected = mixed(exact(x), exact(up), exact(down), chosen.tolist(), exact(weights), "relu", False, [exact(each) for each in biases])
    got = ops.experts(x, up, biases[0], None, down, biases[1], None, chosen, weights, "relu", False)
    assert_close(got, expected, torch.float32)


@both
@every_dtype
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 20])
def test_quantized_experts(ops, dtype, kind, rows):
    x = normal(1, rows, 200, dtype=dtype)
    (up, up_scales), (down, down_scales) = quantized_weights(model(4, 200, 72, torch.float32), kind)
    chosen, weights = ops.route(normal(4, rows, 4), 2, True)
    wide = [exact(numbers.float()) * exact(scales)[..., None] for numbers, scales in ((up, up_scales), (down, down_scales))]
    expected = mixed(exact(x), *wide, chosen.tolist(), exact(weights))
    assert_close(ops.experts(x, up, None, up_scales, down, None, down_scales, chosen, weights, "silu", False), expected, dtype)


@both
@every_dtype
@pytest.mark.parametrize(("quantized", "biased"), [(False, False), (True, False), (False, True)])
def test_a_row_does_not_depend_on_others(ops, dtype, quantized, biased):
    """Nor on which tile it is in, or where; and NaN stays where it is."""
    experts, rows, hidden, inner = 6, 70, 256, 128
    x, (up, down) = normal(1, rows, hidden, dtype=dtype), model(experts, hidden, inner, dtype)
    # The interpreter's products of tiles are a library's, with an order of its own for each shape. So each tile has one product to add.
    x *= torch.arange(hidden) % 128 == 5
    some_units = torch.arange(2 * inner) % 128 == 7
    up *= some_units[:, None]
    up_bias, down_bias = normal(6, experts, 2 * inner, dtype=dtype) * some_units, normal(7, experts, hidden, dtype=dtype)
    up_scales = down_scales = None
    if quantized:
        (up, up_scales), (down, down_scales) = quantized_weights((up, down), "int8")
    scores = normal(4, rows, experts)

    def mixture(x, scores):
        routed = ops.route(scores, 3, True)
        if biased:
            return ops.experts(x, up, up_bias, up_scales, down, down_bias, down_scales, *routed, "swiglu_oai", True)
        return ops.experts(x, up, None, up_scales, down, None, down_scales, *routed, "silu", True)

    whole = mixture(x, scores)
    for some in (slice(0, 1), slice(69, 70), slice(5, 8), slice(20, 53)):
        assert same(mixture(x[some].clone(), scores[some].clone()), whole[some])
    bad_x, bad_scores = x.clone(), scores.clone()
    bad_x[4], bad_x[40], bad_scores[68, 2] = math.nan, math.inf, math.nan
    got = mixture(bad_x, bad_scores)
    assert got[[4, 68]].isnan().all()
    assert not got[40].isfinite().any()
    others = [i for i in range(rows) if i not in (4, 40, 68)]
    assert same(got[others], whole[others])


# ---- tiles


@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_tiles_hold_the_rows_of_most_experts(weight_bytes):
    sizes = {each.tokens for each in TILES[weight_bytes]}
    for mean in range(1, 2000):
        rows = kernels.rows_of_tile(mean, weight_bytes)
        assert rows in sizes
        assert min(2 * mean, kernels.LARGE) <= rows < max(4 * mean, 17)
        assert rows <= max(kernels.LARGE, mean)
        for slots, channels in ((1, 64), (8, 4096), (136, 1536)):
            chosen = kernels.choose(rows, slots, channels, weight_bytes, 227 * 1024)
            assert chosen.tokens == rows
            assert chosen.channels == 64 or slots * -(-channels // chosen.channels) >= kernels.PROGRAMS or rows >= kernels.LARGE
    assert kernels.rows_of_tile(1, 2) == FLOAT32.tokens
