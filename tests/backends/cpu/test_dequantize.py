"""Blocks of GGUF tensors: bit for bit what the gguf library makes of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quire.backends.cpu import _native as native

FORMATS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes(name: str, isa: str) -> None:
    """All codes and scales, infinite ones and those that are no number too, in more rows than a task has."""
    kind = gguf.GGMLQuantizationType[name]
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(FORMATS.index(name))
    for rows, blocks in ((1, 1), (3, 5), (200, 2), (2, 40)):
        data = rng.integers(0, 256, (rows, blocks * nbytes), np.uint8)
        if name == "MXFP4":  # 255 is no number by its specification, and the greatest one for the library
            data[:, ::17] %= 255
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, kind).astype(np.float16)
        out = np.full((rows, blocks * values), 7, np.float16)
        assert native.dequantize(data, name, out)
        np.testing.assert_array_equal(out, expected)
        wide = rng.integers(0, 256, (rows, 2, blocks * nbytes), np.uint8)
        wide[:, 1] = data
        out.fill(7)
        assert native.dequantize(wide[:, 1], name, out)  # rows at a distance
        np.testing.assert_array_equal(out, expected)


def test_what_is_refused() -> None:
    out = np.empty((2, 32), np.float16)
    assert not native.dequantize(np.zeros((2, 34), np.uint8), "IQ1_S", out)
    for blocks, given in (
        (np.zeros((2, 33), np.uint8), out),
        (np.zeros((3, 34), np.uint8), out),
        (np.zeros((2, 34), np.uint8), np.empty((2, 64), np.float16)),
        (np.zeros((2, 68), np.uint8)[:, ::2], out),
        (np.zeros((2, 34), np.uint8), np.empty((2, 64), np.float16)[:, ::2]),
    ):
        with pytest.raises(ValueError, match=r"blocks|out"):
            native.dequantize(blocks, "Q8_0", given)
    for blocks, given in ((np.zeros((2, 34), np.int8), out), (np.zeros((2, 34), np.uint8), np.empty((2, 32), np.float32))):
        with pytest.raises(TypeError, match=r"blocks|out"):
            native.dequantize(blocks, "Q8_0", given)
