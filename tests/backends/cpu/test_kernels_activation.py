"""A linear that ends in an activation, gated or not: the formulas against float64, and the bytes of a pass for each operation."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from quire.backends.cpu import _native as native

pytestmark = pytest.mark.usefixtures("isa", "threads")
WEIGHTS = [("float32", 0), ("float16", 0), ("bfloat16", 0), ("int8", 0), ("int8", 64), ("int4", 32)]


@pytest.fixture(params=WEIGHTS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def weights(request):
    return request.param


def gelu(x):
    return x * 0.5 * np.array([math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)


def swiglu_oai(gate, up):
    gate = np.minimum(gate, 7)
    return (np.clip(up, -7, 7) + 1) * gate / (1 + np.exp(-1.702 * gate))


EXACT = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_tanh": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def activate(kind, x):
    """The kernel's formula for each element: of a linear with one weight, which is 1."""
    out = np.empty((x.size, 1), np.float32)
    native.linear(native.pack_linear(np.ones((1, 1), np.float32)), x.reshape(-1, 1), out, activation=kind)
    return out.reshape(x.shape)


def pack(weights, *parts, gated=False):
    dtype, group = weights
    if dtype.startswith("int"):
        return native.pack_linear(list(parts), dtype, group, gated)
    if dtype == "bfloat16":
        return native.pack_linear([part.astype(ml_dtypes.bfloat16).view(np.uint16) for part in parts], gated=gated)
    return native.pack_linear([part.astype(dtype) for part in parts], gated=gated)


def run(packed, x, bias=None, kind=None):
    out = np.full((len(x), packed.n), np.nan, np.float32)
    native.linear(packed, x, out, bias, activation=kind)
    return out


@dataclass
class FeedForward:
    """Gate and up of f outputs over k inputs, the numbers before the activation, and the linear that does all of it at once."""

    weights: tuple[str, int]
    f: int
    k: int
    rows: int

    def __post_init__(self):
        rng = np.random.default_rng(self.f * self.k)
        self.matrices = [rng.standard_normal((self.f, self.k)).astype(np.float32) / np.float32(math.sqrt(self.k)) for _ in range(2)]
        self.x = rng.standard_normal((self.rows, self.k)).astype(np.float32)
        self.bias = rng.standard_normal(2 * self.f).astype(np.float32)
        plain = [pack(self.weights, matrix) for matrix in self.matrices]
        biases = (self.bias[: self.f], self.bias[self.f :])
        self.gate, self.up = (run(packed, self.x, bias) for packed, bias in zip(plain, biases, strict=True))
        self.without_bias = [run(packed, self.x) for packed in plain]
        self.alone = plain[0]
        self.packed = pack(self.weights, *self.matrices, gated=True)


def same(found, expected):
    """To the bit; 0 and -0 too."""
    return np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", EXACT)
def test_formulas(kind):
    x = np.concatenate([np.linspace(-12, 12, 4003), np.random.default_rng(8).standard_normal(2000) * 0.01, [0.0]]).astype(np.float32)
    # Far out, x^2 in float32 costs digits of its exponential; what is below 1e-10 there does not matter to any sum.
    np.testing.assert_allclose(activate(kind, x), EXACT[kind](x.astype(np.float64)), rtol=3e-6, atol=1e-10)


def test_clamped_gates_and_what_they_gate():
    """gpt-oss: both are cut off."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.uniform(-20, 20, (4000, 2)), rng.standard_normal((500, 2)), [[7, -7], [8, -8], [-9, 9]]]).astype(np.float32)
    one = native.pack_linear([np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)], gated=True)
    found = run(one, x, kind="swiglu_oai")[:, 0]
    np.testing.assert_allclose(found, swiglu_oai(*x.T.astype(np.float64)), rtol=3e-6, atol=1e-7)
    assert np.isnan(run(one, np.array([[np.nan, 1], [1, np.nan], [np.nan, np.nan]], np.float32), kind="swiglu_oai")).all()


def test_clamped_gates_of_any_weights(weights):
    for f, k in [(1, 128), (37, 1152), (160, 128)]:
        ff = FeedForward(weights, f, k, 33)
        x = 4 * ff.x  # so that some are cut off
        for biases in (np.split(ff.bias, 2), (None, None)):
            gate, up = (run(pack(weights, m), x, bias).astype(np.float64) for m, bias in zip(ff.matrices, biases, strict=True))
            found = run(ff.packed, x, None if biases[0] is None else ff.bias, "swiglu_oai")
            np.testing.assert_allclose(found, swiglu_oai(gate, up), rtol=1e-5, atol=1e-6)


def test_exp_within_two_units_in_the_last_place():
    """silu(x) = x / (1 + exp(-x)) shows exp where it is large; the sampler's sums show it elsewhere."""
    x = np.linspace(-87, -20, 20011).astype(np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(activate("silu", x) - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()
    ends = np.array([-np.inf, -1e30, -200, 200, 1e30, np.inf, np.nan], np.float32)
    out = activate("silu", ends)
    assert np.array_equal(out[3:6], ends[3:6])
    assert (out[1:3] == 0).all()
    assert np.isnan(out[6])
    for kind in EXACT:
        assert np.isnan(activate(kind, ends[6:])).all(), kind


@pytest.mark.parametrize("kind", EXACT)
def test_matches_float64(kind):
    ff = FeedForward(("float32", 0), 77, 300, 9)
    gate, up = (ff.x.astype(np.float64) @ m.astype(np.float64).T + b for m, b in zip(ff.matrices, np.split(ff.bias, 2), strict=True))
    np.testing.assert_allclose(run(ff.packed, ff.x, ff.bias, kind), EXACT[kind](gate) * up, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(ff.alone, ff.x, ff.bias[:77], kind), EXACT[kind](gate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, *EXACT])
def test_the_bytes_of_separate_passes(weights, kind):
    """Over whole, half and broken panels, slices of K, and both with biases and without."""
    for f, k in [(1, 128), (16, 384), (37, 1152), (100, 2176), (160, 128)]:
        ff = FeedForward(weights, f, k, 33)
        assert (ff.packed.n, ff.packed.k, ff.packed.gated, ff.alone.gated) == (f, k, True, False)
        assert same(run(ff.packed, ff.x, ff.bias, kind), activate(kind, ff.gate) * ff.up), (f, k)
        assert same(run(ff.alone, ff.x, ff.bias[:f], kind), activate(kind, ff.gate)), (f, k)
        gate, up = ff.without_bias
        assert same(run(ff.packed, ff.x, None, kind), activate(kind, gate) * up), (f, k)
        assert same(run(ff.alone, ff.x, None, kind), activate(kind, gate)), (f, k)


def test_whatever_the_number_of_rows_and_threads(weights):
    ff = FeedForward(weights, 150, 1152, 300)
    gated, alone = activate("silu", ff.gate) * ff.up, activate("silu", ff.gate)
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        for m in [*range(1, 7), *range(1, 14), 23, 24, 25, 30, 64, 193, 300]:  # the two ways to read the weights for a few rows take turns
            first = (m * 37) % (len(ff.x) - m + 1)
            x = ff.x[first : first + m]
            assert same(run(ff.packed, x, ff.bias, "silu"), gated[first : first + m]), (threads, m)
            assert same(run(ff.alone, x, ff.bias[:150], "silu"), alone[first : first + m]), (threads, m)


def test_what_is_prefetched_changes_nothing(weights):
    ff = FeedForward(weights, 150, 1152, 30)
    ff.packed.set_then(ff.alone)
    assert same(run(ff.packed, ff.x, ff.bias, "silu"), activate("silu", ff.gate) * ff.up)


def test_added_to_strided_rows(weights):
    ff = FeedForward(weights, 37, 384, 9)
    expected = activate("gelu", ff.gate) * ff.up
    out = np.random.default_rng(1).standard_normal((9, 100)).astype(np.float32)
    before, wide = out.copy(), np.full((9, 500), np.nan, np.float32)
    wide[:, 50:434] = ff.x
    native.linear(ff.packed, wide[:, 50:434], out[:, 5:42], ff.bias, accumulate=True, activation="gelu")
    assert same(out[:, 5:42], before[:, 5:42] + expected)
    native.linear(ff.packed, wide[:, 50:434], out[:, 5:42], ff.bias, activation="gelu")
    assert same(out[:, 5:42], expected)
    assert same(out[:, :5], before[:, :5])
    assert same(out[:, 42:], before[:, 42:])
    assert run(ff.packed, ff.x[:0], ff.bias, "gelu").shape == (0, 37)


def test_packed_bytes_are_half_panels_in_turn(weights):
    """Those of a linear of the same columns in that order, with zeros for what the last halves lack."""
    for f in (1, 33, 64, 100):
        gate, up = FeedForward(weights, f, 384, 1).matrices
        packed = pack(weights, gate, up, gated=True)
        half = packed.panel // 2
        count = -(-f // half)
        columns = np.zeros((count, 2, half, 384), np.float32)
        for i, matrix in enumerate((gate, up)):
            padded = np.zeros((count * half, 384), np.float32)
            padded[:f] = matrix
            columns[:, i] = padded.reshape(count, half, 384)
        assert np.array_equal(packed.data, pack(weights, columns.reshape(-1, 384)).data)
        stored = [np.ascontiguousarray(matrix.T).T for matrix in (gate, up)]
        assert np.array_equal(packed.data, pack(weights, *stored, gated=True).data)


def test_packed_bytes_make_the_same_linear(weights):
    ff = FeedForward(weights, 100, 384, 11)
    memory = np.empty(ff.packed.nbytes + 64, np.uint8)
    kept = memory[-memory.ctypes.data % 64 :][: ff.packed.nbytes]
    kept[:] = ff.packed.data
    loaded = native.load_packed(kept, 100, 384, *weights, gated=True)
    assert (loaded.n, loaded.gated, loaded.nbytes) == (100, True, ff.packed.nbytes)
    assert same(run(loaded, ff.x, ff.bias, "relu"), run(ff.packed, ff.x, ff.bias, "relu"))


def test_not_a_number_stays_in_its_row(weights):
    ff = FeedForward(weights, 37, 384, 9)
    expected = run(ff.packed, ff.x, ff.bias, "silu")
    ff.x[4, 17] = np.nan
    found = run(ff.packed, ff.x, ff.bias, "silu")
    assert np.isnan(found[4]).all()
    assert same(np.delete(found, 4, 0), np.delete(expected, 4, 0))


def test_wrong_calls():
    weight, x, out = np.ones((3, 4), np.float32), np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="activation 'swish' is unknown: choose silu, gelu, gelu_tanh, relu, swiglu_oai or None"):
        native.linear(native.pack_linear(weight), x, out, activation="swish")
    with pytest.raises(ValueError, match="activation 'swiglu_oai' is for gated linears"):
        native.linear(native.pack_linear(weight), x, out, activation="swiglu_oai")
    with pytest.raises(ValueError, match=r"gated takes two matrices of one shape, gate and up: \[3, 4\] and \[2, 4\]"):
        native.pack_linear([weight, weight[:2]], gated=True)
    for parts in ([weight], [weight] * 3):
        with pytest.raises(ValueError, match=f"gated takes two matrices of one shape, gate and up, not {len(parts)}"):
            native.pack_linear(parts, gated=True)
    gated = native.pack_linear([weight, weight], gated=True)
    with pytest.raises(ValueError, match="out must be"):
        native.linear(gated, x, np.zeros((2, 6), np.float32))
    with pytest.raises(ValueError, match="bias must have length 6"):
        native.linear(gated, x, out, np.zeros(3, np.float32))
