"""Norms, activations, the write of keys and values, block copies, weights of 8 bits: in PyTorch and in Triton, against float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.cuda.layer_cases import ACTIVATIONS, DTYPES, GATED, TOLERANCE, assert_close, every_dtype, exact, normal, same
from quire.backends.cuda import quantize
from quire.backends.cuda.cache import LARGEST, KVPool
from quire.backends.cuda.hazards import hazard_free
from quire.backends.cuda.kernels import copies as kernel_copies
from quire.backends.cuda.kernels import kv_write as kernel_kv_write
from quire.backends.cuda.kernels import layers as kernel_layers
from quire.backends.cuda.kernels import linear as kernel_linear
from quire.backends.cuda.quantize import quantize_weight
from quire.backends.cuda.reference import copies as reference_copies
from quire.backends.cuda.reference import kv_write as reference_kv_write
from quire.backends.cuda.reference import layers as reference_layers
from quire.backends.cuda.reference import linear as reference_linear
from quire.backends.cuda.turns import Turns

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""numpy's, of NaN and infinities in the interpreter."""
CPU = torch.device("cpu")

both_layers = pytest.mark.parametrize("ops", [reference_layers, kernel_layers], ids=["reference", "kernels"])
both_writes = pytest.mark.parametrize("write_kv", [reference_kv_write.write_kv, kernel_kv_write.write_kv], ids=["reference", "kernels"])
both_linears = pytest.mark.parametrize("linear", [reference_linear.linear, kernel_linear.linear], ids=["reference", "kernels"])


def norms(x, weight, bias, eps):
    """In float64: RMS norm, layer norm."""
    centred = x - x.mean(1, keepdims=True)
    return (
        x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * weight,
        centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * weight + bias,
    )


@both_layers
@every_dtype
@pytest.mark.parametrize(("rows", "width"), [(3, 24), (1, 40), (2, 1000), (2, 4096), (1, 1)])
def test_norms(ops, dtype, rows, width):
    x = (normal(1, rows, width) * 3 + 1).to(dtype)
    weight, bias = normal(2, width), normal(3, width, dtype=dtype)
    rms, layer = norms(exact(x), exact(weight), exact(bias), 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), rms, dtype)
    if width > 1:
        assert_close(ops.layer_norm(x, weight, bias, 1e-5), layer, dtype)
        assert_close(ops.layer_norm(x, weight, None, 1e-5), layer - exact(bias), dtype)
    assert ops.rms_norm(x, weight, 1e-5).dtype == dtype
    assert_close(ops.rms_norm(x, weight.to(dtype), 1e-5), norms(exact(x), exact(weight.to(dtype)), 0, 1e-5)[0], dtype)


@both_layers
@every_dtype
def test_norms_add_to_the_residual_first(ops, dtype):
    x, given, weight, bias = normal(1, 3, 40, dtype=dtype), normal(2, 3, 40, dtype=dtype), normal(3, 40), normal(4, 40)
    for residual_dtype in {dtype, torch.float32}:
        before = given.to(residual_dtype)
        added = (before.float() + x.float()).to(residual_dtype)
        for expected, norm in zip(
            norms(exact(added), exact(weight), exact(bias), 1e-5),
            (lambda r: ops.rms_norm(x, weight, 1e-5, r), lambda r: ops.layer_norm(x, weight, bias, 1e-5, residual=r)),
            strict=True,
        ):
            residual = before.clone()
            got = norm(residual)
            assert same(residual, added)
            assert got.dtype == dtype
            assert_close(got, expected, dtype)


@both_layers
def test_a_row_does_not_depend_on_others(ops):
    x, weight = normal(1, 7, 72, dtype=torch.bfloat16), normal(2, 72)
    calls = [
        lambda a: ops.rms_norm(a, weight, 1e-6),
        lambda a: ops.layer_norm(a, weight, weight, 1e-6),
        lambda a: ops.rms_norm(a, weight, 1e-6, residual=torch.ones_like(a)),
        *(partial(ops.activate, kind=kind, gated=True) for kind in GATED),
        *(partial(ops.activate, kind=kind, gated=False) for kind in ACTIVATIONS),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        rows = x.to(dtype)
        poisoned = rows.clone()
        poisoned[[1, 6]] = torch.tensor([[math.nan], [math.inf]], dtype=dtype)
        for call in calls:
            whole = call(rows)
            for some in (slice(0, 1), slice(6, 7), slice(2, 5)):
                assert same(call(rows[some].clone()), whole[some])
            others = [i for i in range(7) if i not in (1, 6)]
            got = call(poisoned)
            assert same(got[others], whole[others])
            assert got[1].isnan().all()


@both_layers
def test_rows_may_be_apart(ops):
    wide, weight = normal(1, 3, 100), normal(2, 40)
    part = wide[:, 7:47]
    assert same(ops.rms_norm(part, weight, 1e-6), ops.rms_norm(part.contiguous(), weight, 1e-6))
    assert same(ops.layer_norm(part, weight, None, 1e-6), ops.layer_norm(part.contiguous(), weight, None, 1e-6))
    assert same(ops.activate(part, "silu", True), ops.activate(part.contiguous(), "silu", True))


@both_layers
@every_dtype
@pytest.mark.parametrize("width", [1, 40, 2500])
def test_softcap(ops, dtype, width):
    """In place, of a part of the columns."""
    wide = (normal(1, 3, width + 9) * 40).to(dtype)
    before, part = wide.clone(), wide[:, :width]
    ops.softcap(part, 30.0)
    assert_close(part, 30.0 * np.tanh(exact(before[:, :width]) / 30.0), dtype)
    assert same(wide[:, width:], before[:, width:])


@both_layers
def test_a_norm_in_place(ops):
    """Of a part of the columns, of which the others stay."""
    wide, weight = normal(1, 3, 100, dtype=torch.bfloat16), normal(2, 40)
    before, part = wide.clone(), wide[:, 7:47]
    expected = ops.rms_norm(part, weight, 1e-6)
    assert ops.rms_norm(part, weight, 1e-6, out=part).data_ptr() == part.data_ptr()
    assert same(part, expected)
    assert same(wide[:, :7], before[:, :7])
    assert same(wide[:, 47:], before[:, 47:])


@both_layers
@every_dtype
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (3, 1000), (2, 1500)])
def test_activations(ops, dtype, kind, rows, width):
    x = (normal(1, rows, 2 * width) * 3).to(dtype)
    gate, up = exact(x)[:, :width], exact(x)[:, width:]
    got = ops.activate(x, kind, True)
    assert got.shape == (rows, width)
    assert got.dtype == dtype
    assert_close(got, GATED[kind](gate, up), dtype)
    if kind in ACTIVATIONS:
        assert_close(ops.activate(x, kind, False), ACTIVATIONS[kind](exact(x)), dtype)


@both_layers
def test_activations_far_out(ops):
    x = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]])
    for kind in ACTIVATIONS:
        got = ops.activate(x, kind, False)
        assert torch.allclose(got, torch.relu(x), atol=1e-6), kind


@both_layers
@every_dtype
def test_limits_of_a_gate_and_of_what_it_gates(ops, dtype):
    numbers = torch.tensor([-1e4, -8.0, -7.0, -6.5, -1.0, 0.0, 6.5, 7.0, 8.0, 1e4], dtype=dtype)
    gate, up = numbers.repeat_interleave(len(numbers)), numbers.repeat(len(numbers))
    got = ops.activate(torch.cat([gate, up])[None], "swiglu_oai", True)
    expected = gate.double().clamp(max=7)
    expected = expected * torch.sigmoid(1.702 * expected) * (up.double().clamp(-7, 7) + 1)
    assert torch.allclose(got[0].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for damaged in (gate, up):
        damaged[3::7] = math.nan
        got = ops.activate(torch.cat([gate, up])[None], "swiglu_oai", True)
        assert torch.equal(got[0].isnan(), gate.isnan() | up.isnan())


# ---- write_kv


def rope_tables(rotary_dim, length=64, query_scales=None):
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim // 2))
    return Turns(torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float(), query_scales)


def heads_in_float64(qkv, positions, heads, kv_heads, head_dim, rope, q_norm, k_norm, eps):
    """Queries and keys as they should be, and values [T, heads, head_dim]."""
    x = exact(qkv).reshape(len(qkv), -1, head_dim)
    out = []
    for part, norm, scales in ((x[:, :heads], q_norm, rope and rope.query_scales), (x[:, heads : heads + kv_heads], k_norm, None)):
        y = part.copy()
        if norm is not None:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * exact(norm)
        if rope is not None:
            half = rope.cos.shape[1]
            turn = (exact(rope.cos)[positions] + 1j * exact(rope.sin)[positions])[:, None]
            turn = turn if scales is None else turn * exact(scales)[positions][:, None, None]
            turned = (y[..., :half] + 1j * y[..., half : 2 * half]) * turn
            y[..., :half], y[..., half : 2 * half] = turned.real, turned.imag
        out.append(y)
    return *out, x[:, heads + kv_heads :]


SLOTS = torch.tensor([5, -1, 18, 0, 31], dtype=torch.int32)
POSITIONS = torch.tensor([9, 63, 0, 33, 7], dtype=torch.int32)


def pool_of(kv_heads, head_dim, kv_dtype, block_size=8, num_blocks=4):
    pool = KVPool(2, num_blocks, kv_heads, block_size, head_dim, kv_dtype, CPU)
    return pool, pool.layer(1)


def gathered(cache, scales, slots):
    """What the cache has at slots [N], in float64: [N, kv_heads, head_dim]."""
    slots = slots.long()
    at = (slots // cache.shape[2], slice(None), slots % cache.shape[2])
    numbers = exact(cache.float()[at])
    return numbers if scales is None else numbers * exact(scales[at])[..., None]


@both_writes
@every_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "norm"),
    [(4, 2, 8, 8, True), (2, 2, 10, 10, False), (3, 1, 64, 64, True), (2, 1, 96, 96, False), (4, 2, 128, 128, True),
     (2, 2, 64, 0, False), (2, 1, 10, 0, True), (2, 1, 80, 32, True), (6, 2, 20, 12, False)],
)  # fmt: skip
def test_write_kv(write_kv, dtype, heads, kv_heads, head_dim, rotary_dim, norm):
    qkv = normal(1, 5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    before = qkv.clone()
    rope = rope_tables(rotary_dim) if rotary_dim else None
    q_norm, k_norm = (normal(2, head_dim, dtype=dtype), normal(3, head_dim, dtype=dtype)) if norm else (None, None)
    pool, kv = pool_of(kv_heads, head_dim, str(dtype).removeprefix("torch."))
    pool.data.fill_(7)
    write_kv(qkv, kv, POSITIONS, SLOTS, heads, rope, q_norm, k_norm, 1e-6)
    q, k, v = heads_in_float64(before, POSITIONS, heads, kv_heads, head_dim, rope, q_norm, k_norm, 1e-6)
    assert_close(qkv[:, : heads * head_dim], q.reshape(5, -1), dtype)
    assert same(qkv[:, heads * head_dim :], before[:, heads * head_dim :])
    written = SLOTS >= 0
    assert_close(torch.from_numpy(gathered(kv.keys, None, SLOTS[written])), k[written], dtype)
    assert np.array_equal(gathered(kv.values, None, SLOTS[written]), v[written])
    rest = [s for s in range(32) if s not in SLOTS.tolist()]
    for cache in (kv.keys, kv.values):
        assert (gathered(cache, None, torch.tensor(rest)) == 7).all()
    assert (pool.data[0] == 7).all()  # the other layer
    if rope is None and not norm:
        assert same(qkv, before)


@both_writes
@every_dtype
def test_write_kv_scales_queries(write_kv, dtype):
    """By their position, and no keys."""
    qkv = normal(1, 5, 8 * 16, dtype=dtype)
    before, rope = qkv.clone(), rope_tables(16, query_scales=torch.linspace(1.0, 2.0, 64))
    _, kv = pool_of(2, 16, str(dtype).removeprefix("torch."))
    write_kv(qkv, kv, POSITIONS, SLOTS, 4, rope)
    q, k, _ = heads_in_float64(before, POSITIONS, 4, 2, 16, rope, None, None, 1e-6)
    assert_close(qkv[:, :64], q.reshape(5, -1), dtype)
    assert_close(torch.from_numpy(gathered(kv.keys, None, SLOTS[SLOTS >= 0])), k[SLOTS >= 0], dtype)


@both_writes
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (10, 0), (64, 64), (20, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_kv_of_8_bits(write_kv, kv_dtype, head_dim, rotary_dim, dtype):
    heads, kv_heads = 4, 2
    qkv = (normal(1, 5, 8 * head_dim) * torch.tensor([[1e-3], [1.0], [30.0], [1.0], [1e-12]])).to(dtype)
    qkv[3, 4 * head_dim :] = 0
    before = qkv.clone()
    rope = rope_tables(rotary_dim) if rotary_dim else None
    pool, kv = pool_of(kv_heads, head_dim, kv_dtype)
    write_kv(qkv, kv, POSITIONS, SLOTS, heads, rope)
    _, k, v = heads_in_float64(before, POSITIONS, heads, kv_heads, head_dim, rope, None, None, 1e-6)
    written = SLOTS >= 0
    slots = SLOTS[written].long()
    largest = LARGEST[kv.keys.dtype]
    for cache, scales, x in ((kv.keys, kv.key_scales, k[written]), (kv.values, kv.value_scales, v[written])):
        scale = exact(scales[slots // 8, :, slots % 8])[..., None]
        top = np.abs(x).max(-1, keepdims=True)
        zero = top == 0
        assert (scale[zero] == 1).all()
        assert (scale[~zero] * largest >= top[~zero] * (1 - 1e-6)).all()  # nothing overflows
        assert (scale[~zero] <= top[~zero] / largest * (1 + 2**-10) * (1 + 1e-6) + 2**-24).all()  # the next float16, at most
        error = np.abs(gathered(cache, scales, SLOTS[written]) - x)
        if kv_dtype == "int8":
            assert (error <= scale * 0.5001).all()
        else:  # 3 bits of mantissa; below 2**-6 they are multiples of 2**-9
            assert (error <= np.maximum(np.abs(x) * 2**-4, scale * 2**-10) * 1.001).all()
    assert (pool.scales[0] == 0).all()
    untouched = torch.tensor([s for s in range(32) if s not in SLOTS.tolist()])
    assert (kv.key_scales[untouched // 8, :, untouched % 8] == 0).all()


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_both_writes_store_the_same(kv_dtype):
    qkv, rope = normal(1, 5, 8 * 16, dtype=torch.bfloat16), rope_tables(16)
    pools = []
    for write_kv in (reference_kv_write.write_kv, kernel_kv_write.write_kv):
        pool, kv = pool_of(2, 16, kv_dtype)
        write_kv(qkv.clone(), kv, POSITIONS, SLOTS, 4, rope)
        pools.append(pool)
    a, b = pools
    if a.scales is not None:
        assert torch.allclose(a.scales.float(), b.scales.float(), rtol=2e-3)
        assert ((a.data.float() - b.data.float()).abs() <= (1 if kv_dtype == "int8" else 32)).all()
        assert (a.data.view(torch.uint8) != b.data.view(torch.uint8)).float().mean() < 0.02
    else:
        assert torch.allclose(a.data.float(), b.data.float(), rtol=1e-2 if kv_dtype == "bfloat16" else 1e-5, atol=1e-6)


@both_writes
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "fp8"])
def test_a_written_row_does_not_depend_on_others(write_kv, kv_dtype):
    qkv, rope, norm = normal(1, 5, 8 * 24, dtype=torch.bfloat16), rope_tables(24), normal(2, 24)

    def write(rows, poison=None):
        given = qkv.clone()
        if poison is not None:
            given[poison] = math.nan
        _, kv = pool_of(2, 24, kv_dtype)
        part = given[rows].clone()
        write_kv(part, kv, POSITIONS[rows].clone(), SLOTS[rows].clone(), 4, rope, norm, norm)
        return part, kv

    whole, kv = write(slice(0, 5))
    for i in (0, 2, 4):
        alone, single = write(slice(i, i + 1))
        block, offset = divmod(int(SLOTS[i]), 8)
        assert same(alone[0], whole[i])
        assert same(single.keys[block, :, offset], kv.keys[block, :, offset])
        assert same(single.values[block, :, offset], kv.values[block, :, offset])
    # NaN is neither spread nor hidden.
    poisoned, bad = write(slice(0, 5), poison=2)
    block, offset = divmod(int(SLOTS[2]), 8)
    for before, after, scales in ((kv.keys, bad.keys, bad.key_scales), (kv.values, bad.values, bad.value_scales)):
        shown = after[block, :, offset].float()
        assert (shown if scales is None else shown * scales[block, :, offset, None].float()).isnan().all()
        after[block, :, offset] = before[block, :, offset]
        assert same(after, before)
    assert poisoned[2, : 4 * 24].isnan().all()
    others = [0, 1, 3, 4]
    assert same(poisoned[others], whole[others])


# ---- copies


@pytest.mark.parametrize("copy_blocks", [reference_copies.copy_blocks, kernel_copies.copy_blocks], ids=["reference", "kernels"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_copy_blocks(copy_blocks, kv_dtype, head_dim):
    rng = np.random.default_rng(1)
    for memory in KVPool(2, 7, 3, 4, head_dim, kv_dtype, CPU).memories:
        bits = memory.view(torch.uint8)
        bits.copy_(torch.from_numpy(rng.integers(0, 256, tuple(bits.shape), np.uint8)))
        before = bits.clone()
        # Out of the pool, blocks side by side in other memory, as they go to the host; and back to other places.
        out = torch.zeros((3, 2, 2, *bits.shape[3:]), dtype=torch.uint8)
        copy_blocks(bits, out.movedim(0, 2), torch.tensor([[5, 0], [0, 2], [5, 1]], dtype=torch.int32))
        assert torch.equal(out, before[:, :, [5, 5, 0]].movedim(2, 0))
        copy_blocks(out.movedim(0, 2), bits, torch.tensor([[2, 1], [0, 5]], dtype=torch.int32))
        before = before[:, :, [0, 0, 2, 3, 4, 5, 6]]
        assert torch.equal(bits, before)
        # Within the pool.
        copy_blocks(memory, memory, torch.tensor([[6, 0], [6, 3], [2, 4]], dtype=torch.int32))
        assert torch.equal(bits, before[:, :, [6, 1, 2, 6, 2, 5, 6]])
        copy_blocks(memory, memory, torch.empty((0, 2), dtype=torch.int32))


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8", "fp8"])
def test_fill_blocks(kv_dtype):
    pool = KVPool(2, 4, 2, 4, 8, kv_dtype, CPU)
    kernel_copies.fill_blocks(pool, torch.tensor([1, 3], dtype=torch.int32), math.nan)
    memory = pool.data if pool.scales is None else pool.scales
    assert memory[:, :, [1, 3]].isnan().all()
    assert (memory[:, :, [0, 2]] == 0).all()
    assert pool.scales is None or (pool.data.view(torch.uint8) == 0).all()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=14))
def test_groups_of_copies_do_what_copies_one_after_the_other_do(pairs):
    groups = hazard_free(pairs)
    assert [pair for group in groups for pair in group] == pairs
    one_by_one, grouped = list(range(7)), list(range(7))
    for source, destination in pairs:
        one_by_one[destination] = one_by_one[source]
    for group in groups:
        assert group
        for i, (_, destination) in enumerate(group):
            others = group[:i] + group[i + 1 :]
            assert all(destination not in pair for pair in others)
        read = list(grouped)
        for source, destination in group:
            grouped[destination] = read[source]
    assert grouped == one_by_one


def test_copies_that_do_not_meet_are_one_group():
    assert hazard_free([]) == []
    assert hazard_free([(0, 1), (0, 2), (5, 3)]) == [[(0, 1), (0, 2), (5, 3)]]
    assert hazard_free([(0, 1), (1, 2), (3, 1)]) == [[(0, 1)], [(1, 2)], [(3, 1)]]


# ---- weights of 8 bits


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_weight(kind, dtype, monkeypatch):
    weight = (normal(1, 9, 40) * torch.logspace(-3, 2, 9)[:, None]).to(dtype)
    weight[4] = 0
    before = weight.clone()
    stored, scales = quantize_weight(weight, kind)
    assert same(weight, before)
    assert (stored.dtype, scales.dtype) == ({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind], torch.float32)
    largest, wide, scale = LARGEST[stored.dtype], exact(weight), exact(scales)[:, None]
    assert np.allclose(np.abs(exact(stored.float())).max(1), np.where(np.arange(9) == 4, 0, largest))
    error = np.abs(exact(stored.float()) * scale - wide)
    bound = scale * 0.5 if kind == "int8" else np.maximum(np.abs(wide) * 2**-4, scale * 2**-10)
    assert (error <= bound * 1.0001).all()
    assert scales[4] == 1
    monkeypatch.setattr(quantize, "SLICE", 80)  # two channels at a time
    again = quantize_weight(weight, kind)
    assert same(again[0], stored)
    assert same(again[1], scales)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantize_weights_that_are_no_ordinary_numbers(kind):
    weight = torch.full((4, 8), 1e-44)
    weight[0, 0], weight[1, 3], weight[2] = math.nan, math.inf, 2.7e-43
    stored, scales = quantize_weight(weight, kind)
    assert not scales[:2].isfinite().any()
    assert (stored[2:].float() * scales[2:, None] - weight[2:]).abs().max() < 1e-42
    assert quantize_weight(torch.empty(0, 8), kind)[0].shape == (0, 8)


@both_linears
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@every_dtype
@pytest.mark.parametrize(("tokens", "depth", "channels"), [(1, 24, 40), (3, 1600, 64), (17, 200, 70), (66, 800, 24)])
def test_quantized_linear(linear, kind, dtype, tokens, depth, channels):
    x, bias = normal(1, tokens, depth, dtype=dtype), normal(2, channels, dtype=dtype)
    weight, scales = quantize_weight(normal(3, channels, depth), kind)
    expected = exact(x) @ (exact(weight.float()) * exact(scales)[:, None]).T
    assert_close(linear(x, weight, None, scales), expected, dtype)
    got = linear(x, weight, bias, scales.half())
    assert got.dtype == dtype
    assert got.shape == (tokens, channels)
    expected = exact(x) @ (exact(weight.float()) * exact(scales.half())[:, None]).T
    assert_close(got, expected + exact(bias), dtype)


@both_linears
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quantized_linear_of_a_row_does_not_depend_on_others(linear, dtype):
    """Also where another number of tokens means other tiles, and splits of K that are programs of their own."""
    depth = 1000
    x, (weight, scales) = normal(1, 66, depth, dtype=dtype), quantize_weight(normal(2, 40, depth), "int8")
    # The interpreter's products of tiles are a library's, with an order of its own for each shape. So each tile has one product to add.
    x *= torch.arange(depth) % 64 == 5
    whole = linear(x, weight, None, scales)
    for rows in (slice(0, 1), slice(65, 66), slice(5, 8), slice(20, 41)):
        assert same(linear(x[rows].clone(), weight, None, scales), whole[rows])
    poisoned = x.clone()
    poisoned[4] = math.nan
    got = linear(poisoned, weight, None, scales)
    assert got[4].isnan().all()
    others = [i for i in range(66) if i != 4]
    assert same(got[others], whole[others])


@both_linears
def test_quantized_linear_of_rows_that_are_apart(linear):
    wide, (weight, scales) = normal(1, 5, 300, dtype=torch.float16), quantize_weight(normal(2, 72, 264), "int8")
    whole = linear(wide[:, :264], weight, None, scales)
    assert same(linear(wide[:, :264].contiguous(), weight, None, scales), whole)
    assert same(linear(wide[2:4, :264].contiguous(), weight, None, scales), whole[2:4])


@both_linears
@every_dtype
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("tokens", "depth", "channels"), [(1, 24, 40), (1, 1536, 130), (3, 1024, 40), (17, 512, 70), (31, 3072, 24),
                                                           (30, 4096, 72), (65, 640, 24)])  # fmt: skip
def test_linear(linear, dtype, same, tokens, depth, channels):
    x, bias, weight = normal(1, tokens, depth, dtype=dtype), normal(2, channels, dtype=dtype), normal(3, channels, depth, dtype=dtype)
    expected = exact(x) @ exact(weight).T
    out = torch.full((tokens, channels), math.nan, dtype=dtype)
    assert linear(x, weight, None, None, same, out) is out
    assert_close(out, expected, dtype)
    assert_close(linear(x, weight, bias, None, same), expected + exact(bias), dtype)
    wide = torch.cat([x, normal(4, tokens, 40, dtype=dtype)], 1)
    assert_close(linear(wide[:, :depth], weight, None, None, same), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("depth", "kind"), [(512, "silu"), (1024, "silu"), (4096, "silu"), (512, "swiglu_oai")])
def test_gated_linear_is_linear_and_activation(dtype, depth, kind):
    """Bit for bit, where it is one kernel and where it is two."""
    weight, bias = normal(3, 2 * 40, depth, dtype=dtype), normal(2, 2 * 40, dtype=dtype)
    for tokens in (1, 3, 20, 40):
        x = normal(1, tokens, depth, dtype=dtype) * (torch.arange(depth) % 128 == 5)  # see above
        apart = kernel_layers.activate(kernel_linear.linear(x, weight, bias, None, True), kind, True)
        assert same(kernel_linear.gated_linear(x, weight, bias, None, True, kind), apart)
        expected = reference_linear.gated_linear(x, weight, bias, None, False, kind)
        assert_close(kernel_linear.gated_linear(x, weight, bias, None, False, kind), exact(expected), dtype)


@pytest.mark.parametrize("depth", [512, 3072, 4096])
def test_linear_of_a_row_does_not_depend_on_others(depth):
    x, weight = normal(1, 66, depth, dtype=torch.float16), normal(2, 40, depth, dtype=torch.float16)
    x *= torch.arange(depth) % 128 == 5  # see above
    whole = kernel_linear.linear(x, weight, same=True)
    for rows in (slice(0, 1), slice(65, 66), slice(5, 8), slice(20, 51)):
        assert same(kernel_linear.linear(x[rows].clone(), weight, same=True), whole[rows])


@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_tiles_hold_few_tokens_and_keep_processors_busy(weight_bytes):
    tiles = kernel_linear.TILES[weight_bytes]
    assert [each.tokens for each in tiles] == sorted((each.tokens for each in tiles), reverse=True)
    for tokens in range(1, 600):
        for channels in (64, 1024, 4096, 28672):
            chosen = kernel_linear.choose(tokens, channels, weight_bytes)
            programs = -(-tokens // chosen.tokens) * -(-channels // chosen.channels)
            assert chosen.tokens < 2 * max(16, tokens)
            assert chosen.tokens >= min(tokens, 64)
            assert programs >= kernel_linear.PROGRAMS or chosen.tokens <= 64
