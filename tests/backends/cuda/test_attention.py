"""Attention against float64, in PyTorch and in Triton's interpreter; and that a row knows nothing of its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from backends.cuda.attention_cases import TOLERANCE, Batch, relative_error
from quire.backends.cuda.cache import DTYPES as DTYPES_BY_NAME
from quire.backends.cuda.cache import LARGEST
from quire.backends.cuda.kernels import attention as kernels
from quire.backends.cuda.reference import attention as reference
from quire.backends.cuda.tiles import SPLIT, DecodeScratch, DecodeTiles, count_splits, packed_size, prefill_tiles, write_decode_tiles

OPS = pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "kernels"])
DTYPES = [(torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float16"),
          (torch.float32, "int8"), (torch.float16, "int8"), (torch.bfloat16, "int8"), (torch.float32, "fp8"), (torch.float16, "fp8"),
          (torch.bfloat16, "fp8")]  # fmt: skip
OF_NUMPY = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""Of NaN and infinities in the interpreter."""
SINKS = pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
RAGGED = [1, 15, 16, 17, 64, 65, 255, 256, 257, 530]
"""Around the edges of blocks, tiles and splits."""


@OPS
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_decode(ops, dtype, kv_dtype) -> None:
    batch = Batch([1, 16, 37, 257], heads=3, kv_heads=1, dtype=dtype, kv_dtype=kv_dtype)
    assert relative_error(batch.decode(ops), batch.expected()) < TOLERANCE[dtype]


@OPS
@pytest.mark.parametrize("window", [0, 5, 300])
def test_decode_of_ragged_lengths(ops, window) -> None:
    batch = Batch(RAGGED, window=window, heads=2, kv_heads=1)
    assert relative_error(batch.decode(ops), batch.expected()) < 1e-5


@OPS
@pytest.mark.parametrize("block_size", [4, 32, 64, 128])
@pytest.mark.parametrize("window", [0, 70])
def test_decode_with_other_blocks(ops, block_size, window) -> None:
    batch = Batch([3, block_size, 2 * block_size + 1], block_size=block_size, window=window)
    assert relative_error(batch.decode(ops), batch.expected()) < 1e-5


@OPS
@SINKS
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 8), (5, 1, 40), (14, 2, 64), (17, 1, 16), (3, 3, 96), (2, 1, 256)])
def test_shapes_of_heads(ops, sinks, heads, kv_heads, head_dim) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "has_sinks": sinks}
    batch = Batch([20, 40], **shape)
    assert relative_error(batch.decode(ops), batch.expected()) < 1e-5
    batch = Batch([20, 40], counts=[20, 3], **shape)
    assert relative_error(batch.prefill(ops), batch.expected()) < 1e-5


@OPS
@SINKS
def test_a_decoding_row_alone(ops, sinks) -> None:
    """Bit for bit, whatever the number of programs, and however many sequences are split."""
    batch = Batch([530, 1, 256, 600, 31], dtype=torch.float16, kv_dtype="float16", heads=3, kv_heads=1, has_sinks=sinks)
    together = batch.decode(ops)
    assert torch.equal(batch.decode(ops, programs=64), together)
    for sequence in range(len(batch.lengths)):
        assert torch.equal(batch.decode(ops, [sequence], programs=1)[0], together[sequence])
    assert torch.equal(batch.decode(ops, [3, 0, 1]), together[[3, 0, 1]])


@OPS
@pytest.mark.parametrize(("dtype", "kv_dtype"), [pair for pair in DTYPES if pair[1] in ("int8", "fp8")])
def test_small_values_beside_a_key_that_takes_most(ops, dtype, kv_dtype) -> None:
    """As of models whose first token is an attention sink: its score is 8 nats above the others', whose values, which are small, are
    nearly all of the output."""
    batch = Batch([300], heads=2, kv_heads=2, head_dim=64, block_size=64, dtype=dtype, kv_dtype=kv_dtype)
    kv, first = batch.kv, int(batch.tables[0, 0])
    assert kv.key_scales is not None
    assert kv.value_scales is not None
    kv.value_scales *= 0.03
    kv.value_scales[first, :, 0] *= 0.02
    q = batch.q[0].float() * 0.5
    batch.q.copy_(q.to(dtype))
    sink = q * (8 / batch.scale / (q * q).sum(-1, keepdim=True))
    scale = (sink.abs().amax(-1) / LARGEST[DTYPES_BY_NAME[kv_dtype]] * 1.001).half()
    numbers = sink / scale.float()[:, None]
    kv.key_scales[first, :, 0] = scale
    kv.keys[first, :, 0] = (numbers.round() if kv_dtype == "int8" else numbers).to(kv.keys.dtype)
    for name, stored, scales in (("keys", kv.keys, kv.key_scales), ("values", kv.values, kv.value_scales)):
        setattr(batch, name, stored.double().nan_to_num(0) * scales.double().nan_to_num(0)[..., None])
    expected = batch.expected()
    for found in (batch.decode(ops), batch.prefill(ops)):
        assert relative_error(found, expected) < TOLERANCE[dtype]


@OPS
@SINKS
def test_padding_is_finite(ops, sinks) -> None:
    batch = Batch([9, 300], has_sinks=sinks)
    whole = batch.decode(ops)
    batch.lengths[0] = 0
    out = batch.decode(ops)
    assert out[0].isfinite().all()
    assert torch.equal(out[1], whole[1])


@OPS
def test_queries_of_one_row_are_sequences_of_their_own(ops) -> None:
    """What verifies a draft: several sequences with one table, and lengths one apart."""
    batch = Batch([40, 41, 42])
    batch.rows = torch.tensor([2, 2, 2], dtype=torch.int32)
    batch.tables[:2] = batch.tables[2]
    assert relative_error(batch.decode(ops), batch.expected()) < 1e-5


@OPS
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_prefill(ops, dtype, kv_dtype) -> None:
    batch = Batch([1, 16, 37, 40], counts=[1, 16, 5, 33], heads=2, kv_heads=1, dtype=dtype, kv_dtype=kv_dtype)
    assert relative_error(batch.prefill(ops), batch.expected()) < TOLERANCE[dtype]


@OPS
@pytest.mark.parametrize("window", [0, 1, 20, 100])
@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_prefill_of_ragged_lengths(ops, window, block_size) -> None:
    """With float16, whose tiles of queries are as large as on tensor cores."""
    shape = {"heads": 2, "kv_heads": 1, "block_size": block_size, "window": window, "dtype": torch.float16, "kv_dtype": "float16"}
    batch = Batch([1, 64, 65, 200], counts=[1, 64, 1, 135], **shape)
    assert relative_error(batch.prefill(ops), batch.expected()) < 2e-3


@OPS
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
@pytest.mark.parametrize("window", [0, 300])
def test_sinks(ops, dtype, kv_dtype, window) -> None:
    """Once in each row, however many splits it has."""
    shape = {"dtype": dtype, "kv_dtype": kv_dtype, "window": window, "heads": 6, "kv_heads": 2, "has_sinks": True}
    batch = Batch([1, 257, 530], **shape)
    assert relative_error(batch.decode(ops), batch.expected()) < TOLERANCE[dtype]
    batch = Batch([1, 340], counts=[1, 17], **shape)
    assert relative_error(batch.prefill(ops), batch.expected()) < TOLERANCE[dtype]


@OPS
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
@pytest.mark.parametrize(("window", "sinks"), [(0, False), (300, True)])
def test_limits_of_scores(ops, dtype, kv_dtype, window, sinks) -> None:
    """In one split or several, in tiles with keys that are not seen and without."""
    shape = {"dtype": dtype, "kv_dtype": kv_dtype, "window": window, "heads": 6, "kv_heads": 2, "has_sinks": sinks, "softcap": 0.8}
    batch = Batch([1, 257, 530], **shape)
    assert relative_error(batch.decode(ops), batch.expected()) < TOLERANCE[dtype]
    batch = Batch([1, 340], counts=[1, 70], **shape)
    assert relative_error(batch.prefill(ops), batch.expected()) < TOLERANCE[dtype]


@OPS
@OF_NUMPY
@pytest.mark.parametrize("window", [0, 3])
def test_sinks_far_from_all_scores(ops, window) -> None:
    """Far below they are nothing; far above, keys are. In between, what is left of a value is small, and as exact as ever."""
    batch = Batch([1, 40, 600], heads=6, kv_heads=3, window=window, has_sinks=True)
    batch.sinks = torch.tensor([-1e30, -300.0, 40.0, 70.0, 300.0, 1e30])
    for found in (batch.decode(ops), batch.prefill(ops)):
        expected = batch.expected()
        assert found.isfinite().all()
        for head in range(4):
            assert relative_error(found[:, head], expected[:, head]) < 1e-5
        assert not found[:, 4:].any()
        batch.sinks, sinks = None, batch.sinks
        assert relative_error(found[:, :2], batch.expected()[:, :2]) < 1e-5
        batch.sinks = sinks


@OPS
@OF_NUMPY
def test_a_nan_beside_sinks(ops) -> None:
    batch = Batch([40, 300, 20], has_sinks=True)
    whole = batch.decode(ops)
    batch.q[1] = torch.nan
    for found in (batch.decode(ops), batch.prefill(ops)):
        assert found[1].isnan().all()
        assert relative_error(found[[0, 2]], whole[[0, 2]].double()) < 1e-5


def chunks(draw, batch: Batch) -> list[list[tuple[int, int, int]]]:
    """For each sequence its chunks, cut at random."""
    result = []
    for sequence, count in enumerate(batch.counts):
        cuts = sorted(draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=2)) - {count})
        result.append([(sequence, a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True)])
    return result


@OPS
@settings(max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data(), window=st.sampled_from([0, 0, 50]), float16=st.booleans(), sinks=st.booleans(), softcap=st.sampled_from([0.0, 2.0]))
def test_chunked_prefill_is_whole_prefill(ops, data, window, float16, sinks, softcap) -> None:
    """Bit for bit, with the chunks of several sequences in one launch or each by itself."""
    dtype, kv_dtype = (torch.float16, "float16") if float16 else (torch.float32, "float32")
    batch = Batch([90, 40], counts=[90, 30], heads=1, kv_heads=1, window=window, dtype=dtype, kv_dtype=kv_dtype, has_sinks=sinks,
                  softcap=softcap)  # fmt: skip
    whole = batch.prefill(ops)
    cut = chunks(data.draw, batch)
    for sequence, parts in enumerate(cut):
        start = int(batch.query_start[sequence])
        for part in parts:
            out = batch.prefill(ops, [part])
            assert torch.equal(out, whole[start + part[1] : start + part[2]])
    firsts = [parts[0] for parts in cut]
    out = batch.prefill(ops, firsts)
    assert torch.equal(out, torch.cat([whole[int(batch.query_start[s]) + a : int(batch.query_start[s]) + b] for s, a, b in firsts]))


@SINKS
def test_decode_of_the_reference_is_its_prefill(sinks) -> None:
    batch = Batch([140, 70], counts=[140, 60], has_sinks=sinks)
    prefilled = batch.prefill(reference)[batch.query_start[1:].long() - 1]
    batch.q = batch.q[batch.query_start[1:].long() - 1]
    assert torch.equal(batch.decode(reference), prefilled)


@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=6), window=st.sampled_from([0, 1, 256, 300, 5000]))
def test_decode_lists_cover_every_key_once(lengths, window) -> None:
    lengths = np.array(lengths, dtype=np.int32)
    packed = np.zeros(packed_size(len(lengths), 64 * len(lengths)), dtype=np.int32)
    used = write_decode_tiles(packed, lengths, window)
    scratch = DecodeScratch(len(lengths), 1, 1, 1, 1, torch.device("cpu"))
    tiles = DecodeTiles(torch.from_numpy(packed[:used]), len(lengths), scratch, 1)
    total, starts = int(tiles.count), tiles.first_slots.tolist()
    pairs = [tuple(pair) for pair in tiles.pairs.view(-1, 2).tolist()]
    assert len(pairs) == total == len(set(pairs))
    first, splits = count_splits(lengths, window)
    slots = set()
    for sequence, length in enumerate(lengths):
        mine = sorted(split for s, split in pairs if s == sequence)
        begin = max(0, length - window) if window else 0
        assert mine == list(range(first[sequence], first[sequence] + splits[sequence]))
        ends = [*((split + 1) * SPLIT for split in mine[:-1]), length]
        covered = [p for split, end in zip(mine, ends, strict=True) for p in range(max(begin, split * SPLIT), end)]
        assert covered == list(range(begin, length))
        assert mine[-1] == 0 or SPLIT // 2 < length - mine[-1] * SPLIT <= SPLIT + SPLIT // 2
        slots |= {starts[sequence] + split - first[sequence] for split in mine}
    assert slots == set(range(total))
    order = [(split + 1 == first[s] + splits[s] and lengths[s] < (split + 1) * SPLIT, split) for s, split in pairs]
    assert order == sorted(order)


def test_a_list_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 tiles of 2 sequences need 14 numbers, there are 12"):
        write_decode_tiles(np.zeros(12, dtype=np.int32), np.array([600, 3], dtype=np.int32))


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5), st.sampled_from([16, 128]))
def test_prefill_lists_cover_every_query_once(sequences, rows) -> None:
    counts, cached = np.array(sequences, dtype=np.int32).T
    starts = np.cumsum([0, *counts], dtype=np.int32)
    tiles = prefill_tiles(starts, counts + cached, rows)
    expected = {(s, i) for s, count in enumerate(counts) for i in range(-(-int(count) // rows))}
    assert tiles.dtype == np.int32
    assert len(tiles) == len(expected)
    assert {(int(s), int(i)) for s, i in tiles} == expected
    keys = [min(cached[s] + (i + 1) * rows, cached[s] + counts[s]) for s, i in tiles]
    assert keys == sorted(keys, reverse=True)
