"""Recorded kernel calls run again, and steps of a decoder that are recorded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.backends.cpu import _native as native
from quire.backends.cpu import replay
from quire.backends.cpu.decoder import Decoder
from quire.backends.rows import Batch, Part
from quire.models.weights import load_model

FIXTURES = Path(__file__).parents[2] / "fixtures" / "golden"
BLOCK, ROWS = 8, 24


def layer(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """Arrays, and every kernel that can be recorded on them: two sequences of one position each."""
    a: dict[str, Any] = {
        "x": rng.standard_normal((2, 32)).astype(np.float32),
        "ids": np.array([3, 1], np.int32),
        "positions": np.array([9, 4], np.int32),
        "rows": np.array([1, 0], np.int32),
        "tables": np.array([[0, 2], [3, 1]], np.int32),
        "ends": np.array([0, 1, 2], np.int32),
        "qkv": np.zeros((2, 6, 16), np.float32),
        "k": rng.standard_normal((4, 1, 16, BLOCK)).astype(np.float32),
        "v": rng.standard_normal((4, 1, BLOCK, 16)).astype(np.float32),
        "attended": np.zeros((2, 64), np.float32),
        "narrow": np.zeros((2, 64), np.float16),
        "out": np.zeros((2, 5), np.float32),
    }
    table = rng.standard_normal((8, 32)).astype(np.float32)
    weights = [native.pack_linear(rng.standard_normal(shape).astype(np.float32)) for shape in ((96, 32), (5, 64))]
    angles = rng.standard_normal((12, 8)).astype(np.float32)
    norm = np.ones(16, np.float32)

    def call() -> None:
        native.embed(a["ids"], table, a["x"])
        native.linear(weights[0], a["x"], a["qkv"].reshape(2, 96))
        native.rms_norm(a["qkv"], norm, 1e-5, a["qkv"])
        native.rotary(a["qkv"], a["positions"], angles, angles)
        where = (a["tables"], a["rows"], a["ends"], a["positions"])
        native.write_kv(a["qkv"][:, 4:5], a["qkv"][:, 5:], a["k"], a["v"], *where)
        native.paged_attention(a["qkv"][:, :4], a["k"], a["v"], a["attended"], *where, 0.25, softcap=3.0)
        native.convert(a["attended"], a["narrow"])
        native.linear(weights[1], a["attended"], a["out"])
        native.softcap(a["out"], 2.0)

    return a, call


def test_recorded_calls_run_again_on_what_the_arrays_hold_then() -> None:
    a, call = layer(np.random.default_rng(0))
    b, same = layer(np.random.default_rng(0))
    recording = native.Recording()
    with recording:
        call()
    same()
    assert len(recording) == 9
    np.testing.assert_array_equal(a["out"], b["out"])
    for ids, positions, rows in (((0, 7), (10, 15), (0, 1)), ((5, 5), (0, 3), (1, 0))):
        for arrays in (a, b):
            arrays["ids"][:], arrays["positions"][:], arrays["rows"][:] = ids, np.minimum(positions, 11), rows
        before = b["out"].copy()
        recording.run()
        same()
        assert (before != b["out"]).any()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", 8, r"ids\[0\] is 8, outside the 8 rows of table"),
        ("positions", 12, r"positions\[0\] is 12, outside the 12 rows of cos"),
        ("rows", 2, r"rows\[0\] is 2, outside the 2 rows of block_tables"),
        ("tables", 4, "sequence 0: block 0 of its table is 4, outside the 4 blocks of the cache"),
        ("ends", -1, "query_start must go from 0"),
    ],
)
def test_ids_are_checked_at_every_run(name: str, value: int, message: str) -> None:
    a, call = layer(np.random.default_rng(1))
    recording = native.Recording()
    with recording:
        call()
    if name == "tables":
        a[name][1, 0] = value
        a["positions"][0] = 2
    else:
        a[name][0] = value
    with pytest.raises(ValueError, match=message):
        recording.run()


def test_arrays_and_weights_live_as_long_as_their_recording() -> None:
    recording, out = native.Recording(), np.zeros((1, 3), np.float32)

    def record() -> None:
        x = np.full((1, 4096), 2, np.float32)
        packed = native.pack_linear(np.ones((3, 4096), np.float32))
        with recording:
            native.linear(packed, x, out, np.ones(3, np.float32))

    record()
    gc.collect()
    others = [np.full((1, 4096), 7, np.float32) for _ in range(64)]  # take the memory, if it is free
    out[:] = 0
    recording.run()
    np.testing.assert_array_equal(out, np.full((1, 3), 8193, np.float32))
    assert len(others) == 64


def test_one_recording_at_a_time() -> None:
    outer, inner = native.Recording(), native.Recording()
    with outer:
        with pytest.raises(ValueError, match="one at a time"), inner:
            pass
        with pytest.raises(ValueError, match="can't run another"):
            inner.run()
    with outer:  # begins anew
        pass
    assert len(outer) == 0


def decoder_of(name: str) -> Decoder:
    model = load_model(next(iter(sorted(FIXTURES.glob(f"{name}*")))))
    decoder = Decoder(
        model.spec, model.tensors, num_blocks=2 * ROWS, block_size=BLOCK, kv_dtype="float16",
        max_tokens=ROWS, max_rows=ROWS, max_model_len=16,
    )  # fmt: skip
    rng = np.random.default_rng(4)
    for each in decoder.kv:
        for pool in each.pools():
            pool[:] = rng.standard_normal(pool.shape)
    return decoder


def batch_of(rng: np.random.Generator, tables: np.ndarray, counts: list[int]) -> Batch:
    """Rows with ``counts`` positions each, all asked for: the next token and guesses."""
    rows = rng.permutation(tables.shape[1])[: len(counts)].astype(np.int32)
    start = np.array([rng.integers(0, 17 - count) for count in counts], np.int32)
    ids = rng.integers(0, 90, sum(counts)).astype(np.int32)
    query_start = np.cumsum([0, *counts]).astype(np.int32)
    if max(counts) == 1:
        return Batch(rows, query_start, start, start, ids, tables, rows, start + 1, uniform=True)
    positions = np.concatenate([np.arange(at, at + count, dtype=np.int32) for at, count in zip(start, counts, strict=True)])
    return Batch(rows, query_start, start, positions, ids, tables, np.repeat(rows, counts), positions + 1, drafts=True)


@pytest.mark.parametrize("name", ["llama-llama3", "gpt2", "opt-post-norm", "qwen3-tied", "glm4-moe", "ernie4-5-moe"])
def test_steps_that_are_replayed_give_the_same_bytes(name: str) -> None:
    replayed, plain = decoder_of(name), decoder_of(name)
    rng, again = np.random.default_rng(7), np.random.default_rng(7)
    tables = np.random.default_rng(8).permutation(2 * ROWS).astype(np.int32).reshape(1, ROWS, 2)
    steps = [[1] * count for count in (*range(1, ROWS + 1), *range(ROWS, 0, -1), 3, 3, 1, 3)]
    # With guesses; of as many rows and positions, some of them spread in another way.
    steps += [[4], [1], [4], [3], [2, 1, 1], [1], [1, 2, 1], [1, 1, 2], [1, 1, 1], [2, 1, 1], [3, 2], [1, 4], [5], [3, 2]]
    for counts in steps:
        got = replayed.forward(batch_of(rng, tables, counts))
        expected = plain.logits(plain.hidden(batch_of(again, tables, counts)))
        np.testing.assert_array_equal(got, expected)
    for one, other in zip(replayed.kv, plain.kv, strict=True):
        for a, b in zip(one.pools(), other.pools(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_recordings_are_few_and_belong_to_one_table() -> None:
    calls: list[int] = []

    def forward(batch: Batch) -> np.ndarray:
        calls.append(len(batch.ids))
        return np.zeros((len(batch.ids), 1), np.float32)

    steps = replay.Replay(forward)
    rng, tables = np.random.default_rng(0), np.zeros((1, 64, 2), np.int32)
    for counts in ([1], [1, 1], [1], [1, 1], [3], [1, 2], [2, 1], [3]):
        assert len(steps(batch_of(rng, tables, counts))) == sum(counts)
    assert calls == [1, 2, 3, 3]
    steps(batch_of(rng, tables.copy(), [1]))
    assert calls == [1, 2, 3, 3, 1]
    for count in range(3, 3 + 32):
        steps(batch_of(rng, tables, [1] * count))
    calls.clear()
    steps(batch_of(rng, tables, [1] * 34))  # kept
    steps(batch_of(rng, tables, [1] * 2))  # not: those used last are
    steps(replace(batch_of(rng, tables, [1]), asked=Part(*[np.zeros(0, np.int32)] * 4)))
    assert calls == [2, 1]
