"""The linear kernel: right against float64, and one chain for an element whatever surrounds it."""

import ml_dtypes
import numpy as np
import pytest

from quire.backends.cpu import _native as native

pytestmark = pytest.mark.usefixtures("isa", "threads")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def bits(array):
    """What the kernels take for a dtype: bfloat16 goes as uint16."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def run(packed, x, bias=None, out=None, accumulate=False):
    out = np.full((len(x), packed.n), np.nan, np.float32) if out is None else out
    native.linear(packed, x, out, bias, accumulate)
    return out


def as_multiplied(x, dtype, isa):
    """Activations as the linear takes them: AVX-512 BF16 rounds them to the bfloat16 of its weights."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if (isa, dtype) == ("avx512bf16", "bfloat16") else x


def make(rng, m, n, k, dtype="float32"):
    weight = rng.standard_normal((n, k)).astype(DTYPES[dtype])
    return weight, rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 65, 33), (2, 64, 1024), (3, 100, 7), (7, 31, 1025), (31, 130, 257), (65, 200, 2100)]
)
def test_matches_float64(dtype, m, n, k, isa):
    weight, x, bias = make(np.random.default_rng(m * n * k), m, n, k, dtype)
    packed = native.pack_linear(bits(weight))
    assert (packed.n, packed.k, packed.dtype) == (n, k, dtype)
    assert packed.nbytes >= weight.nbytes
    exact = as_multiplied(x, dtype, isa).astype(np.float64) @ weight.astype(np.float64).T
    tolerance = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(weight.astype(np.float64)).T + 1)
    assert (np.abs(run(packed, x) - exact) <= tolerance).all()
    assert (np.abs(run(packed, x, bias) - (exact + bias)) <= tolerance + 1e-6).all()
    residual = np.random.default_rng(1).standard_normal((m, n)).astype(np.float32)
    added = run(packed, x, bias, residual.copy(), accumulate=True)
    assert np.array_equal(added, residual + run(packed, x, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [150, 600, 632])  # so many panels that a few rows may go against several at once, and one or two are left
def test_one_chain_whatever_the_number_of_rows(dtype, n):
    rng = np.random.default_rng(2)
    weight, x, bias = make(rng, 512, n, 1101, dtype)
    packed = native.pack_linear(bits(weight))
    whole = run(packed, x, bias)
    few = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 23, 24, 25, 30, 36, 41, 48]
    for m in few * 3 + [49, 64, 193, 500]:  # the ways to read the weights, up to three, take turns
        first = int(rng.integers(0, len(x) - m + 1))
        assert np.array_equal(run(packed, x[first : first + m], bias), whole[first : first + m]), m
    for threads in [1, 2, 3]:
        native.set_num_threads(threads)
        assert np.array_equal(run(packed, x, bias), whole)
        for m in [1, 2, 4, 6, 17] * 2:
            assert np.array_equal(run(packed, x[:m], bias), whole[:m]), (threads, m)


def test_is_a_chain_in_order(isa):
    """acc = fma(x, w, acc) in ascending k; the portable path rounds the product as well."""
    weight, x, _ = make(np.random.default_rng(3), 2, 5, 1300)
    expected = np.zeros((2, 5), np.float32)
    for k in range(1300):
        product = x[:, k : k + 1].astype(np.float64) * weight[:, k].astype(np.float64)
        if isa == "portable":
            product = product.astype(np.float32).astype(np.float64)
        # The float64 sum of an exact product and a float32 is rounded twice; a difference by that is not seen here.
        expected = (product + expected).astype(np.float32)
    assert np.array_equal(run(native.pack_linear(weight), x), expected)


def test_is_a_chain_of_pairs_with_products_of_bfloat16(isa):
    """acc = fma(x, w, acc), and of each two positions of K the second first, whichever vendor made the CPU."""
    if isa != "avx512bf16":
        pytest.skip("float32 is multiplied")
    for k in (1300, 1301):
        weight, x, _ = make(np.random.default_rng(3), 2, 5, k, "bfloat16")
        wide, rounded = weight.astype(np.float64), x.astype(ml_dtypes.bfloat16).astype(np.float64)
        expected = np.zeros((2, 5), np.float32)
        for at in [at for pair in range(0, k, 2) for at in (pair + 1, pair) if at < k]:
            expected = (rounded[:, at : at + 1] * wide[:, at] + expected).astype(np.float32)
        assert np.array_equal(run(native.pack_linear(bits(weight)), x), expected)


def test_numbers_that_bfloat16_can_not_hold(isa):
    """Infinities and NaN stay, an odd number of positions reads nothing behind them, and subnormals do not slow anything down."""
    weight = np.ones((3, 3), ml_dtypes.bfloat16)
    packed = native.pack_linear(bits(weight))
    behind = np.full((4, 8), np.nan, np.float32)
    behind[:, :3] = [[1, 2, 3], [np.inf, 1, 1], [1, np.nan, 1], [1e-40, 1e-40, 1.0]]
    out = run(packed, behind[:, :3])
    assert np.array_equal(out, np.repeat(np.array([[6], [np.inf], [np.nan], [1]], np.float32), 3, axis=1), equal_nan=True)
    large = run(packed, np.array([[3.4e38, 0, 0]], np.float32))[0, 0]
    assert large == (np.inf if isa == "avx512bf16" else np.float32(3.4e38))


def test_sixteen_bits_wide_are_widened_exactly(isa):
    """The same numbers in 16 and in 32 bits give the same bytes, at few rows and at many."""
    for dtype in ("float16", "bfloat16"):
        if (isa, dtype) == ("avx512bf16", "bfloat16"):
            continue  # they are not widened
        weight, x, _ = make(np.random.default_rng(4), 40, 70, 300, dtype)
        narrow, wide = native.pack_linear(bits(weight)), native.pack_linear(weight.astype(np.float32))
        for m in (1, 5, 40):
            assert np.array_equal(run(narrow, x[:m]), run(wide, x[:m]))


def test_concatenation_and_transposed_and_unaligned_weights():
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal((n, 90)).astype(np.float32) for n in (40, 7, 70)]
    x = rng.standard_normal((3, 90)).astype(np.float32)
    together = run(native.pack_linear(parts), x)
    assert np.array_equal(together, np.concatenate([run(native.pack_linear(p), x) for p in parts], axis=1))

    stored = np.ascontiguousarray(parts[2].T)  # [k, n], as GPT-2 keeps it
    assert np.array_equal(run(native.pack_linear(stored.T), x), run(native.pack_linear(parts[2]), x))

    for dtype in (np.float32, np.float16, np.uint16):
        weight = parts[0].astype(dtype) if dtype != np.uint16 else parts[0].astype(ml_dtypes.bfloat16).view(np.uint16)
        raw = b"?" + weight.tobytes()
        unaligned = np.frombuffer(raw, dtype, offset=1).reshape(weight.shape)
        assert not unaligned.flags.writeable
        assert not unaligned.flags.aligned
        assert np.array_equal(run(native.pack_linear(unaligned), x), run(native.pack_linear(weight), x))


def test_strided_rows():
    weight, x, bias = make(np.random.default_rng(6), 9, 33, 50)
    packed = native.pack_linear(weight)
    wide = np.zeros((9, 80), np.float32)
    wide[:, 10:60] = x
    out = np.zeros((9, 100), np.float32)
    native.linear(packed, wide[:, 10:60], out[:, 5:38], bias)
    assert np.array_equal(out[:, 5:38], run(packed, x, bias))
    assert not out[:, :5].any()
    assert not out[:, 38:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_prefetched_changes_nothing(dtype):
    """A linear that follows, wider, narrower or of another width than this one, costs no byte; and it is kept alive."""
    rng = np.random.default_rng(7)
    weight, x, bias = make(rng, 70, 150, 1100, dtype)
    alone = native.pack_linear(bits(weight))
    expected = {m: run(alone, x[:m], bias) for m in (1, 7, 16, 70)}
    for n, k, other in ((30, 3, "float32"), (2000, 1100, "bfloat16"), (100, 5000, "float32")):
        packed = native.pack_linear(bits(weight))
        packed.set_then(native.pack_linear(bits(make(rng, 1, n, k, other)[0])))
        for m, out in expected.items():
            assert np.array_equal(run(packed, x[:m], bias), out), (n, k, m)


def test_no_rows():
    packed = native.pack_linear(np.ones((3, 4), np.float32))
    native.linear(packed, np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32))


def test_wrong_calls():
    packed = native.pack_linear(np.ones((3, 4), np.float32))
    x, out = np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="columns"):
        native.linear(packed, np.zeros((2, 5), np.float32), out)
    with pytest.raises(ValueError, match="out must be"):
        native.linear(packed, x, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="bias"):
        native.linear(packed, x, out, np.zeros(4, np.float32))
    with pytest.raises(TypeError, match="x must be"):
        native.linear(packed, x.astype(np.float64), out)
    with pytest.raises(ValueError, match="adjacent"):
        native.linear(packed, np.zeros((4, 2), np.float32).T, out)
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        native.linear(packed, x, frozen)
    with pytest.raises(TypeError, match="weight"):
        native.pack_linear(np.ones((3, 4), np.int32))
    with pytest.raises(TypeError, match="one dtype"):
        native.pack_linear([np.ones((3, 4), np.float32), np.ones((3, 4), np.float16)])
    with pytest.raises(ValueError, match="same number of inputs"):
        native.pack_linear([np.ones((3, 4), np.float32), np.ones((3, 5), np.float32)])
    with pytest.raises(ValueError, match="empty"):
        native.pack_linear(np.ones((0, 4), np.float32))
    with pytest.raises(ValueError, match="dimensions"):
        native.pack_linear(np.ones(4, np.float32))
    with pytest.raises(ValueError, match="at least one"):
        native.pack_linear([])
