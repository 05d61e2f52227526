"""Tables on the device and places in staging memory, of models whose layers are in several groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import running
from quire.backends.cuda.batches import arrange, decoding_first
from quire.backends.cuda.staging import layout
from quire.backends.cuda.tables import Tables, Updates
from quire.backends.parameters import Parameters
from quire.backends.rows import Rows
from quire.core.plan import RowStart, RowWork
from quire.sampling_params import SamplingParams

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parents[2] / "fixtures" / "golden"


@pytest.mark.parametrize("groups", [1, 2, 3, 7])
def test_the_device_has_the_tables_of_the_host(groups: int) -> None:
    """Blocks that are appended, replaced, and taken away, several rows at a time."""
    rng = np.random.default_rng(groups)
    rows, tables = Rows(5, 70, 4, groups), Tables(5, 70, 4, groups, CPU)
    parameters = Parameters(rows, 100)
    for _ in range(50):
        work = []
        for row in rng.permutation(5)[: rng.integers(1, 6)]:
            first = rng.integers(0, 18)
            count = rng.integers(0, 19 - first)
            work.append(RowWork(int(row), 0, 1, rng.integers(-1, 1000, count * groups).tolist(), True, int(first)))
        rows.batch(work)
        updates = Updates(tables, [], work, rows.lengths, parameters)
        arrays = updates.arrays()
        assert layout([array.size for array in arrays])[1] <= updates.size + 4 * len(arrays)
        tables.apply([torch.from_numpy(array.reshape(-1)) for array in arrays])
        assert len(tables.blocks) == groups
        for table, expected in zip(tables.blocks, rows.block_tables, strict=True):
            assert (table[:5, : expected.shape[1]].numpy() == expected).all()
            assert not table[5].any(), "the spare row"
    assert all(table.is_contiguous() for table in tables.blocks)
    assert all((table.data_ptr() - tables.blocks[0].data_ptr()) % 16 == 0 for table in tables.blocks)
    assert tables.nbytes >= rows.block_tables.nbytes


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2-windows", "gpt-oss", "gemma3"])
def test_what_a_captured_step_reads_stays_where_it_is(name: str) -> None:
    """Whatever the plan changes; and of each group, the places that it writes to are those of its blocks."""
    options: dict[str, Any] = {"device": "torch-cpu", "dtype": "float32", "kv_dtype": "float32", "max_num_seqs": 8, "block_size": 4}
    backend: Any = running.open_engine(FIXTURES / name, **options).backend
    groups, rng = backend.groups.width, np.random.default_rng(1)
    assert groups == {"qwen3-tied": 1, "qwen2-windows": 2, "gpt-oss": 3, "gemma3": 6}[name]
    params = SamplingParams(temperature=0.0)
    places = set()
    for count in (3, 4, 1, 4):
        length = int(rng.integers(4, 90))
        starts = [RowStart(row, rng.integers(0, 90, length).tolist(), length, params, 0, ()) for row in range(count)]
        for start in starts:
            backend._rows.begin(start)
        blocks = rng.integers(0, 50, (count, -(-length // 4) * groups))
        work, decoding, _ = decoding_first([RowWork(row, length - 1, 1, blocks[row].tolist(), True) for row in range(count)])
        updates = Updates(backend._tables, starts, work, backend._rows.lengths, backend._parameters)
        batch = backend._rows.batch(work)
        step, samples = backend._steps.send_padded(arrange(batch, decoding, 4), updates, 4)
        read = [*step.slots, *step.tables, step.rows, step.positions, step.decode_lengths, samples.lengths, step.tokens]
        read += [tiles.packed for tiles in step.decode_tiles.values()]
        places.add(tuple(tensor.data_ptr() for tensor in read))
        assert all(tensor.data_ptr() % 16 == step.slots[0].data_ptr() % 16 for tensor in step.slots)
        assert len(step.slots) == len(step.tables) == groups
        for group in range(groups):
            expected = [blocks[row, (length - 1) // 4 * groups + group] * 4 + (length - 1) % 4 for row in range(count)]
            assert step.slots[group].tolist() == expected + [-1] * (4 - count)
            assert step.tables[group][:count, : -(-length // 4)].tolist() == blocks[:, group::groups].tolist()
        assert step.rows[count:].tolist() == [8] * (4 - count)
    assert len(places) == 1


def test_positions_that_are_in_the_blocks_already_are_written_in_no_group() -> None:
    rows = Rows(2, 40, 4, 3)
    for row in range(2):
        rows.begin(RowStart(row, [7] * 9, 9, SamplingParams(), 0, ()))
    work = [RowWork(0, 8, 1, list(range(9)), True, write=False), RowWork(1, 5, 4, [-1, -1, -1, *range(20, 26)], True)]
    slots = arrange(rows.batch(work), 1, 4).slots
    assert slots.tolist() == [[-1, *(4 * 20 + i for i in (1, 2, 3)), 4 * 23], [-1, 85, 86, 87, 96], [-1, 89, 90, 91, 100]]
