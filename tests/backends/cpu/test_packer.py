"""The packer: weights in the width asked for."""

import subprocess
import sys

import numpy as np
import pytest

from quire.backends.cpu.packer import Packer


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_width_asked_for_in_a_fresh_process(name):
    """Nothing else may have to import what knows bfloat16: a float32 checkpoint does not."""
    code = (
        "import numpy as np; from quire.backends.cpu.packer import Packer; "
        f"print(Packer({name!r}).linear({{'w.weight': np.ones((3, 4), np.float32)}}, {{'w': (3, 4)}})[0].dtype)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == (name, "")


def test_bfloat16_is_rounded_to_nearest_even():
    values = np.array([[1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -3.0e38]], np.float32)
    expected = np.array([[0x3F80, 0x3F80, 0x3F82, 0xFF62]], np.uint16)
    assert np.array_equal(Packer("bfloat16").matrix(values), expected)
