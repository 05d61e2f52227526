"""What goes to the device in one copy, and where it is there."""

from __future__ import annotations

import numpy as np
import torch

from quire.backends.cuda.staging import Staging, layout


def test_arrays_arrive_as_they_are() -> None:
    staging = Staging(torch.device("cpu"), 64)
    integers = np.arange(6, dtype=np.int32)
    arrays = [integers[:5], integers[:0], np.array([1.5, -2.0], np.float32), integers.reshape(2, 3)]
    sent = staging.send(arrays)
    assert [tensor.tolist() for tensor in (sent[0], sent[1], sent[3])] == [[0, 1, 2, 3, 4], [], [0, 1, 2, 3, 4, 5]]
    assert sent[2].view(torch.float32).tolist() == [1.5, -2.0]
    assert all(offset % 4 == 0 for offset in layout([array.size for array in arrays])[0])


def test_a_large_step_does_not_move_what_captured_steps_read() -> None:
    staging = Staging(torch.device("cpu"), 64)
    first = staging.send([np.arange(8, dtype=np.int32), np.arange(3, dtype=np.int32)])[0]
    large = staging.send([np.arange(1000, dtype=np.int32)])[0]
    assert large.tolist() == list(range(1000))
    again = staging.send([np.arange(8, 16, dtype=np.int32), np.arange(9, dtype=np.int32)])[0]
    assert again.data_ptr() == first.data_ptr()
    assert first.tolist() == list(range(8, 16))
