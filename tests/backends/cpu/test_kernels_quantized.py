"""The linear with weights of 8 and 4 bits: exact integers, one chain for an element, and packing that a file can hold."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from quire.backends.cpu import _native as native

pytestmark = pytest.mark.usefixtures("isa", "threads")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SEGMENT = 1024  # positions that one exact sum covers where a column has one scale
RANGE = 128  # and that share a scale of the activations where it has groups
TINY = np.float32(2.0**-100)
KINDS = [("int8", 0), ("int8", 32), ("int8", 64), ("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def kind(request):
    return request.param


def run(packed, x, bias=None, out=None, accumulate=False):
    out = np.full((len(x), packed.n), np.nan, np.float32) if out is None else out
    native.linear(packed, x, out, bias, accumulate)
    return out


def make(seed, m, n, k):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(np.float32) * rng.lognormal(0, 1, (n, 1)).astype(np.float32)
    return weight, rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)


def as_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def sum16(x):
    """Over the last axis as the kernel sums: sixteen lanes in order, then halves."""
    lanes = x.reshape(*x.shape[:-1], -1, 16)
    total = np.zeros_like(lanes[..., 0, :])
    for i in range(lanes.shape[-2]):
        total = total + lanes[..., i, :]
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    return total[..., 0]


def quantize_weights(weight, bits, group):
    """Whole numbers [n, k] and scales [n, groups] (float32 that bfloat16 holds)."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, group or k)
    most = np.abs(groups).max(-1)
    used = most >= TINY
    most = np.where(used, most, np.float32(1))
    if bits == 8:
        scale = as_bfloat16(most / np.float32(127))
        whole = np.clip(np.rint(groups * (np.float32(1) / scale)[..., None]), -127, 127)
    else:
        top = np.where(groups.max(-1) == most, most, -most)
        v = groups * (np.float32(-8) / top)[..., None]
        best = np.full(most.shape, -1, np.float32)
        scale, whole = np.zeros_like(most), np.zeros_like(groups)
        for factor in (1, 7.25 / 8, 9 / 8):
            q = np.clip(np.rint(v * np.float32(factor)), -8, 7)
            cross, square = sum16(q * v), np.maximum(sum16(q * q), 1)
            better = (explained := cross * cross / square) > best
            best = np.where(better, explained, best)
            scale = np.where(better, cross / square, scale)
            whole = np.where(better[..., None], q, whole)
        scale = as_bfloat16(scale * (top / np.float32(-8)))
    assert scale.dtype == whole.dtype == np.float32
    return np.where(used[..., None], whole, 0).astype(np.int64).reshape(n, k), np.where(used, scale, np.float32(0))


def quantize_rows(x, step):
    """Whole numbers [m, k], and scales of each ``step`` positions [m, segments]."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % step))).reshape(len(x), -1, step)
    most = np.abs(padded).max(-1)
    used = most >= TINY
    inverse = np.where(used, np.float32(127) / np.where(used, most, 1), np.float32(0)).astype(np.float32)
    whole = np.rint(padded * inverse[..., None]).astype(np.int64).reshape(len(x), -1)[:, : x.shape[1]]
    return whole, np.where(used, most / np.float32(127), np.float32(0)).astype(np.float32)


def chain(whole, scale, offset, x, step, *, fused):
    """What the kernel promises of weights whole * scale + offset, in segments of ``step`` positions. Only the rounding of a fused sum
    from float64 to float32 is twice rounded here."""
    share = max(step, RANGE)  # positions of activations that share a scale
    a, row_scale = quantize_rows(x, share)

    def add(total, number, factor):
        product = number.astype(np.float64) * factor
        return ((product if fused else product.astype(np.float32)) + total).astype(np.float32)

    total = np.zeros((len(x), len(whole)), np.float32)
    for r, first in enumerate(range(0, x.shape[1], share)):
        part = np.zeros_like(total)
        for k in range(first, min(first + share, x.shape[1]), step):
            integer = a[:, k : k + step] @ whole[:, k : k + step].T
            assert np.abs(integer).max(initial=0) < 2**24
            part = add(part, integer.astype(np.float32), scale[:, k // step])
            part = add(part, a[:, k : k + step].sum(1, keepdims=True).astype(np.float32), offset[:, k // step])
        total = add(total, part, row_scale[:, r, None])
    return total


def oracle(weight, x, bits, group, *, fused):
    """The chain that the kernel promises. Only the rounding of a fused sum from float64 to float32 is twice rounded here."""
    whole, scale = quantize_weights(weight, bits, group)
    step = group or SEGMENT
    scale = scale if group else np.repeat(scale, -(-x.shape[1] // step), axis=1)
    return chain(whole, scale, np.zeros_like(scale), x, step, fused=fused)


def close(found, expected):
    """Equal but for the last bit of a few sums."""
    assert np.allclose(found, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())
    assert (found == expected).mean() > 0.9


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 128), (2, 64, 1024), (3, 100, 384), (7, 31, 1152), (20, 130, 256), (65, 200, 2176)])
def test_matches_the_same_quantization_in_numpy(kind, isa, m, n, k):
    quantize, group = kind
    weight, x, bias = make(m * n * k, m, n, k)
    packed = native.pack_linear(weight, quantize, group)
    assert (packed.n, packed.k, packed.dtype, packed.group_size, packed.isa) == (n, k, quantize, group, isa)
    expected = oracle(weight, x, 8 if quantize == "int8" else 4, group, fused=isa != "portable")
    found = run(packed, x)
    close(found, expected)
    assert np.array_equal(run(packed, x, bias), found + bias)
    residual = np.random.default_rng(1).standard_normal((m, n)).astype(np.float32)
    assert np.array_equal(run(packed, x, bias, residual.copy(), accumulate=True), residual + (found + bias))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 15, 17, 33, 100, 1023, 1025, 2051])
def test_one_scale_a_column_takes_any_number_of_inputs(isa, k):
    weight, x, _ = make(k, 9, 70, k)
    expected = oracle(weight, x, 8, 0, fused=isa != "portable")
    close(run(native.pack_linear(weight, "int8"), x), expected)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_odd_numbers_of_groups(isa, quantize, group):
    for groups in (1, 3, 9, 35):
        weight, x, _ = make(groups, 8, 33, groups * group)
        expected = oracle(weight, x, 8 if quantize == "int8" else 4, group, fused=isa != "portable")
        close(run(native.pack_linear(weight, quantize, group), x), expected)


def test_the_extremes_are_exact(kind):
    """Weights and activations all at the ends of their ranges: nothing saturates, wraps or rounds."""
    quantize, group = kind
    k = 2048
    low = -8.0 if quantize == "int4" else -127.0
    weight = np.full((3, k), low, np.float32)
    weight[1] = 7.0 if quantize == "int4" else 127.0
    weight[:, ::32] = low  # so that the scale is 1, and all weights are whole numbers
    x = np.array([[127.0], [-127.0]], np.float32).repeat(k, 1)
    x[1, 1::2] = 127.0
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.array_equal(run(native.pack_linear(weight, quantize, group), x), exact.astype(np.float32))


@pytest.mark.parametrize("n", [150, 600])  # the second: so many panels that one row may go against two at once, and one is left
def test_one_chain_whatever_the_number_of_rows(kind, n):
    quantize, group = kind
    weight, x, bias = make(2, 400, n, 1152)
    packed = native.pack_linear(weight, quantize, group)
    whole = run(packed, x, bias)
    alone = np.concatenate([run(packed, x[i : i + 1], bias) for i in range(len(x))])
    assert np.array_equal(alone, whole)
    few = [*range(1, 21), 23, 24, 25, 30, 48]
    for m in few * 3 + [49, 64, 193, 200]:  # the ways to read the weights, up to three, take turns
        first = (m * 37) % (len(x) - m + 1)
        assert np.array_equal(run(packed, x[first : first + m], bias), whole[first : first + m]), m
    for threads in [1, 2, 3]:
        native.set_num_threads(threads)
        assert np.array_equal(run(packed, x, bias), whole)
        for _ in range(3):  # the ways to read the weights take turns
            assert np.array_equal(run(packed, x[:1], bias), whole[:1])
        assert np.array_equal(native.pack_linear(weight, quantize, group).data, packed.data)


def test_instruction_sets_agree(kind, isa):
    """The packed bytes depend on the panel's width only; results differ only where there is no fused multiply-add."""
    quantize, group = kind
    weight, x, bias = make(3, 30, 100, 1152)
    packed = native.pack_linear(weight, quantize, group)
    native.set_isa("portable")
    plain = native.pack_linear(weight, quantize, group)
    found, expected = run(packed, x, bias), run(plain, x, bias)
    assert np.allclose(found, expected, rtol=4e-6, atol=2e-6 * np.abs(expected).max())
    for other in native.available_isas()[:-1] if isa != "portable" else []:
        native.set_isa(other)
        same = native.pack_linear(weight, quantize, group)
        assert np.array_equal(run(same, x, bias), run(packed, x, bias)), other
        if same.panel == packed.panel:
            assert np.array_equal(same.data, packed.data)


def unpack(packed):
    """Whole numbers [n, k] and scales [n, groups], or offsets and scales [n, groups, 2], read back from the bytes as quantized.h
    describes them."""
    bits, columns, group = (8 if packed.dtype == "int8" else 4), packed.panel, packed.group_size
    span = group or (packed.k + 3) // 4 * 4
    width = columns * (4 if packed.offsets else 2)
    records = packed.data.reshape(-1, width + span * columns * bits // 8)
    scale = records[:, :width].copy().view(ml_dtypes.bfloat16).astype(np.float32)
    scale = scale.reshape(-1, packed.k // span or 1, columns, 2 if packed.offsets else 1)
    stored = records[:, width:].reshape(len(records), -1, columns, 4)
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=3).transpose(0, 1, 3, 2, 4).reshape(len(records), -1, columns, 4)
    whole = stored.transpose(0, 2, 1, 3).reshape(-1, scale.shape[1], columns, span).transpose(0, 2, 1, 3)
    whole = whole.astype(np.int64) - (128 if bits == 8 else 8)
    panels = len(whole) * columns
    scale = scale.transpose(0, 2, 1, 3).reshape(panels, -1, scale.shape[-1])[: packed.n]
    return whole.reshape(panels, -1)[: packed.n, : packed.k], scale if packed.offsets else scale[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_bytes_are_the_documented_layout(kind, dtype):
    quantize, group = kind
    weight = make(4, 1, 150, 384)[0].astype(DTYPES[dtype])
    packed = native.pack_linear(weight.view(np.uint16) if dtype == "bfloat16" else weight, quantize, group)
    whole, scale = unpack(packed)
    expected, expected_scale = quantize_weights(weight.astype(np.float32), 8 if quantize == "int8" else 4, group)
    assert np.array_equal(whole, expected)
    assert np.array_equal(scale, expected_scale)


def test_concatenated_transposed_and_unaligned_sources(kind):
    quantize, group = kind
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal((n, 1280)).astype(np.float32) for n in (40, 7, 70)]
    together = native.pack_linear(parts, quantize, group)
    assert np.array_equal(together.data, native.pack_linear(np.concatenate(parts), quantize, group).data)
    stored = np.ascontiguousarray(parts[2].T)  # [k, n], as GPT-2 keeps it
    plain = native.pack_linear(parts[2], quantize, group)
    assert np.array_equal(native.pack_linear(stored.T, quantize, group).data, plain.data)
    spread = np.zeros((140, 2560), np.float32)
    spread[::2, ::2] = parts[2]
    assert np.array_equal(native.pack_linear(spread[::2, ::2], quantize, group).data, plain.data)
    unaligned = np.frombuffer(b"?" + parts[2].tobytes(), np.float32, offset=1).reshape(parts[2].shape)
    assert np.array_equal(native.pack_linear(unaligned, quantize, group).data, plain.data)


def test_zeros_and_the_tiny(kind):
    quantize, group = kind
    weight, x, bias = make(6, 4, 40, 256)
    weight[3], weight[5, 128:], weight[7] = 0, 0, 2.0**-120
    x[1], x[2] = 0, 2.0**-110
    found = run(native.pack_linear(weight, quantize, group), x, bias)
    assert np.isfinite(found).all()
    assert np.array_equal(found[1:3], np.tile(bias, (2, 1)))
    assert (found[:, [3, 7]] == bias[[3, 7]]).all()
    zeros = run(native.pack_linear(np.zeros((5, 256), np.float32), quantize, group), x)
    assert not zeros.any()


def test_int4_keeps_most_of_the_weights():
    """Of normal weights 4 bits lose less than a hundredth of the square with groups of 32, and more with larger groups."""
    weight = make(11, 1, 64, 4096)[0]
    lost = []
    for group in (32, 64, 128):
        whole, scale = unpack(native.pack_linear(weight, "int4", group))
        error = weight - whole * scale.repeat(group, 1)
        lost.append(((error**2).sum(-1) / (weight**2).sum(-1)).max())
    assert lost[0] < 0.01
    assert lost == sorted(lost)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_large_and_small_numbers_keep_their_precision(kind, scale):
    """A power of two on the weights, or on a row, is a power of two on the result."""
    quantize, group = kind
    weight, x, _ = make(7, 3, 40, 256)
    expected = run(native.pack_linear(weight, quantize, group), x)
    factor = np.float32(scale)
    assert np.array_equal(run(native.pack_linear(weight * factor, quantize, group), x), expected * factor)
    assert np.array_equal(run(native.pack_linear(weight, quantize, group), x * factor), expected * factor)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_stays_where_it_is(kind, bad):
    quantize, group = kind
    weight, x, bias = make(8, 13, 100, 384)
    packed = native.pack_linear(weight, quantize, group)
    expected = run(packed, x, bias)
    for at in (0, 17, 383):
        broken = x.copy()
        broken[4, at] = bad
        found = run(packed, broken, bias)
        assert np.isnan(found[4]).all()
        assert np.array_equal(np.delete(found, 4, 0), np.delete(expected, 4, 0))
    weight[9, 200] = bad
    found = run(native.pack_linear(weight, quantize, group), x, bias)
    assert np.isnan(found[:, 9]).all()
    assert np.array_equal(np.delete(found, 9, 1), np.delete(expected, 9, 1))


def test_strided_rows_and_no_rows(kind):
    quantize, group = kind
    weight, x, bias = make(9, 9, 33, 128)
    packed = native.pack_linear(weight, quantize, group)
    wide = np.full((9, 200), np.nan, np.float32)
    wide[:, 10:138] = x
    out = np.zeros((9, 100), np.float32)
    native.linear(packed, wide[:, 10:138], out[:, 5:38], bias)
    assert np.array_equal(out[:, 5:38], run(packed, x, bias))
    assert not out[:, :5].any()
    assert not out[:, 38:].any()
    assert run(packed, x[:0]).shape == (0, 33)


def aligned(data):
    """A copy at a 64-byte boundary."""
    memory = np.empty(len(data) + 64, np.uint8)
    view = memory[-memory.ctypes.data % 64 :][: len(data)]
    view[:] = data
    return view


@pytest.mark.parametrize(("dtype", "group"), [*KINDS, *((dtype, 0) for dtype in DTYPES)])
def test_packed_bytes_make_the_same_linear(dtype, group):
    weight, x, bias = make(10, 11, 100, 384)
    if dtype in DTYPES:
        weight = weight.astype(DTYPES[dtype])
        packed = native.pack_linear(weight.view(np.uint16) if dtype == "bfloat16" else weight)
    else:
        packed = native.pack_linear(weight, dtype, group)
    expected = run(packed, x, bias)
    data = packed.data
    n, k, nbytes = packed.n, packed.k, packed.nbytes
    assert (packed.panel, packed.group_size) == (native.panel(), group)
    assert (data.dtype, data.shape, data.flags.writeable) == (np.uint8, (nbytes,), False)
    del packed  # the view keeps the bytes
    kept = aligned(data)
    kept.flags.writeable = False
    loaded = native.load_packed(kept, n, k, dtype, group)
    assert (loaded.n, loaded.k, loaded.dtype, loaded.group_size, loaded.nbytes) == (n, k, dtype, group, nbytes)
    assert loaded.data.ctypes.data == kept.ctypes.data  # in place
    del kept, data
    assert np.array_equal(run(loaded, x, bias), expected)


def test_wrong_ways_to_pack():
    weight = np.ones((3, 320), np.float32)
    for quantize, group, message in [
        ("int3", 32, "quantize is 'int3': choose int8, int4 or None"),
        (None, 32, "group_size is 32, but quantize is None"),
        ("int4", 0, "group_size is 0: choose 32, 64 or 128 for int4$"),
        ("int8", 48, "group_size is 48: choose 32, 64 or 128 for int8, or 0 for one scale an output$"),
        ("int8", -32, "group_size is -32: choose"),
        ("int8", 128, "group_size 128 does not divide the 320 inputs of this weight: choose 32 or 64 or 0$"),
        ("int4", 128, "group_size 128 does not divide the 320 inputs of this weight: choose 32 or 64$"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.pack_linear(weight, quantize, group)
    with pytest.raises(ValueError, match="does not divide the 100 inputs of this weight: none of 32, 64 and 128 does"):
        native.pack_linear(np.ones((3, 100), np.float32), "int4", 32)


def test_wrong_packed_bytes():
    packed = native.pack_linear(np.ones((3, 128), np.float32), "int8", 32)
    data = aligned(packed.data)
    for change, message in [
        ({"data": data[:-1]}, f"data must have length {packed.nbytes}"),
        ({"data": np.concatenate([data, data])}, f"data must have length {packed.nbytes}"),
        ({"n": 3 + packed.panel}, "data must have length"),
        ({"n": 0}, "n and k must be positive"),
        ({"k": 2**40}, "n and k must be positive"),
        ({"n": 2**31 - 64, "k": 2**31 - 1, "dtype": "float32", "group_size": 0}, "below 2\\^30"),
        ({"group_size": 64}, "data must have length"),
        ({"group_size": 0, "dtype": "int4"}, "group_size is 0"),
        ({"k": 100}, "does not divide the 100 inputs"),
        ({"dtype": "int2"}, "dtype 'int2' is unknown: choose float32, float16, bfloat16, int8, int4 or mxfp4"),
        ({"dtype": "float32"}, "float32 weights have no groups"),
        ({"data": np.empty(packed.nbytes + 65, np.uint8)[1:][: packed.nbytes]}, "data must be 64-byte aligned|length"),
    ]:
        arguments = {"data": data, "n": 3, "k": 128, "dtype": "int8", "group_size": 32} | change
        with pytest.raises(ValueError, match=message):
            native.load_packed(**arguments)
    with pytest.raises(TypeError, match="uint8"):
        native.load_packed(data.view(np.int8), 3, 128, "int8", 32)


FORMATS = ["Q4_0", "Q4_1", "Q4_K", "MXFP4"]
TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # the floats of MXFP4


def blocks(seed, name, n, k):
    """Rows of blocks [n, bytes] with any numbers in them and scales of a usual size."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (n, k // values, nbytes), np.uint8)
    if name == "MXFP4":
        made[..., 0] = rng.integers(112, 121, (n, k // values))
        return made.reshape(n, -1)
    for at in range(0, 2 if name == "Q4_0" else 4, 2):
        made[..., at : at + 2] = rng.uniform(-0.01, 0.01, (n, k // values, 1)).astype(np.float16).view(np.uint8)
    return made.reshape(n, -1)


def read_blocks(data, name):
    """Numbers -8..7 (of MXFP4 twice the floats) [n, k], scales and offsets [n, k / 32] (float32): q * scale + minimum is
    (q - 8) * scale + offset."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    each = data.reshape(len(data), -1, nbytes)
    if name == "MXFP4":
        scale = np.ldexp(np.float32(1), each[..., 0].astype(np.int64) - 128)
        codes = np.concatenate([each[..., 1:] & 15, each[..., 1:] >> 4], axis=-1)
        return TWICE[codes].reshape(len(data), -1), scale, np.zeros_like(scale)
    halves = each[..., : 4 if name == "Q4_1" else 2].copy().view(np.float16).astype(np.float32)
    if name == "Q4_K":
        halves = each[..., :4].copy().view(np.float16).astype(np.float32)
        scales, minima = gguf.quants.Q4_K.get_scale_min(each[..., 4:16].reshape(-1, 12))
        scale = halves[..., :1] * scales.reshape(*each.shape[:2], 8).astype(np.float32)
        offset = np.float32(8) * scale - halves[..., 1:] * minima.reshape(*each.shape[:2], 8).astype(np.float32)
    else:
        scale = halves[..., :1]
        offset = np.float32(8) * scale + halves[..., 1:] if name == "Q4_1" else np.zeros_like(scale)
    bytes_of_32 = each[..., nbytes - values // 2 :].reshape(len(data), -1, 32 if name == "Q4_K" else 16)
    numbers = np.concatenate([bytes_of_32 & 15, bytes_of_32 >> 4], axis=-1).reshape(len(data), -1).astype(np.int64)
    return numbers - 8, scale.reshape(len(data), -1), offset.reshape(len(data), -1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 256), (2, 64, 1024), (3, 100, 768), (7, 31, 1280), (20, 130, 256), (65, 200, 2304)])
def test_blocks_are_what_they_were(isa, name, m, n, k):
    """Numbers as they are in the file, scales and offsets rounded to bfloat16; and what is multiplied by them."""
    data = blocks(m + n + k, name, n, k)
    packed = native.pack_blocks(data, name)
    dtype = "mxfp4" if name == "MXFP4" else "int4"
    assert (packed.n, packed.k, packed.dtype, packed.group_size, packed.offsets) == (n, k, dtype, 32, name in ("Q4_1", "Q4_K"))
    numbers, scale, offset = read_blocks(data, name)
    scale, offset = as_bfloat16(scale), as_bfloat16(offset)
    found, found_scale = unpack(packed)
    assert np.array_equal(TWICE[found + 8] if dtype == "mxfp4" else found, numbers)
    assert np.array_equal(found_scale, np.stack([offset, scale], -1) if packed.offsets else scale)
    _, x, bias = make(m, m, n, k)
    result = run(packed, x)
    close(result, chain(numbers, scale, offset, x, 32, fused=isa != "portable"))
    assert np.array_equal(run(packed, x, bias), result + bias)
    floats = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])  # what the file means
    assert (np.abs(result - x @ floats.T) < 0.01 * (np.abs(x) @ np.abs(floats).T)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_several_tensors(name):
    parts = [blocks(i, name, n, 512) for i, n in enumerate((40, 7, 70))]
    together = native.pack_blocks(parts, name)
    assert np.array_equal(together.data, native.pack_blocks(np.concatenate(parts), name).data)
    wide = np.zeros((140, parts[2].shape[1] + 3), np.uint8)
    wide[::2, 3:] = parts[2]
    assert np.array_equal(native.pack_blocks(wide[::2, 3:], name).data, native.pack_blocks(parts[2], name).data)
    for n in (33, 64, 100):  # gate and up
        gate, up = blocks(5, name, n, 512), blocks(6, name, n, 512)
        _, x, _ = make(n, 9, n, 512)
        gated = native.pack_blocks([gate, up], name, gated=True)
        assert (gated.n, gated.gated) == (n, True)
        alone = [run(native.pack_blocks(each, name), x) for each in (gate, up)]
        native.linear(gated, x, out := np.empty_like(alone[0]), activation="relu")
        assert np.array_equal(out, np.maximum(alone[0], 0) * alone[1])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_blocks_with_scales_that_are_no_number(name):
    data = blocks(1, name, 70, 512)
    _, x, _ = make(1, 5, 70, 512)
    expected = run(native.pack_blocks(data, name), x)
    data[9, :2] = np.array([np.nan], np.float16).view(np.uint8)
    found = run(native.pack_blocks(data, name), x)
    assert np.isnan(found[:, 9]).all()
    assert np.array_equal(np.delete(found, 9, 1), np.delete(expected, 9, 1))
    broken = x.copy()
    broken[3, 100] = np.inf
    assert np.isnan(run(native.pack_blocks(data, name), broken)[3]).all()
    x[1] = 0
    assert not run(native.pack_blocks(np.delete(data, 9, 0), name), x)[1].any()


def test_a_power_that_is_no_number():
    data = blocks(1, "MXFP4", 70, 512)
    _, x, _ = make(1, 5, 70, 512)
    expected = run(native.pack_blocks(data, "MXFP4"), x)
    data[9, 17 * 3], data[11, 0] = 255, 0  # of a group
    found = run(native.pack_blocks(data, "MXFP4"), x)
    assert np.isnan(found[:, 9]).all()
    assert np.isfinite(found[:, 11]).all()
    assert np.array_equal(np.delete(found, [9, 11], 1), np.delete(expected, [9, 11], 1))


@pytest.mark.parametrize("power", [1, 127, 220])
def test_the_extremes_of_floats_of_4_bits(power):
    """All at the ends of their ranges: sums of 16 bits hold them."""
    k = 1024
    data = np.full((3, k // 32, 17), 0x77, np.uint8)  # 6
    data[1] = 0xFF  # -6
    data[2, :, ::2] = 0xF7
    data[..., 0] = power
    x = np.full((2, k), 127, np.float32)
    x[1, ::2] = -127
    numbers, scale, _ = read_blocks(data.reshape(3, -1), "MXFP4")
    exact = (x.astype(np.float64) @ numbers.T) * scale[0, 0].astype(np.float64)
    assert np.array_equal(run(native.pack_blocks(data.reshape(3, -1), "MXFP4"), x), exact.astype(np.float32))


def test_floats_of_4_bits_in_their_checkpoints_order():
    """Neighbours in a byte, and half of the power as a float32."""
    data = blocks(3, "MXFP4", 70, 512)
    each = data.reshape(70, 16, 17)
    codes = np.concatenate([each[..., 1:] & 15, each[..., 1:] >> 4], axis=-1)
    half = np.ldexp(np.float32(1), each[..., 0].astype(np.int64) - 128)[..., None].view(np.uint8)
    others = np.concatenate([half, codes[..., ::2] | codes[..., 1::2] << 4], axis=-1).reshape(70, -1)
    packed = native.pack_blocks(others, "mxfp4")
    assert np.array_equal(packed.data, native.pack_blocks(data, "MXFP4").data)
    again = native.load_packed(aligned(packed.data), 70, 512, "mxfp4", 32)
    _, x, bias = make(1, 9, 70, 512)
    assert np.array_equal(run(again, x, bias), run(packed, x, bias))
    for n, k, group in ((70, 512, 64), (70, 500, 32)):
        with pytest.raises(ValueError, match="mxfp4 weights have groups of 32 inputs"):
            native.load_packed(aligned(packed.data), n, k, "mxfp4", group)


def with_offsets(seed, n, k, group):
    """A linear of int4 with offsets, made by hand as quantized.h describes it; its numbers, scales and offsets."""
    rng, columns = np.random.default_rng(seed), native.panel()
    panels, groups = -(-n // columns), k // group
    numbers = rng.integers(0, 16, (panels * columns, k), np.uint8)
    pairs = as_bfloat16(rng.uniform(-0.01, 0.01, (panels * columns, groups, 2)).astype(np.float32))
    eights = numbers.reshape(panels, columns, groups, group // 8, 2, 4)
    stored = (eights[..., 0, :] | eights[..., 1, :] << 4).transpose(0, 2, 3, 1, 4).reshape(panels, groups, -1)
    scales = pairs.reshape(panels, columns, groups, 2).transpose(0, 2, 1, 3).reshape(panels, groups, -1)
    records = np.concatenate([scales.astype(ml_dtypes.bfloat16).view(np.uint8), stored], axis=-1)
    packed = native.load_packed(aligned(records.ravel()), n, k, "int4", group, offsets=True)
    return packed, numbers[:n].astype(np.int64) - 8, pairs[:n, :, 1], pairs[:n, :, 0]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_offsets_in_any_group(isa, group):
    for n, groups in ((64, 1), (100, 9), (33, 35)):
        packed, numbers, scale, offset = with_offsets(group, n, groups * group, group)
        _, x, _ = make(group, 13, n, groups * group)
        close(run(packed, x), chain(numbers, scale, offset, x, group, fused=isa != "portable"))


@pytest.mark.parametrize("n", [150, 600])
@pytest.mark.parametrize("group", [32, 64, 128, "MXFP4"])
def test_one_chain_of_any_4_bits(n, group):
    """With offsets, or of floats."""
    packed = native.pack_blocks(blocks(n, group, n, 1152), group) if group == "MXFP4" else with_offsets(n, n, 1152, group)[0]
    _, x, bias = make(2, 300, n, 1152)
    whole = run(packed, x, bias)
    for m in [*range(1, 21), 23, 24, 25, 30, 48] * 3 + [49, 64, 193, 200]:  # the ways to read the weights take turns
        first = (m * 37) % (len(x) - m + 1)
        assert np.array_equal(run(packed, x[first : first + m], bias), whole[first : first + m]), m
    for threads in [1, 2, 3]:
        native.set_num_threads(threads)
        assert np.array_equal(run(packed, x, bias), whole)


def test_wrong_blocks():
    for data, name, message in [
        (np.zeros((2, 34), np.uint8), "Q8_0", "format 'Q8_0' can't be packed as it is: choose one of Q4_0, Q4_1, Q4_K, MXFP4, int4:32"),
        (np.zeros((2, 18), np.uint8), "Q4_2", "format 'Q4_2' can't be packed"),
        (np.zeros((2, 19), np.uint8), "Q4_0", r"rows of one length, of 18 bytes for 32 values, not \[2, 19\]"),
        (np.zeros((0, 18), np.uint8), "Q4_0", "rows of one length"),
        ([np.zeros((2, 18), np.uint8), np.zeros((2, 36), np.uint8)], "Q4_0", "rows of one length"),
        (np.zeros((2, 36), np.uint8)[:, ::2], "Q4_0", "bytes of a row must follow one another"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.pack_blocks(data, name)
    with pytest.raises(TypeError, match="uint8"):
        native.pack_blocks(np.zeros((2, 18), np.int8), "Q4_0")
    with pytest.raises(ValueError, match="gated takes two matrices of one shape"):
        native.pack_blocks([np.zeros((2, 18), np.uint8), np.zeros((3, 18), np.uint8)], "Q4_0", gated=True)
    with pytest.raises(ValueError, match="offsets are for int4 weights, not for int8"):
        native.load_packed(aligned(np.zeros(64, np.uint8)), 1, 32, "int8", 32, offsets=True)
