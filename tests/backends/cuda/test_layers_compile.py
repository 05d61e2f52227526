"""What the kernels of the layers become on an H100 or H200: nothing spilled, memory read and written 128 bits at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_kernels import Compiled

HERE = Path(__file__).parent
SHARED_LIMIT = 227 * 1024


@pytest.fixture(scope="module")
def found():
    """Case → its kernels, in the order of their launches."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[2]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, HERE / "compile_layers.py"], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    kernels: dict[str, list[Compiled]] = {}
    for entry in json.loads(run.stdout):
        kernels.setdefault(entry.pop("case"), []).append(Compiled(**entry))
    return kernels


def every(found):
    return [(case, kernel) for case, kernels in found.items() for kernel in kernels]


def test_table(found, capsys):
    shown = ("LDG.128", "STG.128", "LDGSTS", "HGMMA")
    lines = [f"{'case':34} {'kernel':12} warps registers shared  {'  '.join(shown)}"]
    for case, k in every(found):
        counts = "  ".join(f"{k.count(name):{len(name)}}" for name in shown)
        lines.append(f"{case:34} {k.kernel:12} {k.warps:5} {k.registers:9} {k.shared:6}  {counts}")
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_nothing_is_spilled(found):
    for case, kernel in every(found):
        assert (kernel.stack, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0), case
        assert kernel.shared <= SHARED_LIMIT // 2, case
        bound = 232 if kernel.kernel == "_linear" else 64
        assert kernel.registers <= bound, case


def test_rows_are_read_and_written_128_bits_at_a_time(found):
    for case, (kernel, *_) in found.items():
        if case.startswith(("rms", "silu", "gelu", "copy")) or case == "layer 768 fp16 +residual":
            assert kernel.count("LDG.128") > 0, case
            assert kernel.count("STG.128") > 0, case
            narrow = kernel.count("LDG.32") + kernel.count("LDG.64") - (2 if case.startswith("copy") else 0)  # the copy's pair
            assert narrow == 0, case
            assert kernel.count("STG.32") + kernel.count("STG.64") == 0, case


def test_one_launch(found):
    for case, kernels in found.items():
        assert len(kernels) == (2 if case == "copy int8, scales" or ("linear" in case and "T=512" not in case) else 1), case


def test_products_of_8_bit_weights(found):
    """Weights go to shared memory while others are multiplied, and from there through registers into the tensor cores."""
    for case, (kernel, *_) in found.items():
        if case.startswith("linear") and "fp32" not in case:
            assert kernel.count("HGMMA") > 0, case
            assert kernel.count("HMMA") == 0, case
            assert kernel.count("LDGSTS.64") > 0, case
