"""Norms, rotary, embedding, conversions: against float64, row by row, in every instruction set."""

import ml_dtypes
import numpy as np
import pytest

from quire.backends.cpu import _native as native

pytestmark = pytest.mark.usefixtures("isa")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dim", [1, 3, 16, 20, 64, 100, 576, 1025])
def test_norms(dim):
    x, weight, bias, eps = normal(dim, 5, dim) * 3 + 1, normal(1, dim), normal(2, dim), 1e-5
    wide = x.astype(np.float64)
    out = np.empty_like(x)
    native.rms_norm(x, weight, eps, out)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=1e-6)

    centred = wide - wide.mean(1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * weight
    native.layer_norm(x, weight, None, eps, out)
    # Where a row is nearly constant the difference to the mean has few digits.
    atol = 1e-6 if dim > 1 else 1e-2
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=atol * 5)
    native.layer_norm(x, weight, bias, eps, out)
    np.testing.assert_allclose(out, exact + bias, rtol=1e-5, atol=atol * 5)


def test_norm_of_a_row_does_not_depend_on_others():
    x, weight = normal(3, 300, 96), normal(4, 96)
    whole, alone = np.empty_like(x), np.empty((1, 96), np.float32)
    for norm in (lambda a, b: native.rms_norm(a, weight, 1e-6, b), lambda a, b: native.layer_norm(a, weight, weight, 1e-6, b)):
        norm(x, whole)
        for row in (0, 7, 299):
            norm(x[row : row + 1], alone)
            assert np.array_equal(alone[0], whole[row])
        again = x.copy()
        norm(again, again)  # in place
        assert np.array_equal(again, whole)


def test_norm_added_to_what_is_there():
    x, weight, residual = normal(3, 40, 77), normal(4, 77), normal(5, 40, 90)[:, :77]
    normed, added = np.empty_like(x), residual.copy()
    native.rms_norm(x, weight, 1e-6, normed)
    native.rms_norm(x, weight, 1e-6, added, accumulate=True)
    assert np.array_equal(added, residual + normed)


def test_head_norm_inside_a_fused_buffer():
    qkv, weight = normal(5, 4, 10 * 24), normal(6, 24)
    heads = qkv.reshape(4, 10, 24)[:, 2:7]
    expected = np.empty((20, 24), np.float32)
    native.rms_norm(np.ascontiguousarray(heads).reshape(20, 24), weight, 1e-6, expected)
    before = qkv.copy()
    native.rms_norm(heads, weight, 1e-6, heads)
    assert np.array_equal(heads.reshape(20, 24), expected)
    after = qkv.reshape(4, 10, 24)
    assert np.array_equal(after[:, :2], before.reshape(4, 10, 24)[:, :2])
    assert np.array_equal(after[:, 7:], before.reshape(4, 10, 24)[:, 7:])


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (64, 64), (128, 128), (80, 32), (20, 12)])
def test_rotary(head_dim, rotary_dim):
    half, tokens, heads = rotary_dim // 2, 7, 3
    qkv = normal(7, tokens, 5 * head_dim)
    x = qkv.reshape(tokens, 5, head_dim)[:, 1 : 1 + heads]
    before, whole = x.astype(np.float64), qkv.copy()
    angles = np.arange(50)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 49, 3, 3, 17, 1, 30], np.int32)
    native.rotary(x, positions, cos, sin)
    c, s = cos[positions][:, None].astype(np.float64), sin[positions][:, None].astype(np.float64)
    first, second = before[..., :half], before[..., half:rotary_dim]
    exact = np.concatenate([first * c - second * s, second * c + first * s, before[..., rotary_dim:]], axis=-1)
    np.testing.assert_allclose(x, exact, rtol=1e-6, atol=1e-6)
    untouched = qkv.reshape(tokens, 5, head_dim)
    assert np.array_equal(untouched[:, [0, 4]], whole.reshape(tokens, 5, head_dim)[:, [0, 4]])
    alone = whole.reshape(tokens, 5, head_dim)[4:5, 1 : 1 + heads].copy()
    native.rotary(alone, positions[4:5], cos, sin)
    assert np.array_equal(alone[0], x[4])
    scale = normal(8, 50)
    scaled = whole.reshape(tokens, 5, head_dim)[4:5, 1 : 1 + heads].copy()
    native.rotary(scaled, positions[4:5], cos, sin, scale)
    np.testing.assert_allclose(scaled[..., :rotary_dim], x[4:5, :, :rotary_dim] * scale[17], rtol=1e-5, atol=1e-6)
    assert np.array_equal(scaled[..., rotary_dim:], x[4:5, :, rotary_dim:])
    with pytest.raises(ValueError, match="positions"):
        native.rotary(x, positions + np.int32(1), cos, sin)
    with pytest.raises(ValueError, match="scale"):
        native.rotary(x, positions, cos, sin, scale[:-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_embedding(dtype):
    table = normal(11, 40, 37).astype(dtype)
    given = table.view(np.uint16) if dtype == ml_dtypes.bfloat16 else table
    ids = np.array([3, 39, 0, 3], np.int32)
    out = np.empty((4, 37), np.float32)
    native.embed(ids, given, out)
    assert np.array_equal(out, table[ids].astype(np.float32))
    native.embed(ids, given, out, 1.5)
    assert np.array_equal(out, table[ids].astype(np.float32) * np.float32(1.5))
    base = normal(12, 4, 37)
    out = base.copy()
    native.add_rows(ids, given, out)
    assert np.array_equal(out, base + table[ids].astype(np.float32))
    for wrong in (40, -1):
        with pytest.raises(ValueError, match="ids"):
            native.embed(np.array([0, 0, wrong, 0], np.int32), given, out)


def test_conversions_are_exact_and_round_to_even():
    every = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    for given, values in ((every.view(np.float16), every.view(np.float16)), (every, every.view(ml_dtypes.bfloat16))):
        native.convert(given, out)
        expected = values.astype(np.float32)
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(out), nan)
        assert np.array_equal(out[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    rng = np.random.default_rng(13)
    halves = every.view(np.float16)[np.isfinite(every.view(np.float16))].astype(np.float32)
    with np.errstate(all="ignore"):
        above = np.nextafter(halves.astype(np.float16), np.float16(np.inf)).astype(np.float32)
        ties = np.concatenate([halves, (halves + above) / 2])
        anything = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 1e-8, 5e-8], np.float32)
        x = np.concatenate([ties, anything, special])
        narrow = [(np.empty(len(x), np.float16), x.astype(np.float16)), (np.empty(len(x), np.uint16), x.astype(ml_dtypes.bfloat16))]
    for out, expected in narrow:
        native.convert(x, out)
        nan = np.isnan(x)
        assert np.array_equal(out[~nan].view(np.uint16), expected[~nan].view(np.uint16))
        assert np.isnan(out.view(expected.dtype)[nan]).all()


@pytest.mark.parametrize("width", [1, 37, 4096, 9000])
def test_softcap(width):
    """In place, of a part of the columns; what is not a number stays that."""
    wide = normal(14, 3, width + 20) * 40
    wide[0, 0], wide[1, 0], wide[2, 0] = np.inf, -np.inf, np.nan
    before, part = wide.copy(), wide[:, :width]
    native.softcap(part, 30.0)
    np.testing.assert_allclose(part, 30.0 * np.tanh(before[:, :width].astype(np.float64) / 30.0), rtol=1e-6, atol=4e-6)
    assert np.array_equal(wide[:, width:], before[:, width:])
    row = before[1:2, :width].copy()
    native.softcap(row, 30.0)
    assert np.array_equal(row[0], part[1])


def test_wrong_calls():
    x, weight = np.zeros((2, 8), np.float32), np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="weight"):
        native.rms_norm(x, weight[:7], 1e-5, x)
    with pytest.raises(ValueError, match="out must have"):
        native.rms_norm(x, weight, 1e-5, np.zeros((2, 7), np.float32))
    with pytest.raises(ValueError, match="cap must be above 0"):
        native.softcap(x, 0.0)
    with pytest.raises(ValueError, match="same size"):
        native.convert(x, np.zeros(15, np.float16))
    with pytest.raises(ValueError, match="overlap"):
        native.rms_norm(np.lib.stride_tricks.as_strided(x, (2, 8), (4, 4)), weight, 1e-5, x)
